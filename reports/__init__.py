"""Reports: records in; tables, figures, statistics and a self-contained page out. Never imports torch."""
