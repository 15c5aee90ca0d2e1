"""Which parameters and modules belong to which stage's residual blocks, and how deep that is.

Source: Dey et al. 2025, "Don't be lazy: CompleteP enables compute-efficient deep transformers"
(arXiv 2505.01618), table 1 with α = 1: what L blocks add to the residual stream is multiplied by
base depth / L, so that neither the stream nor what a step changes of it grows with the depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

# Modules and parameters of a block: the stage of a Swin encoder, or NeuroMamba's only one.
_STAGE = re.compile(r"(?:backbone\.)?layers\.(\d+)\.blocks\.\d+(?:\..+)?")
_ONLY = re.compile(r"(?:backbone\.)?blocks\.\d+(?:\..+)?")
_PROMPT = re.compile(r"head\.tokens\.(\d+)")
# What joins the two pairs of a factorized block acts on the stream itself, not on a branch.
_JOIN = re.compile(r"(?:backbone\.)?layers\.\d+\.blocks\.\d+\.(?:norm\.weight|norm\.bias|weight)")


@dataclass(frozen=True)
class Depth:
    """Depths of a model and of the base that it was tuned at.

    Attributes:
        base, target: Blocks, one number a stage.
    """

    base: tuple[int, ...]
    target: tuple[int, ...]

    @classmethod
    def of(cls, base: Iterable[int], target: Iterable[int]) -> Depth:
        """From lists, as JSON has them."""
        return cls(tuple(base), tuple(target))

    @property
    def ratios(self) -> tuple[float, ...]:
        """Base depth / depth, the factor on every residual branch, one a stage."""
        return tuple(b / t for b, t in zip(self.base, self.target, strict=True))

    def branch(self, name: str) -> float:
        """Factor on the branches of the block that a module or parameter ``name`` is in.

        1 outside all blocks, and for what acts on the stream itself. Prompts (``head.tokens.#``)
        are seen by one block each.
        """
        if _JOIN.fullmatch(name):
            return 1.0
        return self._of_stage(name)

    def join(self, name: str) -> float:
        """Factor on the learning rate of the parameter ``name``.

        Of what acts on the stream itself: as many steps in a row as there are blocks must together
        be as large as at base depth. 1 for all others (α = 1).
        """
        return self._of_stage(name) if _JOIN.fullmatch(name) else 1.0

    def _of_stage(self, name: str) -> float:
        if found := _STAGE.fullmatch(name):
            return self.ratios[int(found[1])]
        if found := _PROMPT.fullmatch(name):
            ends = list(accumulate(self.target))
            return self.ratios[next(s for s, end in enumerate(ends) if int(found[1]) < end)]
        return self.ratios[0] if _ONLY.fullmatch(name) else 1.0
