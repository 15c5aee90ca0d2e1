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


def explicit(qkv: torch.Tensor, windows: Windows, heads: int, causal: bool) -> torch.Tensor:
    """Attention window by window, head by head, from the definition."""
    width = qkv.shape[1] // 3
    size = width // heads
    out, start = [], 0
    for _ in range(windows.outer):
        for count, tokens, slots in windows.groups:
            for _ in range(count):
                rows = qkv[start : start + tokens].view(tokens, 3, heads, size)
                q, k, v = rows.permute(1, 2, 0, 3)
                logits = q @ k.transpose(1, 2) * size**-0.5
                if causal:
                    slot = torch.arange(tokens) % slots
                    logits = logits.masked_fill(slot[None] > slot[:, None], -torch.inf)
                weights = torch.softmax(logits, -1)
                out.append((weights @ v).transpose(0, 1).reshape(tokens, width))
                start += tokens
    assert start == len(qkv)
    return torch.cat(out)


def rows_of(windows: Windows) -> int:
    return windows.outer * sum(count * tokens for count, tokens, _ in windows.groups)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("windows", SPLITS, ids=["consecutive", "slices"])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_attention_and_its_gradient_equal_the_definition(
    dtype: torch.dtype,
    tolerance: float,
    windows: Windows,
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "CACHE_BYTES", 4096)  # several slices, the last one smaller
    torch.manual_seed(0)
    rows, heads, width = rows_of(windows), 2, 10
    exact = torch.randn(rows, 3 * width, dtype=torch.float64, requires_grad=True)
    ours = exact.detach().to(dtype).requires_grad_()
    weight = torch.randn(rows, width, dtype=torch.float64)
    expected = explicit(exact, windows, heads, causal)
    (expected * weight).sum().backward()
    found = attend_windows(ours, windows, heads, (width // heads) ** -0.5, causal=causal)
    (found * weight.to(dtype)).sum().backward()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    assert exact.grad is not None and ours.grad is not None
    scale = float(exact.grad.abs().max())
    assert (ours.grad.double() - exact.grad).abs().max() <= tolerance * max(scale, 1.0)


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
            a, b = (attend_windows(x, windows, 2, 0.4, causal=True) for x in (first, second))
            assert torch.equal(a[slot <= last], b[slot <= last])
            assert not torch.equal(a, b)


def test_attention_dropout_takes_the_fused_path_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    qkv, windows = torch.randn(64, 24), Windows((Group(4, 16, 1),))
    plain = attend_windows(qkv, windows, 2, 0.5)
    dropped = torch.stack([attend_windows(qkv, windows, 2, 0.5, 0.3) for _ in range(400)])
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), plain, atol=0.15, rtol=0)


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
