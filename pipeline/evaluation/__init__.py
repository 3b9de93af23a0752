"""What each evaluation process runs, and its results."""
