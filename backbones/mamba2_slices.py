"""The Mamba-2 mixer a slice of the sequence at a time, forward and backward.

A slice of about two thousand tokens stays in the cache of a CPU from the first projection to the
last; the last inputs of the convolution and the scan's state pass from slice to slice. The backward
pass walks the slices from the last to the first, with the activations kept or made again.

Shapes: b samples, l tokens, d width, i = h · p inner width, k taps of the convolution over
m = i + 2 · g · n channels (x, B, C); see :mod:`fmrizoo.backbones.ssd` for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmrizoo.backbones.ssd import Chunks, Kept, cut, scan, scan_backward


class Shape(NamedTuple):
    """Sizes of a mixer, and how it is run."""

    heads: int
    head_dim: int
    groups: int
    states: int
    taps: int
    eps: float
    chunk: int  # tokens of a chunk of the scan
    length: int  # tokens of each sample in a slice: whole chunks
    dtype: torch.dtype  # of products
    recompute: bool  # keep only what passes from slice to slice
    prenorm: bool  # u is RMS-normalised first (its weight folded into the input projection)
    residual: bool  # u is added to the output

    @property
    def inner(self) -> int:
        """Width of x, y and z."""
        return self.heads * self.head_dim

    @property
    def mixed(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.states


class Weights(NamedTuple):
    """A mixer's weights. Matrices as given may be wider than the products' dtype."""

    inward: Tensor  # (i + m + h, d) rows z, x, B, C, dt
    inward_bias: Tensor | None  # (i + m + h,)
    conv: Tensor  # (m, k)
    conv_bias: Tensor  # (m,)
    A: Tensor  # (h,) fp32, negative
    D: Tensor  # (h,)
    dt_bias: Tensor  # (h,) fp32
    outward: Tensor  # (d, i), times the weight of the norm
    outward_bias: Tensor | None  # (d,)

    def cast(self, dtype: torch.dtype) -> Weights:
        """All but decays and steps in ``dtype``."""

        def to(t: Tensor) -> Tensor:
            return t.detach().to(dtype)

        return self._replace(
            inward=to(self.inward),
            inward_bias=None if self.inward_bias is None else to(self.inward_bias),
            conv=to(self.conv),
            conv_bias=to(self.conv_bias),
            D=to(self.D),
            outward=to(self.outward),
            outward_bias=None if self.outward_bias is None else to(self.outward_bias),
        )


class Slice(NamedTuple):
    """What the backward pass of a slice needs."""

    u: Tensor  # (b, l, d) input of the projection
    z: Tensor  # (b, l, i)
    inputs: Tensor  # (b, l + k − 1, m) of the convolution
    convolved: Tensor  # (b, l, m) before the SiLU
    mixed: Tensor  # (b, L, m) x, B, C after it, in chunks
    raw_dt: Tensor  # (b, l, h) before the softplus
    dt: Tensor  # (b, L, h) in chunks
    y: Tensor  # (b, L, h, p) of the scan, in chunks
    gate: Tensor  # (b, l, i) silu(z)
    normed: Tensor  # (b, l, i)
    scale: Tensor  # (b, l, g, 1) 1 / rms
    u_scale: Tensor | None  # (b, l, 1) 1 / rms of the input, with ``prenorm``


def forward_slice(
    u: Tensor, tail: Tensor, state: Tensor, w: Weights, s: Shape, out: Tensor | None
) -> tuple[Tensor, Tensor, Slice, Kept, Chunks]:
    """One slice ``u (b, l, d)`` → tail and state after it, and what the backward pass needs.

    The result is written to ``out (b, l, d)``, if given.
    """
    b, length, _ = u.shape
    source, u_scale = u, None
    u = u.to(s.dtype)
    if s.prenorm:
        u_scale = _inverse_rms(u, s.eps)
        u = u * u_scale
    sizes = [s.inner, s.mixed, s.heads]
    into = torch.split(w.inward, sizes)
    bias: Sequence[Tensor | None] = (None, None, None)
    if w.inward_bias is not None:
        bias = torch.split(w.inward_bias, sizes)
    z = F.linear(u, into[0], bias[0])
    inputs = u.new_empty(b, length + s.taps - 1, s.mixed)
    inputs[:, : s.taps - 1] = tail
    for sample, target in zip(u, inputs, strict=True):
        torch.mm(sample, into[1].t(), out=target[s.taps - 1 :])
    if bias[1] is not None:
        inputs[:, s.taps - 1 :] += bias[1]
    tail = inputs[:, length:].clone()
    raw_dt = F.linear(u, into[2], bias[2]).to(w.A.dtype).add_(w.dt_bias)
    dt = F.softplus(raw_dt)
    convolved = _convolve(inputs, w.conv, w.conv_bias)
    chunks = cut(dt, w.A, s.chunk)
    mixed, dt = chunks.spread(F.silu(convolved)), chunks.spread(dt)
    x, B, C = _parts(mixed, s)
    y, state, kept = scan(x, dt, w.A, B, C, state, chunks.size)
    gate = F.silu(z)
    normed = _with_direct(y, x, w, chunks, length).mul_(gate).view(b, length, s.groups, -1)
    scale = _inverse_rms(normed, s.eps)
    normed = normed.mul_(scale).view(b, length, s.inner)
    if out is not None:
        result = F.linear(normed, w.outward, w.outward_bias)
        out.copy_(source + result if s.residual else result)
    kept_slice = Slice(u, z, inputs, convolved, mixed, raw_dt, dt, y, gate, normed, scale, u_scale)
    return tail, state, kept_slice, kept, chunks


class Sums:
    """Gradients of those weights that want one, summed over slices at least in fp32."""

    def __init__(self, w: Weights, wanted: Sequence[bool]) -> None:
        def zeros(t: Tensor) -> Tensor:
            return torch.zeros(
                t.shape, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device
            )

        self.of = {
            name: zeros(t)
            for (name, t), want in zip(w._asdict().items(), wanted, strict=True)
            if t is not None and want
        }

    def product(self, name: str, rows: slice, left: Tensor, right: Tensor) -> None:
        """Add ``leftᵀ @ right`` (both ``(b, l, …)``) to some rows, where it is wanted."""
        if name not in self.of:
            return
        target, left, right = self.of[name][rows], left.flatten(0, 1), right.flatten(0, 1)
        if left.dtype == target.dtype:
            target.addmm_(left.t(), right)
        else:
            target.add_(left.t() @ right)

    def rows(self, name: str, rows: slice, values: Tensor) -> None:
        """Add the sum of ``values (b, l, …)`` over tokens, where it is wanted."""
        if name in self.of:
            target = self.of[name]
            target[rows] += values.sum((0, 1))


def backward_slice(
    kept_slice: Slice,
    kept: Kept,
    chunks: Chunks,
    w: Weights,
    s: Shape,
    d_out: Tensor,
    d_tail: Tensor,
    d_state: Tensor | None,
    sums: Sums,
    wants_input: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of a slice's input, tail and state, from those of its output, tail and state.

    That of the input is left out unless it is wanted.
    """
    k = kept_slice
    length = d_out.shape[1]
    everything = slice(None)
    d_result = d_out.to(s.dtype)
    sums.product("outward", everything, d_result, k.normed)
    sums.rows("outward_bias", everything, d_result)
    x, B, C = _parts(k.mixed, s)
    total = _with_direct(k.y, x, w, chunks, length)
    d_total, d_z = _gate_backward(d_result @ w.outward, k, total)
    d_y = chunks.spread(d_total).view(x.shape)
    d = scan_backward((x, k.dt, w.A, B, C), kept, k.y, d_y, d_state)
    if "A" in sums.of:
        sums.of["A"] += d.A
    if "D" in sums.of:
        sums.of["D"] += (x * d_y).sum((1, 3)).sum(0)
    d_x = d.x.addcmul_(d_y, w.D[:, None])
    d_raw = chunks.collect(d.dt, length) * torch.sigmoid(k.raw_dt)
    sums.rows("dt_bias", everything, d_raw)
    d_mixed = torch.cat([t.flatten(2) for t in (d_x, d.B, d.C)], -1)
    d_inputs = _convolve_backward(chunks.collect(d_mixed, length), k, w, sums)
    d_inputs[:, length:] += d_tail
    d_xBC = d_inputs[:, s.taps - 1 :]
    pieces = (d_z, d_xBC, d_raw.to(s.dtype))
    row = 0
    for piece in pieces:
        rows = slice(row, row + piece.shape[-1])
        sums.product("inward", rows, piece, k.u)
        sums.rows("inward_bias", rows, piece)
        row = rows.stop
    d_u = _input_backward(pieces, k, w, s, d_out) if wants_input else None
    return d_u, d_inputs[:, : s.taps - 1].clone(), d.state


