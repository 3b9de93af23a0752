"""What a run would take and do, without doing it."""
