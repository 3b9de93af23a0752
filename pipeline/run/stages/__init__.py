"""The stages as the driver sees them: key, work on the cluster, progress, what goes to MLflow."""
