"""swin_factorized against a plain transcription, and the properties that factorizing is for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from fmrizoo.backbones.swin_factorized import (
    FactorizedBlock,
    FactorizedStage,
    SwinFactorized,
    SwinFactorizedConfig,
)
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.layers import pieces
from fmrizoo.layers.swin import SwinBlock
from fmrizoo.types import Grid

SMALL: dict[str, Any] = {
    "patch_size": [2, 2, 2, 1],
    "embed_dim": 12,
    "depths": [4, 4],
    "num_heads": [2, 2],
    "window_size": [2, 2, 2],
    "temporal_window": 4,
}


def model(img_size: list[int], **values: Any) -> SwinFactorized:
    torch.manual_seed(0)
    return SwinFactorized(SwinFactorizedConfig(**{**SMALL, "img_size": img_size, **values}))


# --- a plain transcription: dense attention under a mask, in place of cut windows -----------------


def allowed(grid: tuple[int, ...], window: tuple[int, ...], shifted: bool) -> Tensor:
    """``(n, n)`` pairs of cells that share a window after padding and rolling, and a region."""
    size = [min(g, w) for g, w in zip(grid, window, strict=True)]
    shift = [w // 2 if shifted and g > w else 0 for g, w in zip(grid, window, strict=True)]
    padded = [math.ceil(g / w) * w for g, w in zip(grid, size, strict=True)]
    found = torch.ones(math.prod(grid), math.prod(grid), dtype=torch.bool)
    for axis, (w, s, p) in enumerate(zip(size, shift, padded, strict=True)):
        place = (torch.arange(p) - s) % p  # of each position after the roll
        region = (place >= p - w).int() + (place >= p - s).int() if s else torch.zeros(p)
        label = place // w * 3 + region
        cells = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid))[:, axis]
        found &= label[cells][:, None] == label[cells][None]
    return found


def rotated(x: Tensor, grid: tuple[int, ...], theta: float) -> Tensor:
    """``x (…, n, head_dim)``: channels split over the axes, adjacent ones turned as a pair."""
    places = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid)).double()
    share = x.shape[-1] // len(grid)
    out = x.clone()
    for axis, pair in itertools.product(range(len(grid)), range(share // 2)):
        angle = places[:, axis] * theta ** (-2 * pair / share)
        a, b = (x[..., axis * share + 2 * pair + i] for i in (0, 1))
        out[..., axis * share + 2 * pair] = a * angle.cos() - b * angle.sin()
        out[..., axis * share + 2 * pair + 1] = a * angle.sin() + b * angle.cos()
    return out


def plain_block(
    block: SwinBlock, x: Tensor, grid: tuple[int, ...], mask: Tensor, prompts: Tensor | None = None
) -> Tensor:
    """``x (m, n, d)``, ``n`` cells of ``grid``; ``prompts (p, d)``: keys that all queries see."""
    m, n, d = x.shape
    heads = block.attn.heads
    h = layer_norm(x, (d,), block.norm1.weight, block.norm1.bias)
    h = h @ block.attn.qkv.weight.T + block.attn.qkv.bias
    q, k, v = h.view(m, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    q, k = (rotated(part, grid, 1e4) for part in (q, k))
    if prompts is not None:
        seen = layer_norm(prompts, (d,), block.norm1.weight, block.norm1.bias)
        seen = seen @ block.attn.qkv.weight.T + block.attn.qkv.bias
        _, first_k, first_v = seen.view(1, -1, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        k = torch.cat([first_k.expand(m, -1, -1, -1), k], 2)
        v = torch.cat([first_v.expand(m, -1, -1, -1), v], 2)
        mask = torch.cat([torch.ones(n, len(prompts), dtype=torch.bool), mask], 1)
    logits = q @ k.transpose(-1, -2) / (d // heads) ** 0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    h = (weights @ v).transpose(1, 2).reshape(m, n, d)
    x = x + h @ block.attn.proj.weight.T + block.attn.proj.bias
    h = layer_norm(x, (d,), block.norm2.weight, block.norm2.bias)
    h = gelu(h @ block.mlp.linear1.weight.T + block.mlp.linear1.bias)
    return x + h @ block.mlp.linear2.weight.T + block.mlp.linear2.bias


def plain_stage(
    stage: FactorizedStage,
    x: Tensor,
    config: Any,
    last: bool,
    causal: bool,
    prompts: Iterator[Tensor | None],
) -> Tensor:
    """``x (b, x, y, z, t, d)``."""
    b, *space, t, d = x.shape
    window = space if last and config.last_layer_full_msa else config.window_size
    past = torch.ones(t, t, dtype=torch.bool).tril() if causal else True

    def temporal(block: FactorizedBlock, x: Tensor) -> Tensor:
        rows = x.reshape(-1, t, d)
        for odd, one in enumerate(block.temporal):
            mask = allowed((t,), (config.temporal_window,), bool(odd)) & past
            rows = plain_block(one, rows, (t,), mask, next(prompts))
        return rows.view_as(x)

    def spatial(block: FactorizedBlock, x: Tensor) -> Tensor:
        rows = x.flatten(1, 3).transpose(1, 2).reshape(b * t, -1, d)
        for odd, one in enumerate(block.spatial):
            mask = allowed(tuple(space), tuple(window), bool(odd))
            rows = plain_block(one, rows, tuple(space), mask, next(prompts))
        return rows.view(b, t, -1, d).transpose(1, 2).reshape(x.shape)

    for block in stage.blocks:
        if config.order == "temporal":
            in_time = temporal(block, x)
            x = in_space = spatial(block, in_time)
        else:
            in_space = spatial(block, x)
            x = in_time = temporal(block, in_space)
        if config.residual != "plain":
            joined = in_time + block.weight * in_space
            x = layer_norm(joined, (d,), block.norm.weight, block.norm.bias)
    return x


def transcription(
    backbone: SwinFactorized,
    bold: Tensor,
    causal: bool = False,
    prompts: Sequence[Tensor] | None = None,
) -> Tensor:
    """Features ``(b, d, x, y, z, t)`` of clips that need no padding."""
    config = backbone.config
    given: Iterator[Tensor | None] = itertools.repeat(None) if prompts is None else iter(prompts)
    tokens = backbone.tokenize(bold)
    x = tokens.values.view(len(bold), *tokens.grid, -1)
    for number, stage in enumerate(backbone.layers):
        last = number + 1 == len(backbone.layers)
        x = plain_stage(stage, x, config, last, causal, given)
        if not last:
            steps = [range(2) if g > 1 else range(1) for g in x.shape[1:4]]
            parts = [
                x[:, i :: len(steps[0]), j :: len(steps[1]), k :: len(steps[2])]
                for i, j, k in itertools.product(*steps)
            ]
            x = stage.downsample(torch.cat(parts, -1))
    return backbone.norm(x).permute(0, 5, 1, 2, 3, 4)


CASES: list[dict[str, Any]] = [
    {"img_size": [8, 8, 8, 8]},
    {"img_size": [12, 8, 4, 10], "order": "spatial"},  # windows cut at both ends of time
    {"img_size": [12, 8, 8, 3], "window_size": [4, 3, 2]},  # less time than a window, odd windows
    {"img_size": [20, 16, 2, 5], "last_layer_full_msa": False, "window_size": [3, 4, 4]},
    {"img_size": [8, 4, 4, 6], "residual": "weighted", "residual_weight": 0.5},
    {"img_size": [8, 4, 4, 6], "residual": "layerscale", "order": "spatial", "depths": [8, 4]},
    {"img_size": [8, 8, 4, 12], "patch_size": [2, 2, 2, 2], "depths": [4, 4, 4]},
]
for case in CASES:
    case["num_heads"] = [2] * len(case.get("depths", [4, 4]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("values", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("piece_bytes", [3000, 1 << 23])
def test_outputs_and_gradients_equal_the_plain_transcription(
    values: dict[str, Any], causal: bool, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp64, features within 1e-10, gradients within 1e-9."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    backbone = model(**values).double()
    backbone.set_checkpointing("window-chunk")
    bold = torch.randn(2, 1, *values["img_size"], dtype=torch.float64, requires_grad=True)
    names, weights = zip(*backbone.named_parameters(), strict=True)
    a = backbone.encode(backbone.tokenize(bold), causal=causal).to_grid()
    b = transcription(backbone, bold, causal)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    weight = torch.randn_like(a)
    found = torch.autograd.grad((a * weight).sum(), [bold, *weights])
    wanted = torch.autograd.grad((b * weight).sum(), [bold, *weights])
    for name, x, y in zip(("bold", *names), found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-7, msg=name)
    with torch.no_grad():
        c = backbone.encode(backbone.tokenize(bold), causal=causal).to_grid()
    torch.testing.assert_close(c, a, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("values", CASES, ids=range(len(CASES)))
def test_prompts_equal_those_of_the_plain_transcription(
    values: dict[str, Any], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp64, features within 1e-10, gradients of prompts and parameters within 1e-9."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    backbone = model(**values).double()
    backbone.set_checkpointing("window-chunk")
    prompts = [
        torch.randn(2, width, dtype=torch.float64, requires_grad=True)
        for width in backbone.prompt_widths()
    ]
    bold = torch.randn(2, 1, *values["img_size"], dtype=torch.float64)
    tokens = backbone.tokenize(bold)
    a = backbone.encode_stages(tokens, (-1,), causal=causal, prompts=prompts)[0].to_grid()
    b = transcription(backbone, bold, causal, prompts)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    weight = torch.randn_like(a)
    leaves = [*prompts, *backbone.parameters()]
    found, wanted = (torch.autograd.grad((v * weight).sum(), leaves) for v in (a, b))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-7)


def test_windows_wrap_around_neither_end_of_time() -> None:
    """One block: two temporal layers of 4 slots, the second shifted by 2."""
    backbone = model([4, 4, 4, 12], depths=[4], num_heads=[2]).double()
    bold = torch.randn(1, 1, 4, 4, 4, 12, dtype=torch.float64, requires_grad=True)
    features = backbone(bold).to_grid()
    seen = []
    for slot in range(12):
        (gradient,) = torch.autograd.grad(
            features[..., slot].square().sum(), bold, retain_graph=True
        )
        seen.append(gradient.abs().sum((0, 1, 2, 3, 4)).nonzero()[:, 0].tolist())
    assert seen[0] == seen[1] == [0, 1, 2, 3]
    assert seen[2] == seen[5] == list(range(8))
    assert seen[6] == seen[9] == list(range(4, 12))
    assert seen[10] == seen[11] == [8, 9, 10, 11]


def test_any_number_of_frames_works_also_more_than_trained_on() -> None:
    backbone = model([8, 8, 8, 4]).eval()
    assert backbone.any_length
    long = torch.randn(1, 1, 8, 8, 8, 23)
    found = backbone(long)
    assert found.grid == Grid(2, 2, 2, 23) and bool(found.values.isfinite().all())
    # The first two windows of the two temporal layers end before slot 8: what follows is not seen.
    first = backbone(long[..., :8])
    torch.testing.assert_close(
        found.to_grid()[..., :2], first.to_grid()[..., :2], atol=1e-5, rtol=1e-5
    )
    with pytest.raises(DataError, match="0 frames do not divide"):
        backbone(long[..., :0])
    with pytest.raises(DataError, match="3 frames do not divide into patches of 2"):
        model([8, 8, 8, 4], patch_size=[2, 2, 2, 2])(long[..., :3])


def test_positions_with_equal_coordinate_sums_are_told_apart() -> None:
    """Swapping what lies at (1, 0, 0) and (0, 1, 0) does more than swap the features there."""
    backbone = model([4, 4, 4, 2], depths=[4], num_heads=[2]).double()
    bold = torch.randn(1, 1, 4, 4, 4, 2, dtype=torch.float64)
    swapped = bold.clone()
    swapped[:, :, 2:, :2, :2], swapped[:, :, :2, 2:, :2] = (
        bold[:, :, :2, 2:, :2],
        bold[:, :, 2:, :2, :2],
    )
    a, b = (backbone(clip).to_grid() for clip in (bold, swapped))
    assert (a[:, :, 0, 0, 0] - b[:, :, 0, 0, 0]).abs().max() > 1e-4
    assert (a[:, :, 1, 0, 0] - b[:, :, 0, 1, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("residual", ["plain", "layerscale"])
@pytest.mark.parametrize("piece_bytes", [1, 20_000, 1 << 23])
def test_checkpointing_changes_no_gradient(
    residual: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    backbone = model([8, 8, 8, 6], residual=residual, drop_rate=0.2, drop_path_rate=0.3)
    bold = torch.randn(2, 1, 8, 8, 8, 6)
    gradients = {}
    for mode in ("none", "block", "window-chunk"):
        torch.manual_seed(1)
        backbone.zero_grad()
        backbone.set_checkpointing(mode)
        backbone(bold).values.square().mean().backward()
        gradients[mode] = [p.grad for p in backbone.parameters()]
    for mode in ("block", "window-chunk"):
        for a, b in zip(gradients["none"], gradients[mode], strict=True):
            assert a is not None and b is not None and torch.equal(a, b), mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("slots", [3, 4, 7, 8])
@pytest.mark.parametrize("piece_bytes", [20_000, 1 << 23])
def test_later_frames_change_no_bit_of_earlier_causal_features(
    dtype: torch.dtype,
    patch: int,
    slots: int,
    piece_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    size = [12, 7, 8, slots * patch]
    backbone = model(size, patch_size=[2, 2, 2, patch]).eval().to(dtype)
    assert backbone.supports(backbone.config) == {"causal", "prompts"}
    backbone.set_checkpointing("window-chunk")
    mask = torch.rand(2, 12, 7, 8) > 0.3
    bold = torch.randn(2, 1, *size).to(dtype)

    def features(clip: Tensor, grad: bool, causal: bool = True) -> Tensor:
        with torch.set_grad_enabled(grad):
            return backbone.encode(backbone.tokenize(clip, mask), causal=causal).to_grid()

    whole = features(bold, False)
    for last in range(slots - 1):
        changed = bold.clone()
        later = changed[..., (last + 1) * patch :]
        later.copy_(30 * torch.randn_like(later))
        found = features(changed, False)
        assert torch.equal(found[..., : last + 1], whole[..., : last + 1])
        assert not torch.equal(found[..., last + 1 :], whole[..., last + 1 :])
        assert torch.equal(features(changed, True)[..., : last + 1], found[..., : last + 1])
    assert not torch.equal(features(bold, False, causal=False)[..., 0], whole[..., 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outside_the_mask_changes_a_feature(dtype: torch.dtype) -> None:
    backbone = model([7, 8, 6, 4]).eval().to(dtype)
    mask = torch.rand(2, 7, 8, 6) > 0.5
    bold = torch.randn(2, 1, 7, 8, 6, 4).to(dtype)
    other = torch.where(mask[:, None, ..., None], bold, torch.nan)
    for background in (None, torch.tensor([-1.0, 0.5])):
        a, b = (
            backbone.encode(backbone.tokenize(clip, mask, background=background)).values
            for clip in (bold, other)
        )
        assert torch.equal(a, b)
    assert not torch.equal(backbone(bold).values, a)


@pytest.mark.parametrize("piece_bytes", [1, 1 << 23])
def test_stochastic_depth_drops_whole_samples(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    backbone = model([8, 8, 8, 5], drop_path_rate=0.5)
    bold = torch.randn(1, 1, 8, 8, 8, 5).expand(4, -1, -1, -1, -1, -1)
    assert len({tuple(v.flatten()[:5].tolist()) for v in backbone.train()(bold).values}) > 1
    chosen = torch.arange(4).remainder(2).float().view(1, 4, 1).expand(2, -1, -1)
    monkeypatch.setattr(SwinBlock, "draw_paths", lambda block, batch, x: chosen)
    mixed = backbone(bold).values
    monkeypatch.setattr(SwinBlock, "draw_paths", lambda block, batch, x: torch.zeros(2, batch, 1))
    torch.testing.assert_close(mixed[::2], backbone(bold[::2]).values, atol=1e-6, rtol=1e-5)
    monkeypatch.undo()
    torch.testing.assert_close(
        mixed[1::2], backbone.eval()(bold[1::2]).values, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("size", [[10, 9, 1, 7], [5, 3, 7, 3], [2, 2, 2, 1]])
def test_any_grid_works_and_its_flops_are_those_that_are_run(size: list[int]) -> None:
    """One slice, odd sizes, a single frame; matrix products within 0.1 %."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    patch = [2, 2, 1, 1] if size[2] == 1 else [2, 2, 2, 1]
    backbone = model(size, patch_size=patch).eval()
    clip = torch.randn(1, 1, *size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        features = backbone(clip)
    assert features.grid == backbone.clip_grid.divided(backbone.reduction)
    assert bool(features.values.isfinite().all())
    counted = counter.get_total_flops()
    assert abs(sum(backbone.flops(Grid(*size)).values()) - counted) <= 1e-3 * counted


def test_lower_precision_agrees_with_double() -> None:
    """bf16 within 5 % of the features' spread (root mean square)."""
    backbone = model([8, 8, 8, 7]).eval()
    bold = torch.randn(1, 1, 8, 8, 8, 7)
    exact = backbone.double()(bold.double()).values
    single = backbone.float()(bold).values
    torch.testing.assert_close(single.double(), exact, atol=1e-5, rtol=1e-5)
    rounded = backbone.bfloat16()(bold.bfloat16()).values.double()
    assert (rounded - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_the_largest_size_builds_without_memory() -> None:
    with torch.device("meta"):
        big = SwinFactorized(
            SwinFactorizedConfig(embed_dim=1440, depths=[4, 4, 20, 4], num_heads=[24, 48, 96, 192])
        )
    assert sum(p.numel() for p in big.parameters()) > 10e9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": [5, 6, 12, 24]}, "does not divide the width 36"),
        ({"num_heads": [3, 6, 12, 36]}, r"num_heads\[3\]=36 leaves 8 channels .* multiple of 6"),
        ({"depths": [2, 4, 8, 4]}, "multiples of 4"),
        ({"depths": [4, 4]}, "one number per stage"),
        ({"img_size": [96, 96, 96, 21], "patch_size": [6, 6, 6, 2]}, "does not divide into"),
        ({"img_size": [96, 96, 96, 1], "patch_size": [6, 6, 6, 2]}, "does not divide into"),
        ({"window_size": [4, 4, 4, 4]}, "three positive numbers"),
        ({"temporal_window": 0}, "temporal_window must be > 0"),
        ({"order": "time"}, "order must be one of temporal, spatial, got 'time'"),
        ({"residual": "sum"}, "residual must be one of plain, weighted, layerscale"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\)"),
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SwinFactorizedConfig(**values)
