"""The one door to Ray: the connection, and the work that runs on it."""
