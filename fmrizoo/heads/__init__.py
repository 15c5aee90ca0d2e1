"""Heads: what is added after an encoder, and what of the encoder trains."""

from fmrizoo.heads.complex import ComplexConfig, ComplexHead
from fmrizoo.heads.linear import LinearConfig, LinearHead
from fmrizoo.heads.lora import LoraConfig, LoraHead
from fmrizoo.heads.prompt import PromptConfig, PromptHead
from fmrizoo.heads.readout import ReadoutConfig, ReadoutHead

__all__ = [
    "ComplexConfig",
    "ComplexHead",
    "LinearConfig",
    "LinearHead",
    "LoraConfig",
    "LoraHead",
    "PromptConfig",
    "PromptHead",
    "ReadoutConfig",
    "ReadoutHead",
]
