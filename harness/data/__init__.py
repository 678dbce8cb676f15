"""From image files to batches, through caches."""
