"""Attention inside windows against the definition, both kernels, with and without a look ahead."""

from __future__ import annotations

import pytest
import torch

from fmrizoo.layers import attention
from fmrizoo.layers.attention import Windows, attend_windows
from fmrizoo.layers.windows import Group

DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
# Space-time windows, a window of one slot, a pure-time window; then slices of blocks of rows.
SPLITS = [
    Windows((Group(5, 12, 4), Group(3, 12, 2), Group(3, 4, 1), Group(2, 4, 4))),
    Windows((Group(1, 3, 3), Group(1, 5, 5), Group(1, 1, 1)), outer=4),
]


def explicit(
    qkv: torch.Tensor,
    windows: Windows,
    heads: int,
    causal: bool,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention window by window, head by head, from the definition.

    ``seen (p, 2 · d)``: keys and values of prompts, before those of every window.
    """
    width = qkv.shape[1] // 3
    size = width // heads
    out, start = [], 0
    for _ in range(windows.outer):
        for count, tokens, slots in windows.groups:
            for _ in range(count):
                rows = qkv[start : start + tokens].view(tokens, 3, heads, size)
                q, k, v = rows.permute(1, 2, 0, 3)
                count = 0 if seen is None else len(seen)
                if seen is not None:
                    first = seen.view(count, 2, heads, size).permute(1, 2, 0, 3)
                    k, v = (torch.cat(both, 1) for both in zip(first, (k, v), strict=True))
                logits = q @ k.transpose(1, 2) * size**-0.5
                if causal:
                    slot = torch.arange(tokens) % slots
                    later = torch.zeros(tokens, count + tokens, dtype=torch.bool)
                    later[:, count:] = slot[None] > slot[:, None]
                    logits = logits.masked_fill(later, -torch.inf)
                weights = torch.softmax(logits, -1)
                out.append((weights @ v).transpose(0, 1).reshape(tokens, width))
                start += tokens
    assert start == len(qkv)
    return torch.cat(out)


def rows_of(windows: Windows) -> int:
    return windows.outer * sum(count * tokens for count, tokens, _ in windows.groups)


@pytest.mark.parametrize("prompts", [0, 1, 5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("windows", SPLITS, ids=["consecutive", "slices"])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_attention_and_its_gradient_equal_the_definition(
    dtype: torch.dtype,
    tolerance: float,
    windows: Windows,
    causal: bool,
    prompts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "CACHE_BYTES", 4096)  # several slices, the last one smaller
    torch.manual_seed(0)
    rows, heads, width = rows_of(windows), 2, 10
    exact = torch.randn(rows, 3 * width, dtype=torch.float64, requires_grad=True)
    leaves, ours = [exact], [exact.detach().to(dtype).requires_grad_()]
    if prompts:
        leaves.append(torch.randn(prompts, 2 * width, dtype=torch.float64, requires_grad=True))
        # As the encoders give them: never narrower than fp32, and a slice of something wider.
        seen = torch.randn(prompts, 3 * width, dtype=torch.promote_types(dtype, torch.float32))
        seen[:, width:] = leaves[1].detach()
        ours.append(seen[:, width:].requires_grad_())
    weight = torch.randn(rows, width, dtype=torch.float64)
    expected = explicit(exact, windows, heads, causal, *leaves[1:])
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    scale = (width // heads) ** -0.5
    found = attend_windows(
        ours[0], windows, heads, scale, causal=causal, seen=ours[1] if prompts else None
    )
    gradients = torch.autograd.grad((found * weight.to(dtype)).sum(), ours)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    for leaf, gradient, exactly in zip(ours, gradients, wanted, strict=True):
        assert gradient.dtype == leaf.dtype
        size = max(float(exactly.abs().max()), 1.0)
        assert (gradient.double() - exactly).abs().max() <= tolerance * size


def test_gradients_of_prompts_are_summed_in_their_own_dtype() -> None:
    """bf16, 4096 windows: each key gets within 1 % of the fp32 gradient (a bf16 sum is far off)."""
    torch.manual_seed(0)
    windows, qkv, seen = Windows((Group(4096, 4, 1),)), torch.randn(16384, 24), torch.randn(2, 16)
    weight = torch.rand(16384, 8) + 0.5  # of one sign: the sums are long
    found = []
    for dtype, dropout in ((torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.bfloat16, 1e-9)):
        leaf = seen.clone().requires_grad_()
        out = attend_windows(qkv.to(dtype), windows, 2, 0.5, dropout, seen=leaf)
        found.append(torch.autograd.grad((out * weight.to(dtype)).float().sum(), leaf)[0])
    for narrow in found[1:]:
        torch.testing.assert_close(narrow[:, 8:], found[0][:, 8:], atol=0, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_get_gradients_though_the_rest_wants_none(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for windows in SPLITS:
        qkv = torch.randn(rows_of(windows), 30).to(dtype)
        seen = torch.randn(3, 20)
        found = []
        for wants in (True, False):
            leaf = seen.clone().requires_grad_()
            rows = qkv.clone().requires_grad_(wants)
            out = attend_windows(rows, windows, 2, 0.4, seen=leaf)
            found.append(torch.autograd.grad(out.float().square().sum(), leaf)[0])
        assert torch.equal(*found)
        # And the other way round: fixed prompts.
        rows = qkv.clone().requires_grad_()
        attend_windows(rows, windows, 2, 0.4, seen=seen).float().sum().backward()
        assert rows.grad is not None and rows.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_slots_change_no_bit_of_earlier_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for windows in SPLITS:
        first = torch.randn(rows_of(windows), 30).to(dtype)
        slot = torch.cat(
            [
                torch.arange(count * tokens) % slots
                for _ in range(windows.outer)
                for count, tokens, slots in windows.groups
            ]
        )
        for last in range(3):
            second = torch.where((slot > last).unsqueeze(1), 50 * torch.randn_like(first), first)
            for seen in (None, torch.randn(3, 20)):
                a, b = (
                    attend_windows(x, windows, 2, 0.4, causal=True, seen=seen)
                    for x in (first, second)
                )
                assert torch.equal(a[slot <= last], b[slot <= last])
                assert not torch.equal(a, b)


def test_attention_dropout_takes_the_fused_path_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    qkv, windows = torch.randn(64, 24), Windows((Group(4, 16, 1),))
    plain = attend_windows(qkv, windows, 2, 0.5)
    dropped = torch.stack([attend_windows(qkv, windows, 2, 0.5, 0.3) for _ in range(400)])
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), plain, atol=0.15, rtol=0)


def test_dropout_leaves_out_prompts_too_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    windows, seen = Windows((Group(1, 4, 4),)), torch.randn(2, 16)
    qkv = torch.randn(4, 24)
    plain = attend_windows(qkv, windows, 2, 0.5, causal=True, seen=seen)
    dropped = torch.stack(
        [attend_windows(qkv, windows, 2, 0.5, 0.3, causal=True, seen=seen) for _ in range(3000)]
    )
    assert dropped[:, 0].std(0).max() > 0.1  # the first query sees the prompts and itself
    torch.testing.assert_close(dropped.mean(0), plain, atol=0.1, rtol=0)


def test_masks_made_without_gradients_serve_passes_with_them() -> None:
    windows = Windows((Group(2, 14, 7),))
    with torch.inference_mode():
        attend_windows(torch.randn(28, 12), windows, 1, 0.5, causal=True)
    qkv = torch.randn(28, 12, requires_grad=True)
    attend_windows(qkv, windows, 1, 0.5, causal=True).sum().backward()
    assert qkv.grad is not None


def test_blocks_of_rows_with_groups_of_several_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="one window each"):
        attend_windows(torch.randn(16, 12), Windows((Group(2, 4, 1),), outer=2), 1, 0.5)
