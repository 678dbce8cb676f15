"""One run: opened, run, opened again."""
