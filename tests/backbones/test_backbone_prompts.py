"""Prompts in every backbone: against plain references, by pieces, recomputed, packed, refused."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbone_stubs import BUILDS, blocks_of, build, clips, prompts_of, tokens_of
from kernel_stubs import convolve, scan
from torch import Tensor

from fmrizoo.backbones import NeuroMamba, mamba2, mamba2_kernels
from fmrizoo.errors import RecipeError
from fmrizoo.layers import pieces
from fmrizoo.layers.ragged import Pack
from fmrizoo.types import Backbone

SWINS = ["swin4d", "swin_factorized", "spatial_first"]
MAMBAS = ["neuromamba", "both_ways", "padded"]
MODES = ["none", "block", "window-chunk"]


def results(
    backbone: Backbone, prompts: list[Tensor], causal: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Features of all stages, and gradients of prompts and parameters."""
    stages = backbone.encode_stages(tokens_of(backbone, 3), causal=causal, prompts=prompts)
    torch.manual_seed(3)
    loss = sum((f.values.float() * torch.randn(f.values.shape)).sum() for f in stages)
    wanted = [*prompts, *(p for p in backbone.parameters() if p.requires_grad)]
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [f.values for f in stages], [
        torch.zeros_like(p) if g is None else g for g, p in zip(gradients, wanted, strict=True)
    ]


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= tolerance * b.norm().clamp(min=1e-6), (a - b).abs().max()


# --- NeuroMamba: every clip by itself, block by block ---------------------------------------------


def alone(backbone: NeuroMamba, prompts: list[Tensor]) -> list[list[Tensor]]:
    """Features of every stage and clip, with the sequence put together anew for each block."""
    tokens = tokens_of(backbone, 3)
    placed = backbone._placed(tokens.values, tokens.where)  # type: ignore[attr-defined]
    count, both = len(prompts[0]), backbone.config.bidirectional
    kept: list[list[Tensor]] = [[] for _ in backbone._blocks()]
    for sample, valid in zip(placed, tokens.valid, strict=True):
        x = sample[valid]
        for number, (block, prompt) in enumerate(zip(backbone._blocks(), prompts, strict=True)):
            around = [prompt, x, prompt] if both else [prompt, x]
            x = block(torch.cat(around).unsqueeze(0), Pack())[0, count : count + len(x)]
            last = number + 1 == len(backbone.blocks)
            kept[number].append(backbone.norm(x) if last else x)
    return kept


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", MAMBAS)
def test_a_prefix_that_every_block_finds_anew(kind: str, mode: str) -> None:
    """fp64, relative 1e-9; clips of unequal length in a batch against each by itself."""
    backbone = build(kind).double()
    assert isinstance(backbone, NeuroMamba)
    backbone.set_checkpointing(mode)
    prompts = prompts_of(backbone)
    tokens = tokens_of(backbone, 3)
    stages = backbone.encode_stages(tokens, prompts=prompts)
    wanted = alone(backbone, prompts)
    found_loss = wanted_loss = torch.zeros((), dtype=torch.float64)
    for features, by_clip in zip(stages, wanted, strict=True):
        assert features.values.shape[1] == tokens.values.shape[1]
        assert not features.values[~tokens.valid].any()
        values = torch.cat([v[m] for v, m in zip(features.values, tokens.valid, strict=True)])
        expected = torch.cat(by_clip)
        torch.testing.assert_close(values, expected, atol=1e-11, rtol=1e-9)
        weight = torch.randn_like(expected)
        found_loss = found_loss + (values * weight).sum()
        wanted_loss = wanted_loss + (expected * weight).sum()
    leaves = [*prompts, *backbone.parameters()]
    found, expected_gradients = (
        list(torch.autograd.grad(loss, leaves)) for loss in (found_loss, wanted_loss)
    )
    close(found, expected_gradients, 1e-9)


