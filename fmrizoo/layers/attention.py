"""Softmax attention inside windows, with what is fastest on each device.

Measured on CPUs: PyTorch's fused kernel is the fastest in fp32. In bf16 explicit products over a
few windows at a time (small enough for the cache, formed again in the backward pass instead of
kept) are faster forward, and 2–5 times faster backward. Neither keeps any attention weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrizoo.layers.windows import Group

CACHE_BYTES = 1 << 23  # attention weights formed at a time by the explicit kernel


@dataclass(frozen=True)
class Windows:
    """How rows of tokens are grouped for attention.

    Attributes:
        groups: Consecutive windows.
        outer: The rows are so many equal blocks, each of which ``groups`` cuts. More than one
            block: every group is a single window.
        rotation: ``(length, head_dim / 2)`` complex: rotary positions of the rows, which are blocks
            of ``length`` (not those of ``outer``), all turned alike; see
            :mod:`fmrizoo.layers.rope`.
    """

    groups: tuple[Group, ...]
    outer: int = 1
    rotation: Tensor | None = None


def attend_windows(
    qkv: Tensor,
    windows: Windows,
    heads: int,
    scale: float,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Multi-head attention within each window of tokens kept in window order.

    Args:
        qkv: ``(rows, 3 · d)``, query, key and value of each row, each split over the heads.
        windows: What attends to what (the rotation is not applied here).
        heads: Number of heads; must divide ``d``.
        scale: Factor on ``q·k``.
        dropout: Probability on the attention weights.
        causal: A query attends to keys of its own and of earlier places along the last axis only.
            The others get a weight of exactly 0.

    Returns:
        ``(rows, d)`` in the dtype of ``qkv``.
    """
    groups, outer = windows.groups, windows.outer
    if outer == 1 and not causal:
        groups = _by_tokens(groups)
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and not dropout:
        mixed: Tensor = _ExplicitAttention.apply(qkv, groups, outer, heads, scale, causal)
        return mixed
    blocks = _cut(qkv, groups, outer, 3, heads)
    parts = [
        _fused(block, group, scale, dropout, causal)
        for block, group in zip(blocks, groups, strict=True)
    ]
    if len(parts) == 1:
        return parts[0].flatten(0, 1)
    if outer == 1:
        return torch.cat([part.flatten(0, 1) for part in parts])
    return torch.cat(parts, 1).flatten(0, 1)


@lru_cache(maxsize=256)
def _by_tokens(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Neighbouring groups with the same number of tokens as one."""
    joined = []
    for tokens, same in groupby(groups, lambda group: group.tokens):
        joined.append(Group(sum(group.windows for group in same), tokens, 1))
    return tuple(joined)


def _cut(
    rows: Tensor, groups: Sequence[Group], outer: int, parts: int, heads: int
) -> Iterator[Tensor]:
    """Views ``(windows, tokens, parts, heads, head_dim)`` of the groups of ``rows``."""
    width = rows.shape[1] // (parts * heads)
    blocks = rows.view(outer, -1, parts, heads, width)
    lengths = [group.windows * group.tokens for group in groups]
    for block, group in zip(torch.split(blocks, lengths, 1), groups, strict=True):
        if outer > 1 and group.windows > 1:
            raise ValueError("several blocks of rows need groups of one window each")
        yield block if outer > 1 else block.view(*group[:2], parts, heads, width)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept, for passes that train too
def _future(tokens: int, slots: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """``(tokens, tokens)``: −∞ where the key is later than the query, 0 elsewhere; None if nowhere.

    −∞, not −100: it gives exact zeros, and no denormal numbers that would slow the backward pass.
    """
    if slots == 1:
        return None
    slot = torch.arange(tokens, device=device) % slots
    later = slot.unsqueeze(0) > slot.unsqueeze(1)
    return torch.zeros(later.shape, dtype=dtype, device=device).masked_fill_(later, -torch.inf)


def _fused(qkv: Tensor, group: Group, scale: float, dropout: float, causal: bool) -> Tensor:
    """``(windows, tokens, 3, heads, head_dim)`` → ``(windows, tokens, d)`` by PyTorch's kernel."""
    width = qkv.shape[-1]
    if qkv.device.type == "cuda" and qkv.dtype != torch.float32 and width % 8:
        # The memory-efficient kernel needs head_dim % 8 == 0; zero channels change no product.
        qkv = F.pad(qkv, (0, -width % 8))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    in_time = causal and 1 < group.slots == group.tokens  # the kernel's own triangle
    mask = _future(*group[1:], q.dtype, q.device) if causal and not in_time else None
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=in_time, scale=scale
    )
    return out[..., :width].transpose(1, 2).flatten(2)


