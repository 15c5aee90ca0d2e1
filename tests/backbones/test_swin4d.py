"""swin4d against the original SwiFT (fixture) and against a plain transcription of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fmrizoo.backbones.swin4d import Swin4D, Swin4DConfig, stage_grids
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.layers import pieces
from fmrizoo.layers.swin import SwinBlock
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


@pytest.mark.parametrize("piece_bytes", [1, 20_000, 1 << 23])
def test_checkpointing_changes_no_gradient(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
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
    gradients = {}
    for mode in ("none", "block", "window-chunk"):
        backbone.zero_grad()
        backbone.set_checkpointing(mode)
        backbone(bold).values.square().mean().backward()
        gradients[mode] = [p.grad.clone() for p in backbone.parameters() if p.grad is not None]
    for mode in ("block", "window-chunk"):
        for a, b in zip(gradients["none"], gradients[mode], strict=True):
            assert torch.equal(a, b), mode
    with pytest.raises(RecipeError, match="checkpointing"):
        backbone.set_checkpointing("all")


@pytest.mark.parametrize("piece_bytes", [1, 1 << 23])
def test_stochastic_depth_drops_whole_samples_and_only_in_training(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)  # also with a sample in many pieces
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
    chosen = torch.arange(6).remainder(2).float().view(1, 6, 1).expand(2, -1, -1)
    monkeypatch.setattr(SwinBlock, "draw_paths", lambda block, batch, x: chosen)
    mixed = backbone(bold).values
    monkeypatch.setattr(SwinBlock, "draw_paths", lambda block, batch, x: torch.zeros(2, batch, 1))
    torch.testing.assert_close(mixed[::2], backbone(bold[::2]).values, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(SwinBlock, "draw_paths", lambda block, batch, x: None)
    torch.testing.assert_close(mixed[1::2], backbone(bold[1::2]).values, atol=1e-6, rtol=1e-5)
    monkeypatch.undo()
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


SMALL: dict[str, Any] = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]}


def test_a_clip_smaller_than_the_grid_is_padded_with_its_background() -> None:
    torch.manual_seed(0)
    config = Swin4DConfig(img_size=[7, 8, 5, 4], patch_size=[2, 2, 2, 1], **SMALL)
    backbone = Swin4D(config).eval()
    mask = torch.zeros(1, 7, 8, 5, dtype=torch.bool)
    mask[:, 1:5, 1:5, 1:4] = True
    bold = torch.randn(1, 1, 7, 8, 5, 4)
    lowest = bold[..., 0][mask[:, None]].min()
    for given, value in ((None, lowest), (torch.tensor([-3.0]), torch.tensor(-3.0))):
        padded = torch.full((1, 1, *backbone.clip_grid), float(value))
        padded[:, :, :7, :8, :5] = torch.where(mask[:, None, ..., None], bold, value)
        tokens = backbone.tokenize(bold, mask, background=given)
        torch.testing.assert_close(backbone.encode(tokens).values, backbone(padded).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outside_the_mask_changes_a_feature(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = Swin4DConfig(img_size=[7, 8, 6, 4], patch_size=[2, 2, 2, 2], **SMALL)
    backbone = Swin4D(config).eval().to(dtype)
    mask = torch.rand(2, 7, 8, 6) > 0.5
    bold = torch.randn(2, 1, 7, 8, 6, 4).to(dtype)
    other = torch.where(mask[:, None, ..., None], bold, 9 * torch.randn_like(bold))
    other[0, 0, ..., 0][~mask[0]] = torch.nan
    for background in (None, torch.tensor([-1.0, 0.5])):
        a, b = (
            backbone.encode(backbone.tokenize(clip, mask, background=background)).values
            for clip in (bold, other)
        )
        assert torch.equal(a, b)
    assert not torch.equal(backbone(bold).values, a)


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
    torch.manual_seed(0)
    # Shifted in space and time in stage 1; the last stage has all of space in a window.
    size = {"img_size": [12, 7, 8, slots * patch], "patch_size": [2, 2, 2, patch]}
    backbone = Swin4D(Swin4DConfig(**size, **SMALL)).eval().to(dtype)
    assert backbone.supports(backbone.config) == {"causal", "prompts"}
    mask = torch.rand(2, 12, 7, 8) > 0.3
    bold = torch.randn(2, 1, *size["img_size"]).to(dtype)
    backbone.set_checkpointing("window-chunk")

    def features(clip: torch.Tensor, grad: bool, causal: bool = True) -> torch.Tensor:
        with torch.set_grad_enabled(grad):
            return backbone.encode(backbone.tokenize(clip, mask), causal=causal).to_grid()

    whole = features(bold, False)
    for last in range(slots - 1):
        changed = bold.clone()
        changed[..., (last + 1) * patch :] = 30 * torch.randn_like(
            changed[..., (last + 1) * patch :]
        )
        found = features(changed, False)
        assert torch.equal(found[..., : last + 1], whole[..., : last + 1])
        assert not torch.equal(found[..., last + 1 :], whole[..., last + 1 :])
        assert torch.equal(features(changed, True)[..., : last + 1], found[..., : last + 1])
    assert not torch.equal(features(bold, False, causal=False)[..., 0], whole[..., 0])


@pytest.mark.parametrize("values", CONFIGS)
def test_causal_outputs_and_gradients_equal_the_plain_transcription(values: dict[str, Any]) -> None:
    """fp64, 1e-10. The reference adds −∞ to the logits of later keys."""
    torch.manual_seed(0)
    config = Swin4DConfig(patch_size=[2, 2, 2, 1], **{**SMALL, **values})
    ours, reference = Swin4D(config).double(), plain(config).double()
    reference.load_state_dict(ours.state_dict())
    for block in (m for m in reference.modules() if hasattr(m, "window")):
        look_no_further(block)
    bold = torch.randn(2, 1, *config.img_size, dtype=torch.float64, requires_grad=True)
    a = ours.encode(ours.tokenize(bold), causal=True).to_grid()
    b = reference(bold)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    weight = torch.randn_like(a)
    (d_a,), (d_b,) = (torch.autograd.grad((v * weight).sum(), bold) for v in (a, b))
    torch.testing.assert_close(d_a, d_b, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("values", CONFIGS)
def test_prompts_equal_those_of_the_plain_transcription(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp64, features 1e-10, gradients 1e-9. The reference sets them before every window's keys."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    torch.manual_seed(0)
    config = Swin4DConfig(patch_size=[2, 2, 2, 1], **{**SMALL, **values})
    ours, reference = Swin4D(config).double(), plain(config).double()
    reference.load_state_dict(ours.state_dict())
    ours.set_checkpointing("window-chunk")
    prompts = [
        torch.randn(3, width, dtype=torch.float64, requires_grad=True)
        for width in ours.prompt_widths()
    ]
    blocks = [m for m in reference.modules() if hasattr(m, "window")]
    for block, prompt in zip(blocks, prompts, strict=True):
        show(block, prompt)
    bold = torch.randn(2, 1, *config.img_size, dtype=torch.float64, requires_grad=True)
    a = ours.encode_stages(ours.tokenize(bold), (-1,), prompts=prompts)[0].to_grid()
    b = reference(bold)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    weight = torch.randn_like(a)
    leaves = [bold, *prompts]
    of_theirs = [*leaves, *(p for n, p in sorted(reference.named_parameters()) if "norm1" in n)]
    of_ours = [*leaves, *(p for n, p in sorted(ours.named_parameters()) if "norm1" in n)]
    d_a = torch.autograd.grad((a * weight).sum(), of_ours)
    d_b = torch.autograd.grad((b * weight).sum(), of_theirs)
    for x, y in zip(d_a, d_b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-7)


def show(block: Any, prompts: torch.Tensor) -> None:
    """Make all windows of a plain block attend to ``prompts`` too."""
    attn = block.attn

    def forward(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        windows, tokens, width = x.shape
        count = len(prompts)
        before = block.norm1(prompts).expand(windows, -1, -1)
        qkv = attn.qkv(torch.cat([before, x], 1)).unflatten(-1, (3, attn.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits = q[:, :, count:] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if mask is not None:
            every = mask.to(logits.dtype).repeat(windows // len(mask), 1, 1).unsqueeze(1)
            logits[..., count:] += every
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).reshape(windows, tokens, width)
        return attn.proj(mixed)

    attn.forward = forward


def look_no_further(block: Any) -> None:
    """Make a plain block causal: time runs fastest in its windows."""
    attend = block.attn.forward

    def forward(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        tokens = x.shape[1]
        length = tokens // space
        slot = torch.arange(tokens) % length
        later = torch.zeros(tokens, tokens).masked_fill(slot[None] > slot[:, None], -torch.inf)
        mask = torch.zeros(1, tokens, tokens) if mask is None else mask.clone()
        # Times wrapped to the front of a shifted window come from another region: masked already.
        return attend(x, mask + later)

    def run(x: torch.Tensor) -> torch.Tensor:
        nonlocal space
        space = 1
        for have, window in zip(x.shape[1:4], block.window, strict=False):
            space *= min(have, window)
        return plain_forward(x)

    space, plain_forward = 1, block.forward
    block.attn.forward, block.forward = forward, run


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
