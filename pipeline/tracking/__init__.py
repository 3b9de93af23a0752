"""The door to MLflow tracking."""
