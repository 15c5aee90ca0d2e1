"""Patch embedding against the definition, on both of its paths."""

from __future__ import annotations

import itertools

import pytest
import torch

from fmrizoo.errors import DataError
from fmrizoo.layers import patches
from fmrizoo.layers.patches import Brain, PatchEmbed, background_value, pad_to, patch_share
from fmrizoo.types import Grid


def by_definition(embed: PatchEmbed, bold: torch.Tensor) -> torch.Tensor:
    """Token by token; features ordered px, py, pz, pt, c with c fastest."""
    px, py, pz, pt = embed.patch
    b, _, x, y, z, t = bold.shape
    grid = [range(x // px), range(y // py), range(z // pz), range(t // pt)]
    tokens = []
    for i, j, k, m in itertools.product(*grid):
        box = bold[
            :,
            :,
            i * px : (i + 1) * px,
            j * py : (j + 1) * py,
            k * pz : (k + 1) * pz,
            m * pt : (m + 1) * pt,
        ]
        tokens.append(box.permute(0, 2, 3, 4, 5, 1).reshape(b, -1))
    return embed.norm(torch.stack(tokens, 1) @ embed.fc.weight.t() + embed.fc.bias)


@pytest.mark.parametrize("slab_bytes", [1, 2000, 1 << 22])
@pytest.mark.parametrize(("patch", "channels"), [((3, 2, 2, 1), 1), ((2, 2, 4, 2), 2)])
def test_embedding_and_gradients_equal_the_definition(
    patch: tuple[int, int, int, int],
    channels: int,
    slab_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patches, "SLAB_BYTES", slab_bytes)
    torch.manual_seed(0)
    embed = PatchEmbed(patch, channels, 5, norm=True).double()
    bold = torch.randn(3, channels, 6, 4, 8, 4, dtype=torch.float64, requires_grad=True)
    expected = by_definition(embed, bold)
    weight = torch.randn_like(expected)
    names = [bold, embed.fc.weight, embed.fc.bias]
    wanted = torch.autograd.grad((expected * weight).sum(), names)
    time_first = bold.permute(0, 1, 5, 2, 3, 4).contiguous().permute(0, 1, 3, 4, 5, 2)
    for clip in (bold, time_first):
        found = embed(clip)
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad((found * weight).sum(), names), wanted, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(embed.norm(embed._convolve(bold)), expected)


@pytest.mark.parametrize("slab_bytes", [1, 2000, 1 << 22])
@pytest.mark.parametrize("patch", [(3, 2, 2, 1), (2, 2, 4, 2), (1, 1, 1, 1)])
def test_what_lies_outside_the_brain_is_read_as_the_background(
    patch: tuple[int, int, int, int], slab_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "SLAB_BYTES", slab_bytes)
    torch.manual_seed(0)
    channels = 1 if patch == (1, 1, 1, 1) else 2
    embed = PatchEmbed(patch, channels, 5, norm=True).double()
    bold = torch.randn(3, channels, 6, 4, 8, 4, dtype=torch.float64, requires_grad=True)
    brain = Brain(torch.rand(3, 6, 4, 8) > 0.4, torch.tensor([-1.0, 2.0, 0.5]))
    filled = brain.fill(bold)
    assert set(filled[1][:, ~brain.mask[1]].unique().tolist()) == {2.0}
    before = bold.detach().clone()
    expected = by_definition(embed, filled)
    weight = torch.randn_like(expected)
    names = [bold, embed.fc.weight, embed.fc.bias]
    wanted = torch.autograd.grad((expected * weight).sum(), names)
    found = embed(bold, brain)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), names), wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(bold, before), "the clip itself stays as it is"
    noise = torch.where(brain.mask[:, None, ..., None], bold, torch.nan)
    assert torch.equal(embed(noise, brain), found)


def test_background_is_the_lowest_value_of_the_first_frame_inside_the_brain() -> None:
    bold = torch.arange(2 * 8.0).view(2, 1, 2, 2, 2, 1).repeat(1, 1, 1, 1, 1, 2)
    bold[..., 1] = -99.0  # later frames have no say
    mask = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    mask[1, 0] = False
    assert background_value(bold, mask).tolist() == [0.0, 12.0]
    assert background_value(bold, None).tolist() == [0.0, 8.0]
    assert background_value(bold, torch.zeros_like(mask)).tolist() == [0.0, 0.0]


def test_padding_is_the_background_of_each_clip() -> None:
    bold = torch.arange(2 * 8.0).view(2, 1, 2, 2, 2, 1)
    mask = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    background = torch.tensor([0.0, 12.0])
    padded, wider = pad_to(bold, mask, Grid(3, 2, 2, 1), background)
    assert wider is not None and wider.shape == (2, 3, 2, 2)
    assert padded[1, 0, 2].unique().tolist() == [12.0]
    assert not wider[:, 2].any()
    assert torch.equal(padded[:, :, :2], bold)
    same, _ = pad_to(bold, mask, Grid(2, 2, 2, 1), background)
    assert same is bold


def test_clips_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="larger than the model's grid"):
        pad_to(torch.zeros(1, 1, 4, 2, 2, 1), None, Grid(3, 2, 2, 1), torch.zeros(1))
    with pytest.raises(DataError, match="2 frames, expected 3"):
        pad_to(torch.zeros(1, 1, 2, 2, 2, 2), None, Grid(3, 2, 2, 3), torch.zeros(1))


def test_share_of_brain_in_each_patch() -> None:
    mask = torch.zeros(1, 4, 2, 2, dtype=torch.bool)
    mask[0, :2, 0, 0] = True
    assert patch_share(mask, (2, 2, 2, 1)).flatten().tolist() == [0.25, 0.0]
