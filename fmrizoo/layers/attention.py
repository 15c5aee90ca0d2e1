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
    seen: Tensor | None = None,
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
        seen: ``(p, 2 · d)``, keys and values of prompts: every query attends to them too. Their
            gradient is summed over all windows in their own dtype, which may be wider than that of
            ``qkv``.

    Returns:
        ``(rows, d)`` in the dtype of ``qkv``.
    """
    groups, outer = windows.groups, windows.outer
    if outer == 1 and not causal:
        groups = _by_tokens(groups)
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and not dropout:
        mixed: Tensor = _ExplicitAttention.apply(qkv, seen, groups, outer, heads, scale, causal)
        return mixed
    blocks = _cut(qkv, groups, outer, 3, heads)
    prompts = None if seen is None else _of_prompts(seen, heads)
    parts = [
        _fused(block, prompts, group, scale, dropout, causal)
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


def _of_prompts(seen: Tensor, heads: int) -> Tensor:
    """``(p, 2 · d)`` keys and values → ``(2, heads, p, head_dim)``."""
    return seen.view(len(seen), 2, heads, -1).permute(1, 2, 0, 3)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept, for passes that train too
def _future(
    tokens: int, slots: int, prompts: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """``(tokens, prompts + tokens)``: −∞ where the key is later than the query; None if nowhere.

    −∞, not −100: it gives exact zeros, and no denormal numbers that would slow the backward pass.
    """
    if slots == 1:
        return None
    slot = torch.arange(tokens, device=device) % slots
    later = F.pad(slot.unsqueeze(0) > slot.unsqueeze(1), (prompts, 0))
    return torch.zeros(later.shape, dtype=dtype, device=device).masked_fill_(later, -torch.inf)


def _fused(
    qkv: Tensor,
    prompts: Tensor | None,
    group: Group,
    scale: float,
    dropout: float,
    causal: bool,
) -> Tensor:
    """``(windows, tokens, 3, heads, head_dim)`` → ``(windows, tokens, d)`` by PyTorch's kernel."""
    width, padding = qkv.shape[-1], 0
    if qkv.device.type == "cuda" and qkv.dtype != torch.float32 and width % 8:
        # The memory-efficient kernel needs head_dim % 8 == 0; zero channels change no product.
        padding = -width % 8
        qkv = F.pad(qkv, (0, padding))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    count = 0
    if prompts is not None:
        count = prompts.shape[2]
        wide = F.pad(prompts.to(qkv.dtype), (0, padding)).unsqueeze(1)
        wide = wide.expand(-1, len(qkv), -1, -1, -1)
        k, v = torch.cat([wide[0], k], 2), torch.cat([wide[1], v], 2)
    # The kernel's own triangle, which knows no keys before the first query.
    in_time = causal and not count and 1 < group.slots == group.tokens
    mask = _future(*group[1:], count, q.dtype, q.device) if causal and not in_time else None
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=in_time, scale=scale
    )
    return out[..., :width].transpose(1, 2).flatten(2)