class _ExplicitAttention(torch.autograd.Function):
    """Keeps nothing but ``qkv`` for the backward pass."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        qkv: Tensor,
        groups: tuple[Group, ...],
        outer: int,
        heads: int,
        scale: float,
        causal: bool,
    ) -> Tensor:
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        sources = _cut(qkv, groups, outer, 3, heads)
        targets = _cut(out, groups, outer, 1, heads)
        for group, source, target in zip(groups, sources, targets, strict=True):
            mask = _future(*group[1:], qkv.dtype, qkv.device) if causal else None
            _explicit(source, target, scale, mask)
        ctx.save_for_backward(qkv)
        ctx.settings = (groups, outer, heads, scale, causal)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        (qkv,) = ctx.saved_tensors
        groups, outer, heads, scale, causal = ctx.settings
        result = torch.empty_like(qkv)
        for group, source, out, target in zip(
            groups,
            _cut(qkv, groups, outer, 3, heads),
            _cut(grad.contiguous(), groups, outer, 1, heads),
            _cut(result, groups, outer, 3, heads),
            strict=True,
        ):
            mask = _future(*group[1:], qkv.dtype, qkv.device) if causal else None
            _explicit_backward(source, out, target, scale, mask)
        return result, None, None, None, None, None


def _slices(qkv: Tensor) -> Iterator[slice]:
    """Windows whose attention weights fit the cache together."""
    windows, tokens, _, heads, _ = qkv.shape
    step = max(1, CACHE_BYTES // (heads * tokens * tokens * qkv.element_size()))
    for start in range(0, windows, step):
        yield slice(start, start + step)


def _per_head(windows: Tensor) -> Tensor:
    """``(w, n, parts, heads, d)`` → ``(parts, w · heads, n, d)``, contiguous."""
    _, tokens, parts, _, width = windows.shape
    return windows.permute(2, 0, 3, 1, 4).reshape(parts, -1, tokens, width)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the keys of ``q (w · heads, n, d)``, already scaled."""
    logits = torch.bmm(q, k.transpose(1, 2))
    if mask is not None:
        logits += mask
    return torch.softmax(logits, -1)


def _explicit(qkv: Tensor, out: Tensor, scale: float, mask: Tensor | None) -> None:
    """Softmax attention of ``qkv (w, n, 3, heads, d)`` into ``out (w, n, 1, heads, d)``."""
    for part in _slices(qkv):
        q, k, v = _per_head(qkv[part])
        mixed = torch.bmm(_weights(q * scale, k, mask), v)
        target = out[part]
        target.copy_(
            mixed.view(target.shape[0], target.shape[3], -1, 1, v.shape[-1]).permute(0, 2, 3, 1, 4)
        )


def _explicit_backward(
    qkv: Tensor, out: Tensor, result: Tensor, scale: float, mask: Tensor | None
) -> None:
    """Gradient of ``qkv`` into ``result``, from the gradient ``out`` of the output."""
    for part in _slices(qkv):
        q, k, v = _per_head(qkv[part])
        d_out = _per_head(out[part])[0]
        q = q * scale
        weights = _weights(q, k, mask)
        d_weights = torch.bmm(d_out, v.transpose(1, 2))
        d_logits = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, qkv.dtype)
        grads = (
            torch.bmm(d_logits, k) * scale,
            torch.bmm(d_logits.transpose(1, 2), q),
            torch.bmm(weights.transpose(1, 2), d_out),
        )
        windows, tokens, _, heads, width = qkv[part].shape
        for index, gradient in enumerate(grads):
            by_head = gradient.view(windows, heads, tokens, width)
            result[part][:, :, index].copy_(by_head.transpose(1, 2))
