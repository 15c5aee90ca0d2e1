"""The state-space duality (SSD) operation of Mamba-2, in plain PyTorch.

Source: Dao & Gu 2024, "Transformers are SSMs". Per head, with a scalar decay ``a_t = dt_t · A``:

    S_t = exp(a_t) · S_{t-1} + B_t ⊗ dt_t x_t          y_t = C_t · S_t

Inside chunks this is attention with weights ``exp(cs_i − cs_j)``, ``cs`` the running sum of ``a``.
What differs from the paper's listing: the weights are split into one factor per row and one per
column around the middle of each chunk, so that ``tril(C Bᵀ)`` is shared by all heads and no
(head, chunk, chunk) tensor is made; the backward pass is written out.

Numbers: decays, running sums and states are fp32 (fp64 for fp64 input), products have the dtype of
``x``. A factor must stay within e^±60, so a chunk over which the state decays by more than e^-120
is cut before the token that goes too far (that token then starts a chunk, whose inner weights do
not depend on its own decay). Where chunks are cut depends on earlier tokens only, and the middle of
a chunk is a power of two, by which scaling is exact: outputs do not change with later tokens, not
even in the last bit (given chunks of a multiple of 16 tokens, whose rows a CPU computes alike
wherever they stand). fp16 has not the range for this and is refused.

Shapes: b samples, l tokens, h heads of p channels, g groups of heads that share B and C, n states,
c chunks of q tokens. A state is ``(b, g, n, h/g, p)``.
"""

from __future__ import annotations

from math import ceil, e, log2
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from fmrizoo.errors import RecipeError

BACKENDS = ("torch", "ref")
LOG2_E = log2(e)
LIMIT = 120.0 * LOG2_E  # decay over a chunk, in powers of two
NOTHING = -115.0  # a state that decays by 2^-115 (e^-80) or more is gone: no denormal numbers
SHORTEST = 16  # tokens: the chunk of a short sequence is a multiple of this


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Scan a sequence.

    Args:
        x: ``(b, l, h, p)`` inputs, any ``l ≥ 1``; fp32, bf16 or fp64.
        dt: ``(b, l, h)`` steps after softplus, fp32 (fp64 for fp64 ``x``).
        A: ``(h,)`` decay rates, negative, of the dtype of ``dt``.
        B, C: ``(b, l, g, n)`` of the dtype of ``x``; head ``i`` belongs to group ``i // (h/g)``.
        state: ``(b, g, n, h/g, p)`` where the scan starts, of the dtype of ``dt``; None: 0.
        chunk: Tokens per chunk.
        backend: ``torch`` (chunked) or ``ref`` (token by token, to test against).

    Returns:
        ``y (b, l, h, p)`` and the state after the last token. Both have gradients, once.

    Raises:
        RecipeError: fp16, an unknown backend, or a chunk of no tokens.
    """
    if backend not in BACKENDS or chunk < 1:
        raise RecipeError(f"ssd needs backend torch or ref and chunk ≥ 1, got {backend}, {chunk}")
    check_range(x.dtype)
    if state is None:
        state = first_state(x, B)
    if backend == "ref":
        return _sequential(x, dt, A, B, C, state)
    y, final = _SSD.apply(x, dt, A, B, C, state, chunk)
    return y, final


def check_range(dtype: torch.dtype) -> None:
    """:class:`RecipeError` for fp16."""
    if dtype == torch.float16:
        raise RecipeError("fp16 has not the range for Mamba's decays: use bf16 or fp32")


def first_state(x: Tensor, B: Tensor) -> Tensor:
    """Zeros ``(b, g, n, h/g, p)`` for ``x (b, l, h, p)`` and ``B (b, l, g, n)``."""
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(b, g, n, h // g, p, dtype=wide, device=x.device)


def step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: ``x (b, h, p)``, ``dt (b, h)``, ``B, C (b, g, n)`` → ``y (b, h, p)`` and state."""
    b, g, n, r, p = state.shape
    fed = (x.to(state.dtype) * dt[..., None]).view(b, g, 1, r, p)
    decay = torch.exp(dt * A).view(b, g, 1, r, 1)
    state = state * decay + B.to(state.dtype).view(b, g, n, 1, 1) * fed
    y = torch.einsum("bgn,bgnrp->bgrp", C.to(state.dtype), state).reshape(b, g * r, p)
    return y.to(x.dtype), state


