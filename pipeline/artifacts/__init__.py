"""Content-addressed artifacts on disk."""
