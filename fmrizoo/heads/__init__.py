"""Heads: what is added after an encoder, and what of the encoder trains."""