def test_packs_of_several_sequences_get_their_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of the CUDA kernels, on plain functions in their place; fp64, 1e-9."""
    wanted = results(build("neuromamba").double(), prompts := prompts_of(build("padded").double()))
    stubs = {
        "causal_conv1d": SimpleNamespace(causal_conv1d_fn=convolve),
        "mamba_ssm.ops.triton.ssd_combined": SimpleNamespace(mamba_chunk_scan_combined=scan),
    }
    load = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: stubs.get(name) or load(name))
    monkeypatch.setattr(mamba2_kernels, "missing_kernels", lambda: [])
    monkeypatch.setattr(mamba2, "run_kernels", mamba2_kernels.compute)
    for mode in MODES:
        backbone = build("neuromamba", scan_backend="mamba_ssm").double()
        backbone.set_checkpointing(mode)
        assert isinstance(backbone, NeuroMamba) and backbone.scan_backend == "mamba_ssm"
        found = results(backbone, prompts)
        for a, b in zip(found, wanted, strict=True):
            close(a, b, 1e-9)


# --- all backbones --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDS)
def test_prompts_reach_every_feature_and_get_gradients(kind: str) -> None:
    backbone = build(kind)
    assert "prompts" in backbone.supports(backbone.config)  # type: ignore[arg-type]
    tokens, prompts = tokens_of(backbone), prompts_of(backbone)
    plain = backbone.encode(tokens).values
    found = backbone.encode_stages(tokens, (-1,), prompts=prompts)[0]
    assert found.values.shape == plain.shape
    assert (found.values != plain).any(-1)[tokens.valid[:, : plain.shape[1]]].all()
    for gradient in torch.autograd.grad(found.values.square().sum(), prompts):
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("causal", [False, True])
def test_pieces_and_recomputing_change_nothing(
    kind: str, dtype: torch.dtype, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mode, whole and in many pieces: fp32 within 1e-5, bf16 within 2 % in norm.

    In bf16 autograd adds a weight's gradients of many tiny pieces in bf16: within 15 %. Prompts'
    are added in fp32. Also with the model frozen, where prompts alone want a gradient.
    """
    if causal and kind == "both_ways":
        return  # refused
    tolerance, of_weights = (1e-5, 1e-5) if dtype == torch.float32 else (0.02, 0.15)
    backbone = build(kind).to(dtype)
    prompts, count = prompts_of(backbone), len(backbone.prompt_widths())
    values, gradients = results(backbone, prompts, causal)
    for mode, small, frozen in itertools.product(MODES, (False, True), (False, True)):
        if small and kind in MAMBAS:
            continue  # has slices, not pieces
        monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000 if small else 1 << 23)
        backbone.set_checkpointing(mode)
        found = results(backbone.requires_grad_(not frozen), prompts, causal)
        close(found[0], values, tolerance)
        close(found[1][:count], gradients[:count], tolerance)
        if not frozen:
            close(found[1][count:], gradients[count:], of_weights)