def _sequential(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    rows = (t.unbind(1) for t in (x, dt, B, C))
    for x_t, dt_t, B_t, C_t in zip(*rows, strict=True):
        y, state = step(x_t, dt_t, A, B_t, C_t, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


class Chunks(NamedTuple):
    """How a sequence is cut: ``rows`` chunks of ``size`` tokens.

    ``where (l,)`` is the place of each token among ``rows · size``; None: the first ones.
    """

    size: int
    rows: int
    where: Tensor | None

    def spread(self, t: Tensor) -> Tensor:
        """``(b, l, …)`` → ``(b, rows · size, …)``; places without a token are 0."""
        length = self.rows * self.size
        if self.where is not None:
            out = t.new_zeros(t.shape[0], length, *t.shape[2:])
            return out.index_copy_(1, self.where, t)
        if t.shape[1] == length:
            return t
        return F.pad(t, [0, 0] * (t.ndim - 2) + [0, length - t.shape[1]])

    def collect(self, t: Tensor, length: int) -> Tensor:
        """The inverse of :meth:`spread`."""
        if self.where is not None:
            return t.index_select(1, self.where)
        return t[:, :length]


def cut(dt: Tensor, A: Tensor, chunk: int) -> Chunks:
    """Chunks over none of which the state decays by more than e^-120 (but for single tokens)."""
    length = dt.shape[1]
    size = min(chunk, SHORTEST * ceil(length / SHORTEST))
    plain = Chunks(size, ceil(length / size), None)
    if dt.is_meta or isinstance(dt, FakeTensor):
        return plain
    decay = dt.detach() * (A.detach() * LOG2_E)
    total = plain.spread(decay).view(len(dt), plain.rows, size, -1).sum(2)
    if not total.amin() < -LIMIT:  # also NaN: it must reach the output
        return plain
    first = _firsts(plain.spread(decay).view(len(dt), plain.rows, size, -1))[:length]
    number = first.cumsum(0) - 1
    starts = first.nonzero()[:, 0]
    where = number * size + torch.arange(length) - starts[number]
    return Chunks(size, len(starts), where.to(dt.device))


def _firsts(decay: Tensor) -> Tensor:
    """Which tokens start a chunk, ``(c · q,)`` bool, for the decays ``(b, c, q, h)`` of each."""
    steps = decay.permute(1, 2, 0, 3).flatten(2).cpu()
    first = torch.zeros(steps.shape[:2], dtype=torch.bool)
    run = torch.zeros_like(steps[:, 0])
    for token in range(steps.shape[1]):
        further = run + steps[:, token]
        far = further.amin(1) < -LIMIT
        first[:, token] = far if token else True
        run = torch.where(first[:, token, None], steps[:, token], further)
    return first.flatten()


class Kept(NamedTuple):
    """What the backward pass of a scan needs, beside its inputs."""

    fed: Tensor  # (b·c·g, q, r·p) x · dt · e^(mid − cs)
    attention: Tensor  # (b·c·g, q, q) tril(C Bᵀ)
    states: Tensor  # (b, c + 1, g, n, r, p) before and after each chunk
    carried: Tensor  # (b·c·g, n, r·p) states before each chunk · e^mid
    down: Tensor  # (b, c, q, h) e^(cs − mid)
    up: Tensor  # (b, c, q, h) e^(mid − cs)
    mid: Tensor  # (b, c, h) e^mid
    rest: Tensor  # (b, c, h) e^(total − mid)
    through: Tensor  # (b, c, h) e^total


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, q: int
) -> tuple[Tensor, Tensor, Kept]:
    """Forward pass over whole chunks of ``q`` tokens. Shapes as :func:`ssd`; no autograd."""
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    c, r = length // q, h // g
    decay = (dt * (A * LOG2_E)).view(b, c, q, h).cumsum(2)
    down, up, mid, rest, through = _factors(decay)
    fed = _stack(x, (up * dt.view(b, c, q, h)).to(x.dtype), g)
    Bs, Cs = _group(B, c), _group(C, c)
    attention = torch.bmm(Cs, Bs.transpose(1, 2)).tril_()
    own = torch.bmm(Bs.transpose(1, 2), fed).view(b, c, g, n, r, p)
    states = state.new_empty(b, c + 1, g, n, r, p)
    states[:, 0] = state
    torch.mul(own.to(state.dtype), _over_states(rest, g), out=states[:, 1:])
    decays = _over_states(through, g)
    for i in range(c):
        states[:, i + 1].addcmul_(states[:, i], decays[:, i])
    carried = (states[:, :-1] * _over_states(mid, g)).to(x.dtype).view(b * c * g, n, r * p)
    y = torch.baddbmm(torch.bmm(attention, fed), Cs, carried)
    y = _unstack(y, b, c, h).mul_(down.to(x.dtype)[..., None]).view(b, length, h, p)
    final = states[:, -1].clone()  # not a view that keeps all states alive
    return y, final, Kept(fed, attention, states, carried, down, up, mid, rest, through)


class Gradients(NamedTuple):
    """Gradients of the inputs of :func:`scan`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    state: Tensor


def scan_backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    kept: Kept,
    y: Tensor,
    dy: Tensor,
    dstate: Tensor | None,
) -> Gradients:
    """Backward pass of :func:`scan`.

    Args:
        inputs: x, dt, A, B, C as given to :func:`scan`.
        kept: From :func:`scan`.
        y: Its output, nothing added: its rounding would drown the gradient of the decays.
        dy, dstate: Gradients of both outputs; ``dstate`` None: 0.
    """
    x, dt, A, B, C = inputs
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    c, r = kept.mid.shape[1], h // g
    q = length // c
    wide = dt.dtype
    Bs, Cs = _group(B, c), _group(C, c)
    out = _stack(dy, kept.down.to(x.dtype), g)
    d_attention = torch.bmm(out, kept.fed.transpose(1, 2)).tril_()
    # Walk back through the chunks: d_states becomes the gradient of the state after each chunk.
    d_states = torch.bmm(Cs.transpose(1, 2), out).view(b, c, g, n, r, p).to(wide)
    d_states.mul_(_over_states(kept.mid, g))
    decays = _over_states(kept.through, g)
    current = torch.zeros_like(kept.states[:, 0]) if dstate is None else dstate
    for i in range(c - 1, -1, -1):
        before = torch.addcmul(d_states[:, i], current, decays[:, i])
        d_states[:, i] = current
        current = before
    # All of the state after a chunk scales with e^total.
    d_total = (kept.states[:, 1:] * d_states).sum((3, 5)).view(b, c, h)
    d_own = (d_states * _over_states(kept.rest, g)).to(x.dtype).view(b * c * g, n, r * p)
    d_fed = torch.baddbmm(torch.bmm(Bs, d_own), kept.attention.transpose(1, 2), out)
    d_B = torch.bmm(kept.fed, d_own.transpose(1, 2)).baddbmm_(d_attention.transpose(1, 2), Cs)
    d_C = torch.bmm(out, kept.carried.transpose(1, 2)).baddbmm_(d_attention, Bs)
    d_fed = _unstack(d_fed, b, c, h)
    rows = (b, c, q, h, p)
    per_x = _dot(d_fed, x.view(rows), wide) * kept.up
    steps = dt.view(b, c, q, h)
    d_cs = _dot(y.view(rows), dy.view(rows), wide) - per_x * steps
    d_x = d_fed.mul_((kept.up * steps).to(x.dtype)[..., None]).view_as(x)
    d_cs[:, :, -1] += d_total
    d_a = d_cs.flip(2).cumsum(2).flip(2)
    d_dt = (per_x + d_a * A).view_as(dt)
    d_A = (d_a * steps).sum((0, 1, 2))
    return Gradients(d_x, d_dt, d_A, _ungroup(d_B, b, c, g), _ungroup(d_C, b, c, g), current)


def _factors(decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``down, up (b, c, q, h)`` and ``mid, rest, through (b, c, h)`` of :class:`Kept`.

    ``decay (b, c, q, h)`` is the running sum in powers of two. Whole powers are kept apart and
    put together as bits, so that another ``mid`` changes nothing but exponents.
    """
    whole = decay.floor()
    part = decay - whole
    total = decay[:, :, -1]
    mid = ((decay[:, :, 0] + total) * 0.5).floor_()
    shift = whole - mid[:, :, None]
    down = torch.exp2(part).mul_(_power(shift))
    up = torch.exp2(part.neg_()).mul_(_power(shift.neg_()))
    # By products, not by exp2 of their own: its last bit may depend on an element's place.
    middle, rest = _power(mid), down[:, :, -1].clone()
    return down, up, middle, rest, rest * middle * (total > NOTHING)


def _power(k: Tensor) -> Tensor:
    """2^k for whole numbers ``k`` (floating point), exactly; 0 below the normal numbers."""
    if k.dtype == torch.float64:
        return (k.clamp(min=-1023) + 1023).to(torch.int64).bitwise_left_shift_(52).view(k.dtype)
    return (k.clamp(min=-127) + 127).to(torch.int32).bitwise_left_shift_(23).view(k.dtype)


def _dot(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Sum of products over the last axis. The sum is rounded once: a CPU copies all to widen it."""
    return (a * b).sum(-1).to(wide)


def _over_states(factor: Tensor, g: int) -> Tensor:
    """``(b, c, h)`` → ``(b, c, g, 1, r, 1)``."""
    return factor.view(*factor.shape[:2], g, 1, -1, 1)


def _stack(x: Tensor, factor: Tensor, g: int) -> Tensor:
    """``x (b, l, h, p) · factor (b, c, q, h)`` → ``(b·c·g, q, r·p)``."""
    b, c, q, h = factor.shape
    scaled = x.view(b, c, q, h, -1) * factor[..., None]
    return scaled.view(b, c, q, g, -1).transpose(2, 3).reshape(b * c * g, q, -1)


def _unstack(rows: Tensor, b: int, c: int, h: int) -> Tensor:
    """``(b·c·g, q, r·p)`` → ``(b, c, q, h, p)``."""
    g, q = rows.shape[0] // (b * c), rows.shape[1]
    return rows.view(b, c, g, q, -1).transpose(2, 3).reshape(b, c, q, h, -1)


def _group(t: Tensor, c: int) -> Tensor:
    """``(b, l, g, n)`` → ``(b·c·g, q, n)``."""
    b, length, g, n = t.shape
    return t.view(b, c, length // c, g, n).transpose(2, 3).reshape(b * c * g, -1, n)


def _ungroup(t: Tensor, b: int, c: int, g: int) -> Tensor:
    """``(b·c·g, q, n)`` → ``(b, l, g, n)``."""
    return t.view(b, c, g, *t.shape[1:]).transpose(2, 3).flatten(1, 2)


class _SSD(torch.autograd.Function):
    """:func:`scan` over any length, with its gradient."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        chunks = cut(dt, A, chunk)
        padded = [chunks.spread(t).contiguous() for t in (x, dt, B, C)]
        y, final, kept = scan(padded[0], padded[1], A, padded[2], padded[3], state, chunks.size)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*padded, A, y, *kept)
        ctx.chunks, ctx.length = chunks, x.shape[1]
        return chunks.collect(y, x.shape[1]), final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, dt, B, C, A, y, *kept = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else ctx.chunks.spread(dy).contiguous()
        d = scan_backward((x, dt, A, B, C), Kept(*kept), y, dy, dstate)
        dx, ddt, dB, dC = (ctx.chunks.collect(t, ctx.length) for t in (d.x, d.dt, d.B, d.C))
        return dx, ddt, d.A, dB, dC, d.state, None
