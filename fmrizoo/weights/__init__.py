"""Converters for weights that other code bases released."""
