"""Samples of unequal length, padded at the end: which of them can be computed together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pack(NamedTuple):
    """Sequences that go through a sequence model together.

    Attributes:
        rows: ``(b', l')`` tokens of the padded batch, counted over ``(b · n)``; None: all of it.
        mirror: ``(b', l')`` the place whose token stands here when every sequence is read
            backwards; None: simply flip.
        sequence: ``(b', l')`` int32 number of the sequence that each token belongs to, where one
            row holds several; None: one a row.
    """

    rows: Tensor | None = None
    mirror: Tensor | None = None
    sequence: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """``(b, n, d)`` → ``(b', l', d)``."""
        if self.rows is None:
            return x
        return x.flatten(0, 1).index_select(0, self.rows.flatten()).view(*self.rows.shape, -1)

    def flip(self, x: Tensor) -> Tensor:
        """``(b', l', d)`` with every sequence reversed where it is; its own inverse."""
        if self.mirror is None:
            return x.flip(1)
        return x.gather(1, self.mirror.unsqueeze(-1).expand_as(x))


def give_back(packs: list[Pack], parts: list[Tensor], batch: int, length: int) -> Tensor:
    """``(b', l', d)`` of every pack → ``(batch, length, d)``; 0 where no token was."""
    if len(packs) == 1 and packs[0].rows is None:
        return parts[0]
    rows = torch.cat([p.rows.flatten() for p in packs if p.rows is not None])
    values = torch.cat([part.flatten(0, 1) for part in parts])
    out = values.new_zeros(batch * length, values.shape[-1]).index_copy(0, rows, values)
    return out.view(batch, length, -1)


def together(lengths: list[int], length: int, device: torch.device) -> list[Pack]:
    """One pack: the batch as it is padded to ``length``."""
    if all(size == length for size in lengths):
        return [Pack()]
    place = torch.arange(length, device=device).expand(len(lengths), -1)
    sizes = torch.tensor(lengths, device=device).unsqueeze(1)
    return [Pack(mirror=torch.where(place < sizes, sizes - 1 - place, place))]


def by_length(lengths: list[int], length: int, device: torch.device) -> list[Pack]:
    """A pack for every length that occurs: nothing that only pads is computed."""
    if all(size == length for size in lengths):
        return [Pack()]
    packs = []
    for size in sorted(set(lengths) - {0}):
        samples = torch.tensor([i for i, n in enumerate(lengths) if n == size], device=device)
        packs.append(Pack(samples.unsqueeze(1) * length + torch.arange(size, device=device)))
    return packs


def end_to_end(lengths: list[int], length: int, device: torch.device, limit: int) -> list[Pack]:
    """Packs of sequences one after the other, ``(1, Σ)``, of at most ``limit`` tokens each.

    A sequence that is longer than ``limit`` by itself gets a pack of its own.
    """
    packs: list[list[int]] = []
    room = 0
    for sample, size in enumerate(lengths):
        if size == 0:
            continue
        if not packs or size > room:
            packs.append([])
            room = limit
        packs[-1].append(sample)
        room -= size
    return [_end_to_end(samples, lengths, length, device) for samples in packs]


def _end_to_end(samples: list[int], lengths: list[int], length: int, device: torch.device) -> Pack:
    rows, mirror, sequence = [], [], []
    start = 0
    for number, sample in enumerate(samples):
        place = torch.arange(lengths[sample], device=device)
        rows.append(sample * length + place)
        mirror.append(start + place.flip(0))
        sequence.append(torch.full_like(place, number, dtype=torch.int32))
        start += lengths[sample]
    return Pack(*(torch.cat(part).unsqueeze(0) for part in (rows, mirror, sequence)))
