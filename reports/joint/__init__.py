"""Several studies together: a report of their own."""
