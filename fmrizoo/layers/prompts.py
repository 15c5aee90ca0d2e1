"""Learned prompts: what fits a backbone, and where they stand in sequences.

Shapes: b samples, n tokens, d width, p prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrizoo.errors import RecipeError
from fmrizoo.layers.ragged import Pack


def check_prompts(
    prompts: Sequence[Tensor] | None, widths: Sequence[int]
) -> tuple[Tensor, ...] | None:
    """``prompts``, if there is one ``(p, width)`` for every layer, with the same ``p ≥ 1``.

    Raises:
        RecipeError: anything else.
    """
    if prompts is None:
        return None
    if len(prompts) != len(widths):
        raise RecipeError(
            f"the backbone has {len(widths)} layers and needs prompts for each, got {len(prompts)}"
        )
    count = prompts[0].shape[0] if prompts[0].ndim else 0
    for layer, (given, width) in enumerate(zip(prompts, widths, strict=True)):
        if not count or given.shape != (count, width) or not given.is_floating_point():
            raise RecipeError(
                f"the prompts of layer {layer} must be floating point ({count or 'p ≥ 1'}, "
                f"{width}), got {tuple(given.shape)} {given.dtype}"
            )
    return tuple(prompts)


@dataclass(frozen=True)
class Frame:
    """Room for ``count`` prompts before every sequence of a padded batch.

    Attributes:
        count: Prompts.
        after: As many places behind every sequence too.
    """

    count: int
    after: bool = False

    @property
    def extra(self) -> int:
        """Places that each sequence gets."""
        return self.count * (1 + self.after)

    def around(self, x: Tensor) -> Tensor:
        """``(b, n, d)`` → ``(b, n + extra, d)``; the first prompts' places are 0."""
        return F.pad(x, (0, 0, self.count, self.extra - self.count))

    def within(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`around`."""
        return x[:, self.count : x.shape[1] - (self.extra - self.count)]

    def places(
        self, pack: Pack, lengths: Sequence[int], length: int, device: torch.device
    ) -> Tensor:
        """``(sequences · extra,)`` rows of ``pack`` that are prompts, sequence by sequence.

        Args:
            pack: Of a batch with the extra places.
            lengths: Tokens of every sample, without them.
            length: To which the samples are padded, with them.
            device: Where the rows are.
        """
        prompt = torch.arange(self.count)
        start = torch.arange(len(lengths)).unsqueeze(1) * length
        ends = [start + prompt]
        if self.after:
            ends.append(start + self.count + torch.tensor(lengths).unsqueeze(1) + prompt)
        places = torch.cat(ends, 1).flatten()
        if pack.rows is not None:
            rows = pack.rows.flatten().cpu()
            where = torch.full((len(lengths) * length,), -1)
            where[rows] = torch.arange(len(rows))
            places = where[places]
            places = places[places >= 0]
        return places.to(device)


def overwrite(x: Tensor, places: Tensor, prompts: Tensor) -> Tensor:
    """``x (b', l', d)`` with ``prompts (p, d)`` at its ``places``, ``p`` after ``p`` of them."""
    # Expanded, not indexed: the gradient is then one sum over the sequences, rounded once.
    repeated = prompts.to(x.dtype).expand(len(places) // len(prompts), -1, -1).flatten(0, 1)
    return x.flatten(0, 1).index_copy(0, places, repeated).view_as(x)
