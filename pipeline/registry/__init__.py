"""The MLflow model registry: versions, and the aliases that say which one is in use."""
