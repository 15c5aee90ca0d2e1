"""Where prompts stand in the sequences of a batch, however these are packed."""

from __future__ import annotations

import pytest
import torch

from fmrizoo.errors import RecipeError
from fmrizoo.layers.prompts import Frame, check_prompts, overwrite
from fmrizoo.layers.ragged import by_length, end_to_end, give_back, together

CPU = torch.device("cpu")
LENGTHS = [4, 2, 4, 1]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("how", ["together", "by_length", "end_to_end", "equal"])
def test_every_sequence_gets_its_prompts_and_keeps_its_tokens(how: str, after: bool) -> None:
    lengths = [4, 4, 4] if how == "equal" else LENGTHS
    frame = Frame(2, after)
    tokens = torch.randn(len(lengths), 4, 3)
    prompts = torch.randn(2, 3, requires_grad=True)
    x = frame.around(tokens)
    assert x.shape == (len(lengths), 4 + frame.extra, 3)
    assert torch.equal(frame.within(x), tokens)
    sizes = [n + frame.extra for n in lengths]
    packs = {
        "together": lambda: together(sizes, x.shape[1], CPU),
        "by_length": lambda: by_length(sizes, x.shape[1], CPU),
        "end_to_end": lambda: end_to_end(sizes, x.shape[1], CPU, 12),
        "equal": lambda: by_length(sizes, x.shape[1], CPU),
    }[how]()
    parts = [
        overwrite(p.take(x), frame.places(p, lengths, x.shape[1], CPU), prompts) for p in packs
    ]
    found = give_back(packs, parts, len(lengths), x.shape[1])
    for row, sample, length in zip(found, tokens, lengths, strict=True):
        wanted = [prompts, sample[:length], *([prompts] if after else [])]
        assert torch.equal(row[: length + frame.extra], torch.cat(wanted))
    found.sum().backward()
    assert prompts.grad is not None
    assert (prompts.grad == len(lengths) * (1 + after)).all()


def test_what_a_place_held_before_gets_no_gradient() -> None:
    x = torch.randn(2, 5, 3, requires_grad=True)
    places = Frame(2).places(together([5, 5], 5, CPU)[0], [3, 3], 5, CPU)
    overwrite(x, places, torch.zeros(2, 3)).sum().backward()
    assert x.grad is not None and not x.grad[:, :2].any() and (x.grad[:, 2:] == 1).all()


def test_no_prompts_are_no_prompts() -> None:
    assert check_prompts(None, (4, 8)) is None
    given = [torch.zeros(2, 4), torch.zeros(2, 8)]
    kept = check_prompts(given, (4, 8))
    assert kept is not None and all(a is b for a, b in zip(kept, given, strict=True))
    with pytest.raises(RecipeError, match=r"layer 1 must be floating point \(2, 8\), got \(2, 4\)"):
        check_prompts([given[0], given[0]], (4, 8))
