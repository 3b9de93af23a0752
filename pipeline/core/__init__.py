"""What everything stands on: errors, the console, files and journals, this machine. Knows nothing of models or runs."""
