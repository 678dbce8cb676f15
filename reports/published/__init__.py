"""Published numbers, and the marks that stand for them in figures."""
