"""MLflow, a view of the records: `store` is where it is kept, `mirror` is one run in it, `feed` is how a run that
trains gives its records to its mirror."""
