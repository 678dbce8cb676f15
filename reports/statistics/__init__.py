"""Intervals and differences for few seeds, and the probability of improvement."""
