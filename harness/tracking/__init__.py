"""MLflow, a view of the records."""
