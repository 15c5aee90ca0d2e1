"""Synthetic BOLD whose subject traits and task effects are known: who has what, signal, files."""
