"""Heads: what is added after an encoder, and what of the encoder trains."""

from fmrizoo.heads.linear import LinearConfig, LinearHead

__all__ = ["LinearConfig", "LinearHead"]