@pytest.mark.parametrize("kind", BUILDS)
def test_frozen_or_trained_prompts_get_the_same_bits(kind: str) -> None:
    backbone = build(kind)
    for mode in MODES:
        backbone.set_checkpointing(mode)
        found = []
        for trained in (True, False):
            backbone.requires_grad_(trained)
            values, gradients = results(backbone, prompts := prompts_of(backbone))
            found.append((values, gradients[: len(prompts)]))
        for a, b in zip(*found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", BUILDS)
def test_a_clip_with_prompts_does_not_depend_on_its_batch_mates(kind: str) -> None:
    backbone = build(kind).eval()
    bold, mask = clips(3)
    prompts = prompts_of(backbone)

    def features(part: slice) -> Tensor:
        tokens = backbone.tokenize(bold[part], mask[part])
        return backbone.encode_stages(tokens, (-1,), prompts=prompts)[0].to_grid()

    together = features(slice(0, 3))
    for clip in range(3):
        torch.testing.assert_close(
            together[[clip]], features(slice(clip, clip + 1)), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [k for k in BUILDS if k != "both_ways"])
def test_prompts_do_not_carry_the_future_into_the_past(kind: str, dtype: torch.dtype) -> None:
    """No bit of what is earlier."""
    backbone = build(kind).eval().to(dtype)
    prompts = prompts_of(backbone)
    tokens = tokens_of(backbone, 1)
    index = tokens.index[0, :, 3]
    if backbone.causal_unit == "token":
        index = torch.arange(tokens.values.shape[1])
    first = backbone.encode_stages(tokens, (-1,), causal=True, prompts=prompts)[0]
    order = first.index[0, :, 3] if backbone.causal_unit == "time" else index
    for last in (0, 2, int(index.max()) - 1):
        values = torch.where((index > last)[None, :, None], 9.0, tokens.values).to(dtype)
        second = backbone.encode_stages(
            tokens.with_values(values), (-1,), causal=True, prompts=prompts
        )[0]
        assert torch.equal(first.values[:, order <= last], second.values[:, order <= last])
        assert not torch.equal(first.values[:, order > last], second.values[:, order > last])


@pytest.mark.parametrize("kind", SWINS)
def test_a_block_makes_keys_of_its_prompts_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with many pieces that are recomputed."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 6000)
    backbone = build(kind)
    backbone.set_checkpointing("window-chunk")
    prompts, calls = prompts_of(backbone), []
    for block in blocks_of(backbone):
        block.norm1.register_forward_hook(lambda m, given, out: calls.append(len(given[0])))
    stages = backbone.encode_stages(tokens_of(backbone), prompts=prompts)
    stages[-1].values.sum().backward()
    assert calls.count(len(prompts[0])) == len(prompts)
    assert len(calls) > 3 * len(prompts)


@pytest.mark.parametrize("kind", SWINS)
def test_prompts_with_attention_dropout(kind: str) -> None:
    """Training draws anew; the fused kernel serves bf16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        backbone = build(kind, attn_drop_rate=0.3, drop_rate=0.1, drop_path_rate=0.1).to(dtype)
        prompts, found = prompts_of(backbone), []
        for mode in MODES:
            backbone.set_checkpointing(mode)
            torch.manual_seed(5)
            values, gradients = results(backbone, prompts)
            assert all(t.isfinite().all() for t in (*values, *gradients))
            found.append((values, gradients))
        for a, b in zip(found[0], found[1], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        tokens = tokens_of(backbone)
        first, second = (backbone.encode_stages(tokens, prompts=prompts)[-1] for _ in range(2))
        assert not torch.equal(first.values, second.values)


@pytest.mark.parametrize("kind", BUILDS)
def test_wide_prompts_in_a_narrow_model(kind: str) -> None:
    """fp32 prompts before a bf16 model, and under autocast: fp32 gradients, within 10 % in norm."""
    exact = gradients_of(build(kind), prompts := prompts_of(build(kind)))
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients_of(build(kind), prompts)
    for found in (cast, gradients_of(build(kind).bfloat16(), prompts)):
        for a, b in zip(found, exact, strict=True):
            assert a.dtype == torch.float32 and (a - b).norm() < 0.1 * b.norm()


def gradients_of(backbone: Backbone, prompts: list[Tensor]) -> tuple[Tensor, ...]:
    values = backbone.encode_stages(tokens_of(backbone), (-1,), prompts=prompts)[0].values
    torch.manual_seed(3)
    return torch.autograd.grad((values.float() * torch.randn(values.shape)).sum(), prompts)


Change = Callable[[list[Tensor]], list[Any]]


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:-1], r"has \d+ layers and needs prompts for each, got \d+"),
        (lambda p: [], r"has \d+ layers and needs prompts for each, got 0"),
        (lambda p: [p[0], p[1][:2], *p[2:]], r"prompts of layer 1 must be .*\(3, \d+\), got \(2,"),
        (lambda p: [t[:, :-1] for t in p], r"prompts of layer 0 must be .*\(3, \d+\), got \(3,"),
        (lambda p: [t[:0] for t in p], r"prompts of layer 0 must be .*p ≥ 1"),
        (lambda p: [t[0] for t in p], r"prompts of layer 0 must be"),
        (lambda p: [t.sum() for t in p], r"prompts of layer 0 must be"),
        (lambda p: [t.long() for t in p], r"must be floating point .* torch.int64"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(kind: str, change: Change, message: str) -> None:
    backbone = build(kind)
    with pytest.raises(RecipeError, match=message):
        backbone.encode_stages(tokens_of(backbone), prompts=change(prompts_of(backbone)))
