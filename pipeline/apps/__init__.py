"""What is built on runs: plans, comparisons, retraining, judging, jobs."""
