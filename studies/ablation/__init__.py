"""Ablations: which settings are tried, their trials and their record."""
