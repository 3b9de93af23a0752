"""The one door to Ray: connect, run tasks, run training workers."""