def _input_backward(
    pieces: Sequence[Tensor], k: Slice, w: Weights, s: Shape, d_out: Tensor
) -> Tensor:
    """Gradient of a slice's input, from those of the parts that it is projected to."""
    d_u, row = torch.zeros_like(k.u), 0
    for piece in pieces:
        rows = slice(row, row + piece.shape[-1])
        for target, sample in zip(d_u, piece, strict=True):
            target.addmm_(sample, w.inward[rows])
        row = rows.stop
    if k.u_scale is not None:
        d_u = _norm_backward(d_u, k.u, k.u_scale)
    return d_u + d_out if s.residual else d_u


def _parts(mixed: Tensor, s: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """``x (b, L, h, p)``, ``B, C (b, L, g, n)``: views of ``mixed (b, L, m)``."""
    x, B, C = torch.split(mixed, [s.inner, s.groups * s.states, s.groups * s.states], -1)
    return (
        torch.unflatten(x, -1, (s.heads, s.head_dim)),
        torch.unflatten(B, -1, (s.groups, s.states)),
        torch.unflatten(C, -1, (s.groups, s.states)),
    )


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``(…, 1)`` 1 / sqrt(mean(x²) + eps), computed at least in fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale: Tensor = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
    return scale


def _norm_backward(d: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """Gradient of ``v`` in ``normed = v · scale``, ``scale`` the inverse RMS of ``v``."""
    share = (d * normed).mean(-1, keepdim=True)
    return torch.addcmul(d, normed, share, value=-1).mul_(scale)


def _with_direct(y: Tensor, x: Tensor, w: Weights, chunks: Chunks, length: int) -> Tensor:
    """``y + D x``, ``(b, l, i)``."""
    y, x = chunks.collect(y, length), chunks.collect(x, length)
    return torch.addcmul(y, x, w.D[:, None]).flatten(2)


def _gate_backward(d: Tensor, k: Slice, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and z in ``normed = rms_norm(y · silu(z))``."""
    groups = k.scale.shape[2]
    shape = (*d.shape[:2], groups, -1)
    d = _norm_backward(d.view(shape), k.normed.view(shape), k.scale).view(d.shape)
    d_z = torch.ops.aten.silu_backward(y.mul_(d), k.z)
    return d.mul_(k.gate), d_z


def _convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise ``(b, l + k − 1, m)`` → ``(b, l, m)``: an image of channels last, not copied."""
    image = inputs.unsqueeze(1).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight[:, None, None], bias, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1).flatten(1, 2)


def _convolve_backward(d: Tensor, k: Slice, w: Weights, sums: Sums) -> Tensor:
    """Gradient of ``inputs`` from that of ``silu(convolved)``, ``(b, l, m)``."""
    b, length, width = d.shape
    taps = w.conv.shape[1]
    # The native gradient of a depthwise convolution is slow: it is one itself, with the taps
    # flipped, over zeros at both ends.
    framed = d.new_zeros(b, length + 2 * (taps - 1), width)
    inner = framed[:, taps - 1 : taps - 1 + length]
    inner.copy_(torch.ops.aten.silu_backward(d, k.convolved))
    if "conv" in sums.of:
        for tap in range(taps):
            sums.of["conv"][:, tap] += (inner * k.inputs[:, tap : tap + length]).sum((0, 1))
    sums.rows("conv_bias", slice(None), inner)
    return _convolve(framed, w.conv.flip(1).contiguous(), None)


class Mix(torch.autograd.Function):
    """A whole mixer: ``u (b, l, d)``, tail and state → output ``(b, l, d)``, tail and state."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, u: Tensor, tail: Tensor, state: Tensor, s: Shape, *given: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        w = Weights(*given).cast(s.dtype)
        out = torch.empty_like(u, memory_format=torch.contiguous_format)
        needed = any(ctx.needs_input_grad)
        kept: list[Tensor | None] = []
        plans = []
        parts = torch.split(u, s.length, 1)
        for part, target in zip(parts, torch.split(out, s.length, 1), strict=True):
            if needed and s.recompute:
                kept += (tail, state)
            tail, state, activations, scanned, chunks = forward_slice(
                part, tail, state, w, s, target
            )
            if needed and not s.recompute:
                kept += (*activations, *scanned)
                plans.append(chunks)
        ctx.shape, ctx.plans, ctx.lengths = s, plans, [part.shape[1] for part in parts]
        ctx.set_materialize_grads(False)
        if needed:
            ctx.save_for_backward(u if s.recompute else None, *given, *kept)
        return out, tail, state

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[no-untyped-def]
        ctx, d_out: Tensor | None, d_tail: Tensor | None, d_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        s: Shape = ctx.shape
        u, *saved = ctx.saved_tensors
        count = len(Weights._fields)
        given, kept = Weights(*saved[:count]), saved[count:]
        wants_input, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[-count:]
        w, sums = given.cast(s.dtype), Sums(given, wanted)
        lengths = ctx.lengths
        each = len(kept) // len(lengths)
        if d_out is None:
            d_out = kept[0].new_zeros(kept[0].shape[0], sum(lengths), w.outward.shape[0])
        if d_tail is None:
            d_tail = d_out.new_zeros(len(d_out), s.taps - 1, s.mixed, dtype=s.dtype)
        d_u = torch.empty_like(d_out) if wants_input else None
        stop = sum(lengths)
        for number in range(len(lengths) - 1, -1, -1):
            part = slice(stop - lengths[number], stop)
            stop = part.start
            found = kept[number * each : (number + 1) * each]
            if s.recompute:
                _, _, kept_slice, kept_scan, chunks = forward_slice(
                    u[:, part], found[0], found[1], w, s, None
                )
            else:
                split = len(Slice._fields)
                kept_slice, kept_scan = Slice(*found[:split]), Kept(*found[split:])
                chunks = ctx.plans[number]
            d_part, d_tail, d_state = backward_slice(
                kept_slice,
                kept_scan,
                chunks,
                w,
                s,
                d_out[:, part],
                d_tail,
                d_state,
                sums,
                wants_input,
            )
            if d_u is not None and d_part is not None:
                d_u[:, part] = d_part
        d_weights = (
            sums.of[name].to(value.dtype) if name in sums.of else None
            for name, value in given._asdict().items()
        )
        return d_u, d_tail, d_state, None, *d_weights