class _ExplicitAttention(torch.autograd.Function):
    """Keeps nothing but ``qkv`` (and the prompts) for the backward pass."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        qkv: Tensor,
        seen: Tensor | None,
        groups: tuple[Group, ...],
        outer: int,
        heads: int,
        scale: float,
        causal: bool,
    ) -> Tensor:
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        sources = _cut(qkv, groups, outer, 3, heads)
        targets = _cut(out, groups, outer, 1, heads)
        prompts = None if seen is None else _of_prompts(seen.to(qkv.dtype), heads)
        count = 0 if seen is None else len(seen)
        for group, source, target in zip(groups, sources, targets, strict=True):
            mask = _future(*group[1:], count, qkv.dtype, qkv.device) if causal else None
            _explicit(source, target, scale, mask, prompts)
        ctx.save_for_backward(qkv, seen)
        ctx.settings = (groups, outer, heads, scale, causal)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        qkv, seen = ctx.saved_tensors
        groups, outer, heads, scale, causal = ctx.settings
        result = torch.empty_like(qkv)
        prompts = None if seen is None else _of_prompts(seen.to(qkv.dtype), heads)
        d_seen = torch.zeros_like(seen) if ctx.needs_input_grad[1] else None
        d_prompts = None if d_seen is None else _of_prompts(d_seen, heads)
        count = 0 if seen is None else len(seen)
        for group, source, out, target in zip(
            groups,
            _cut(qkv, groups, outer, 3, heads),
            _cut(grad.contiguous(), groups, outer, 1, heads),
            _cut(result, groups, outer, 3, heads),
            strict=True,
        ):
            mask = _future(*group[1:], count, qkv.dtype, qkv.device) if causal else None
            _explicit_backward(source, out, target, scale, mask, prompts, d_prompts)
        return result, d_seen, None, None, None, None, None


def _slices(qkv: Tensor, prompts: Tensor | None) -> Iterator[slice]:
    """Windows whose attention weights fit the cache together."""
    windows, tokens, _, heads, _ = qkv.shape
    keys = tokens if prompts is None else tokens + prompts.shape[2]
    step = max(1, CACHE_BYTES // (heads * tokens * keys * qkv.element_size()))
    for start in range(0, windows, step):
        yield slice(start, start + step)


def _per_head(windows: Tensor) -> Tensor:
    """``(w, n, parts, heads, d)`` → ``(parts, w · heads, n, d)``, contiguous."""
    _, tokens, parts, _, width = windows.shape
    return windows.permute(2, 0, 3, 1, 4).reshape(parts, -1, tokens, width)


def _after(prompts: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``k, v (w · heads, n, d)`` after those of ``prompts (2, heads, p, d)``."""
    if prompts is None:
        return k, v
    windows = len(k) // prompts.shape[1]
    every = prompts.unsqueeze(1).expand(-1, windows, -1, -1, -1).flatten(1, 2)
    return torch.cat([every[0], k], 1), torch.cat([every[1], v], 1)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the keys of ``q (w · heads, n, d)``, already scaled."""
    logits = torch.bmm(q, k.transpose(1, 2))
    if mask is not None:
        logits += mask
    return torch.softmax(logits, -1)


def _explicit(
    qkv: Tensor, out: Tensor, scale: float, mask: Tensor | None, prompts: Tensor | None
) -> None:
    """Softmax attention of ``qkv (w, n, 3, heads, d)`` into ``out (w, n, 1, heads, d)``."""
    for part in _slices(qkv, prompts):
        q, k, v = _per_head(qkv[part])
        k, v = _after(prompts, k, v)
        mixed = torch.bmm(_weights(q * scale, k, mask), v)
        target = out[part]
        target.copy_(
            mixed.view(target.shape[0], target.shape[3], -1, 1, v.shape[-1]).permute(0, 2, 3, 1, 4)
        )


def _explicit_backward(
    qkv: Tensor,
    out: Tensor,
    result: Tensor,
    scale: float,
    mask: Tensor | None,
    prompts: Tensor | None,
    d_prompts: Tensor | None,
) -> None:
    """Gradient of ``qkv`` into ``result``, from the gradient ``out`` of the output.

    That of the ``prompts (2, heads, p, d)`` is added to ``d_prompts``, if it is wanted.
    """
    count = 0 if prompts is None else prompts.shape[2]
    for part in _slices(qkv, prompts):
        q, k, v = _per_head(qkv[part])
        k, v = _after(prompts, k, v)
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
        windows, _, _, heads, width = qkv[part].shape
        for index, gradient in enumerate(grads):
            by_head = gradient.view(windows, heads, -1, width)
            if count and index:
                if d_prompts is not None:
                    d_prompts[index - 1] += by_head[:, :, :count].sum(0, dtype=d_prompts.dtype)
                by_head = by_head[:, :, count:]
            result[part][:, :, index].copy_(by_head.transpose(1, 2))
