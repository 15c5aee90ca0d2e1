"""swin4d against the original SwiFT (fixture) and against a plain transcription of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fmrizoo.backbones.swin4d import Swin4D, Swin4DConfig, stage_grids
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.types import Grid
from fmrizoo.weights.swift import load_swift

ROOT = Path(__file__).resolve().parents[2]
CASES: dict[str, Any] = torch.load(
    ROOT / "tests/fixtures/swift_parity_fixture.pt", weights_only=True
)["cases"]


def plain(config: Swin4DConfig) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("plain", ROOT / "benchmarks/plain_swin4d.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PlainSwin4D(config)


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_those_of_the_original(case: str) -> None:
    """fp32 within 2e-4, fp64 within 1e-9, absolute."""
    stored = CASES[case]
    bold = stored["input"]
    bold = CASES[bold[1:]]["input"] if isinstance(bold, str) else bold
    backbone = load_swift(stored["state_dict"], stored["config"])
    with torch.no_grad():
        single = backbone(bold.float()).to_grid()
        double = backbone.double()(bold.double()).to_grid()
    torch.testing.assert_close(single, stored["output"], atol=2e-4, rtol=0)
    torch.testing.assert_close(double, stored["output_fp64"], atol=1e-9, rtol=0)


# Grids with padding, odd windows, single-patch axes, no shift in some axes, full last stage.
CONFIGS = [
    {"img_size": [8, 8, 8, 6], "window_size": [4, 4, 4, 4]},
    {"img_size": [16, 12, 8, 5], "window_size": [3, 2, 3, 3], "last_layer_full_msa": False},
    {"img_size": [12, 8, 4, 7], "window_size": [5, 4, 4, 3], "first_window_size": None},
    {
        "img_size": [16, 8, 8, 8],
        "window_size": [4, 4, 4, 4],
        "depths": [2, 2, 2],
        "num_heads": [2, 2, 4],
    },
]


@pytest.mark.parametrize("values", CONFIGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_and_gradients_equal_the_plain_transcription(
    values: dict[str, Any], batch: int
) -> None:
    torch.manual_seed(0)
    config = Swin4DConfig(
        patch_size=[2, 2, 2, 1],
        embed_dim=8,
        **{"depths": [2, 2], "num_heads": [2, 4], **values},
    )
    ours, reference = Swin4D(config).double(), plain(config).double()
    reference.load_state_dict(ours.state_dict())
    bold = torch.randn(batch, 1, *config.img_size, dtype=torch.float64, requires_grad=True)
    twin = bold.detach().clone().requires_grad_()
    a, b = ours(bold).to_grid(), reference(twin)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(bold.grad, twin.grad, atol=1e-9, rtol=1e-7)
    theirs = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        q = theirs[name]
        if p.grad is None:
            assert name.startswith("norm.")
            continue
        torch.testing.assert_close(p.grad, q.grad, atol=1e-9, rtol=1e-7, msg=name)


def test_released_configurations_have_the_published_parameter_counts() -> None:
    released = Swin4D(Swin4DConfig())
    other = Swin4D(
        Swin4DConfig(embed_dim=24, first_window_size=[2, 2, 2, 2], last_layer_full_msa=False)
    )
    counts = [sum(p.numel() for p in m.parameters()) for m in (released, other)]
    assert counts == [4_315_212, 1_971_336]


def test_block_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    config = Swin4DConfig(
        img_size=[8, 8, 8, 4],
        patch_size=[2, 2, 2, 1],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[1, 2],
    )
    backbone = Swin4D(config)
    bold = torch.randn(1, 1, 8, 8, 8, 4)
    gradients = []
    for mode in ("none", "block"):
        backbone.zero_grad()
        backbone.set_checkpointing(mode)
        backbone(bold).values.square().mean().backward()
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
    with pytest.raises(RecipeError, match="checkpointing"):
        backbone.set_checkpointing("all")


def test_stochastic_depth_drops_whole_samples_and_only_in_training() -> None:
    torch.manual_seed(0)
    config = Swin4DConfig(
        img_size=[8, 8, 8, 4],
        patch_size=[2, 2, 2, 1],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[1, 2],
        drop_path_rate=0.5,
    )
    backbone = Swin4D(config)
    bold = torch.randn(1, 1, 8, 8, 8, 4).expand(6, -1, -1, -1, -1, -1)
    values = backbone.train()(bold).values
    distinct = {tuple(v.flatten()[:5].tolist()) for v in values}
    assert 1 < len(distinct) <= 6, "equal clips must take different paths"
    values = backbone.eval()(bold).values
    torch.testing.assert_close(values, values[:1].expand_as(values), atol=1e-6, rtol=1e-5)


def test_grid_is_padded_so_that_every_merge_comes_out_even() -> None:
    config = Swin4DConfig(
        img_size=[40, 22, 1, 8],
        patch_size=[5, 5, 1, 1],
        depths=[2, 2, 2],
        num_heads=[3, 6, 12],
        embed_dim=12,
    )
    assert stage_grids(config) == [Grid(8, 8, 1, 8), Grid(4, 4, 1, 8), Grid(2, 2, 1, 8)]
    small = Swin4DConfig(
        img_size=[10, 10, 10, 8],
        patch_size=[2, 2, 2, 1],
        embed_dim=12,
        depths=[1, 1, 1, 1, 1],
        num_heads=[3, 6, 12, 12, 12],
    )
    assert [g.x for g in stage_grids(small)] == [8, 4, 2, 1, 1]


def test_a_clip_smaller_than_the_grid_is_padded_with_its_background() -> None:
    torch.manual_seed(0)
    config = Swin4DConfig(
        img_size=[7, 8, 5, 4],
        patch_size=[2, 2, 2, 1],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[1, 2],
    )
    backbone = Swin4D(config).eval()
    mask = torch.zeros(1, 7, 8, 5, dtype=torch.bool)
    mask[:, 1:5, 1:5, 1:4] = True
    bold = torch.where(mask[:, None, ..., None], torch.randn(1, 1, 7, 8, 5, 4), -3.0)
    padded = torch.full((1, 1, *backbone.clip_grid), -3.0)
    padded[:, :, :7, :8, :5] = bold
    torch.testing.assert_close(backbone(bold, mask).values, backbone(padded).values)


def test_shorter_clips_use_the_first_times_and_longer_ones_are_refused() -> None:
    torch.manual_seed(0)
    config = Swin4DConfig(
        img_size=[8, 8, 8, 6],
        patch_size=[2, 2, 2, 2],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[1, 2],
    )
    backbone = Swin4D(config)
    assert backbone(torch.randn(1, 1, 8, 8, 8, 4)).grid == Grid(2, 2, 2, 2)
    with pytest.raises(DataError, match="time table"):
        backbone(torch.randn(1, 1, 8, 8, 8, 8))
    with pytest.raises(DataError, match="divide"):
        backbone(torch.randn(1, 1, 8, 8, 8, 5))
    with pytest.raises(DataError, match="must be"):
        backbone(torch.randn(1, 2, 8, 8, 8, 4))
    with pytest.raises(RecipeError, match="both ways"):
        backbone.encode(backbone.tokenize(torch.randn(1, 1, 8, 8, 8, 4)), causal=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": [5, 6, 12, 24]}, "does not divide the width 36"),
        ({"depths": [2, 2]}, "one number per stage"),
        ({"img_size": [96, 96, 96, 21], "patch_size": [6, 6, 6, 2]}, "does not divide into"),
        ({"patch_size": [6, 6, 6]}, "four positive numbers"),
        ({"first_window_size": [2, 2]}, "four positive numbers"),
        ({"first_window_size": [0, 0, 0, 0]}, "four positive numbers"),
        ({"embed_dim": 0}, "embed_dim must be > 0"),
        ({"depths": [2, 0, 6, 2]}, "all be ≥ 1"),
        ({"drop_rate": 3.0}, r"drop_rate must be in \[0, 1\)"),
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Swin4DConfig(**values)
