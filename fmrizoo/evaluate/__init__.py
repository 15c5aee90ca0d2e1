"""Honest numbers: predictions, metrics, baselines."""
