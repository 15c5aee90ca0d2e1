"""Packs of samples of unequal length: every token once, sequences kept apart."""

from __future__ import annotations

import pytest
import torch

from fmrizoo.layers.ragged import by_length, end_to_end, give_back, together

LENGTHS, LONGEST = [3, 5, 3, 0, 1], 5
CPU = torch.device("cpu")


def batch() -> torch.Tensor:
    return torch.arange(5.0 * LONGEST * 2).view(5, LONGEST, 2) + 1


def valid() -> torch.Tensor:
    return (torch.arange(LONGEST) < torch.tensor(LENGTHS).unsqueeze(1)).unsqueeze(-1)


def test_equal_lengths_are_one_batch() -> None:
    for make in (together, by_length):
        (pack,) = make([5, 5], 5, CPU)
        assert pack.rows is None and pack.mirror is None


@pytest.mark.parametrize("limit", [4, 8, 100])
def test_every_token_comes_back_to_its_place(limit: int) -> None:
    x = batch()
    for packs in (by_length(LENGTHS, LONGEST, CPU), end_to_end(LENGTHS, LONGEST, CPU, limit)):
        parts = [pack.take(x) for pack in packs]
        assert sum(part[..., 0].numel() for part in parts) == sum(LENGTHS)
        assert torch.equal(give_back(packs, parts, 5, LONGEST), x * valid())


@pytest.mark.parametrize("kind", ["together", "by_length", "end_to_end"])
def test_flipping_reverses_every_sequence_in_its_place(kind: str) -> None:
    x = batch()
    packs = {
        "together": together(LENGTHS, LONGEST, CPU),
        "by_length": by_length(LENGTHS, LONGEST, CPU),
        "end_to_end": end_to_end(LENGTHS, LONGEST, CPU, 100),
    }[kind]
    flipped = give_back(packs, [p.flip(p.take(x)) for p in packs], 5, LONGEST)
    for sample, length in enumerate(LENGTHS):
        assert torch.equal(flipped[sample, :length], x[sample, :length].flip(0))
    for pack in packs:
        taken = pack.take(x)
        assert torch.equal(pack.flip(pack.flip(taken)), taken)


def test_packs_number_their_sequences_and_keep_to_the_limit() -> None:
    packs = end_to_end(LENGTHS, LONGEST, CPU, 8)
    numbers = [pack.sequence for pack in packs]
    assert [n.tolist() for n in numbers if n is not None] == [
        [[0] * 3 + [1] * 5],
        [[0] * 3 + [1]],
    ]
    assert all(n is not None and n.dtype == torch.int32 for n in numbers)
    assert len(end_to_end(LENGTHS, LONGEST, CPU, 1)) == 4
