"""Metrics as sums of per-sample statistics, and their bootstrap intervals."""
