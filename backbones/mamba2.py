"""The Mamba-2 mixer, with the parameter names and shapes of mamba-ssm.

Source: Dao & Gu 2024. ``in_proj`` gives z, x, B, C, dt; a causal depthwise convolution and SiLU
over x, B, C; the scan of :mod:`fmrizoo.backbones.ssd`; ``out_proj(rms_norm(y · silu(z)))``.
Weights move freely between this module and mamba-ssm's ``Mamba2`` (same names, shapes, defaults).

Two ways to compute it, ``scan_backend``:

- ``torch``: runs anywhere, slices of the sequence at a time (:mod:`.mamba2_slices`).
- ``mamba_ssm``: its CUDA kernels (:mod:`.mamba2_kernels`). ``auto`` takes them where the model is
  on CUDA and the packages are installed. Not run where fmrizoo is developed: no GPU there.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from fmrizoo.backbones.mamba2_kernels import (
    missing_kernels,
    most_tokens,
    require_kernels,
    run_kernels,
)
from fmrizoo.backbones.mamba2_slices import Mix, Shape, Weights
from fmrizoo.backbones.ssd import LIMIT, LOG2_E, SHORTEST, check_range, step
from fmrizoo.errors import RecipeError
from fmrizoo.layers.lora import scale_output
from fmrizoo.layers.ragged import Pack, by_length, end_to_end, give_back, together
from fmrizoo.layers.readout import scaled

BACKENDS = ("auto", "torch", "mamba_ssm")
BATCHING = ("packed", "padded")
EPS = 1e-5
CPU_SLICE, OTHER_SLICE = 1 << 20, 1 << 24  # tokens · inner width of a slice: what a cache holds


@dataclass
class MixerState:
    """Where a mixer stopped.

    Attributes:
        tail: ``(b, d_conv − 1, channels)`` last inputs of the convolution.
        scan: ``(b, g, n, h/g, p)`` state of the scan.
    """

    tail: Tensor
    scan: Tensor


class GatedNorm(nn.Module):
    """Holds the weight of ``rms_norm(y · silu(z))``; the mixer folds it into ``out_proj``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Mamba2(nn.Module):
    """A Mamba-2 mixer: ``(b, l, d_model)`` → same shape, causal along ``l``.

    Args:
        d_model: Width.
        d_state: States per head.
        d_conv: Taps of the convolution.
        expand: Inner width / ``d_model``.
        head_dim: Channels of a head.
        ngroups: Groups of heads that share B and C; the norm is over each group's channels.
        chunk_size: Tokens per chunk of the scan.
        scan_backend: ``auto``, ``torch`` or ``mamba_ssm``.
        batching: How samples of unequal length are run: ``packed`` (no padding is computed) or
            ``padded``.
        bias: Whether both projections have a bias.

    Attributes:
        multiplies, multiplier: On the output (which a residual stream gets), in the weights of the
            last projection, so on every way to compute it; see
            :class:`fmrizoo.layers.readout.ScaledLinear`.

    Raises:
        RecipeError: sizes that do not divide, or an unknown choice.
        MissingExtraError: ``mamba_ssm`` is forced and not installed.
    """

    multiplies: ClassVar[str] = "branch"
    reads_parameters: ClassVar[bool] = True  # of its children, which it does not call
    multiplier: float = 1.0

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        ngroups: int = 1,
        chunk_size: int = 64,
        scan_backend: str = "auto",
        batching: str = "packed",
        bias: bool = False,
    ) -> None:
        super().__init__()
        inner = expand * d_model
        if inner % head_dim or (inner // head_dim) % ngroups:
            raise RecipeError(
                f"head_dim {head_dim} must divide expand·d_model = {inner} into a multiple of "
                f"ngroups = {ngroups} heads"
            )
        if scan_backend not in BACKENDS or batching not in BATCHING:
            raise RecipeError(
                f"scan_backend must be one of {', '.join(BACKENDS)} and batching one of "
                f"{', '.join(BATCHING)}, got {scan_backend!r} and {batching!r}"
            )
        if scan_backend == "mamba_ssm":
            require_kernels()
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.inner, self.head_dim, self.ngroups = inner, head_dim, ngroups
        self.heads = inner // head_dim
        self.chunk_size, self.batching = chunk_size, batching
        self.recompute = False  # in the backward pass, slice by slice
        self.rows: int | None = None  # tokens of a slice; None: by device
        self._backend = scan_backend
        mixed = inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, inner + mixed + self.heads, bias=bias)
        # Never called: holds the weights under mamba-ssm's names, with PyTorch's initialisation.
        self.conv1d = nn.Conv1d(mixed, mixed, d_conv, groups=mixed, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedNorm(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """mamba-ssm's start: steps log-uniform in [0.001, 0.1], decay rates uniform in [1, 16]."""
        if self.A_log.is_meta:  # random numbers of no value take seconds there
            return
        self._start(torch.rand_like(self.dt_bias), torch.rand_like(self.A_log))

    def init_stratified(self) -> None:
        """The same distributions without chance: heads at even quantiles of both.

        Those of the rates are the golden ratio's multiples (mod 1), which go with no order.
        """
        head = torch.arange(self.heads, dtype=torch.float64, device=self.A_log.device) + 0.5
        self._start(head / self.heads, head * (math.sqrt(5) - 1) / 2 % 1)

    @torch.no_grad()
    def _start(self, steps: Tensor, rates: Tensor) -> None:
        """Steps and decay rates at quantiles ``(heads,)`` in [0, 1)."""
        low, high = math.log(0.001), math.log(0.1)
        steps = torch.exp(steps * (high - low) + low)
        self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus(dt_bias) = steps
        self.A_log.copy_(torch.log(rates * 15 + 1))

    @property
    def scan_backend(self) -> str:
        """What this mixer computes with where it is now: ``torch`` or ``mamba_ssm``."""
        if self._backend != "auto":
            return self._backend
        return "mamba_ssm" if self.A_log.is_cuda and not missing_kernels() else "torch"

    def forward(self, u: Tensor, lengths: Tensor | list[int] | None = None) -> Tensor:
        """Run whole sequences.

        Args:
            u: ``(b, l, d_model)``.
            lengths: Tokens of each sample, if they are padded at the end; the output is 0 there.

        Raises:
            RecipeError: fp16.
        """
        if lengths is None:
            return self.run(u, Pack())
        sizes = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
        packs = self.packs(sizes, u.shape[1], u.device)
        out = give_back(packs, [self.run(p.take(u), p) for p in packs], len(u), u.shape[1])
        place = torch.arange(u.shape[1], device=u.device)
        inside = place < torch.tensor(sizes, device=u.device).unsqueeze(1)
        return out * inside.unsqueeze(-1)

    def packs(self, lengths: list[int], length: int, device: torch.device) -> list[Pack]:
        """How samples of ``lengths``, padded to ``length``, go through :meth:`run`."""
        if self.batching == "padded":
            return together(lengths, length, device)
        if self.scan_backend == "mamba_ssm":
            sizes = (self.heads, self.head_dim, self.ngroups, self.d_state, self.chunk_size)
            return end_to_end(lengths, length, device, most_tokens(*sizes))
        return by_length(lengths, length, device)

    def run(
        self,
        u: Tensor,
        pack: Pack,
        *,
        prenorm: Tensor | None = None,
        residual: bool = False,
        reverse: bool = False,
    ) -> Tensor:
        """Run one pack.

        Args:
            u: ``(b', l', d_model)``.
            pack: Which of its tokens belong together.
            prenorm: ``(d_model,)`` weight: RMS-normalise ``u`` first.
            residual: Add ``u`` to the output.
            reverse: Read every sequence backwards.
        """
        u = pack.flip(u) if reverse else u
        if self.scan_backend == "mamba_ssm":
            s, w = self.shape(u, prenorm is not None, residual), self.weights(prenorm)
            out = run_kernels(u, pack.sequence, s, w)
        else:
            out, _ = self._run_slices(u, None, prenorm, residual)
        return pack.flip(out) if reverse else out

    def extend(
        self,
        u: Tensor,
        state: MixerState | None = None,
        *,
        prenorm: Tensor | None = None,
        residual: bool = False,
    ) -> tuple[Tensor, MixerState]:
        """Go on with sequences: the next ``(b, l, d_model)``, any ``l ≥ 1``.

        Calls one after the other equal one call on the whole. Always computed with ``torch``.
        """
        if u.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
            return self._step(u, state, prenorm, residual)
        return self._run_slices(u, state, prenorm, residual)

    def weights(self, prenorm: Tensor | None = None) -> Weights:
        """The parameters as the computation takes them."""
        inward, inward_bias = _matrix(self.in_proj)
        outward, outward_bias = _matrix(self.out_proj)
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        if prenorm is not None:
            inward = inward * prenorm
        return Weights(
            inward=inward,
            inward_bias=inward_bias,
            conv=self.conv1d.weight.squeeze(1),
            conv_bias=self.conv1d.bias,  # type: ignore[arg-type]
            A=-torch.exp(self.A_log.to(wide)),
            D=self.D,
            dt_bias=self.dt_bias.to(wide),
            outward=scaled(outward * self.norm.weight, self.multiplier),
            outward_bias=None if outward_bias is None else scaled(outward_bias, self.multiplier),
        )

    def fold_multiplier(self) -> None:
        """Put ``multiplier`` into the last projection; the mixer computes the same."""
        scale_output(self.out_proj, self.multiplier)
        self.multiplier = 1.0

    def slice_length(self, batch: int, device: torch.device) -> int:
        """Tokens of each sample that are computed at a time."""
        size = CPU_SLICE if device.type == "cpu" else OTHER_SLICE
        rows = self.rows or max(512, size // self.inner)
        return max(1, rows // batch // self.chunk_size) * self.chunk_size

    def shape(self, u: Tensor, prenorm: bool, residual: bool) -> Shape:
        """How ``u`` is computed; products in the dtype of ``u``, or that of autocast."""
        device, dtype = u.device.type, u.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        check_range(dtype)
        return Shape(
            heads=self.heads,
            head_dim=self.head_dim,
            groups=self.ngroups,
            states=self.d_state,
            taps=self.d_conv,
            eps=EPS,
            chunk=self.chunk_size,
            length=self.slice_length(len(u), u.device),
            dtype=dtype,
            recompute=self.recompute,
            prenorm=prenorm,
            residual=residual,
        )

    def flops(self, tokens: int) -> dict[str, int]:
        """FLOPs (2 per multiply-add) of one sequence on slices, matrix products and convolution."""
        every = self.slice_length(1, self.A_log.device)
        pairs = rows = 0
        for start in range(0, tokens, every):
            length = min(every, tokens - start)
            chunk = min(self.chunk_size, SHORTEST * math.ceil(length / SHORTEST))
            rows += math.ceil(length / chunk) * chunk
            pairs += math.ceil(length / chunk) * chunk**2
        scan = pairs * (self.ngroups * self.d_state + self.inner)
        mixed = self.inner + 2 * self.ngroups * self.d_state
        width = self.inner + mixed + self.heads + self.inner
        return {
            "projections": 2 * tokens * self.d_model * width,
            "convolution": 2 * tokens * self.conv1d.weight.numel(),
            "scan": 2 * (scan + 2 * rows * self.d_state * self.inner),
        }

    def _run_slices(
        self, u: Tensor, state: MixerState | None, prenorm: Tensor | None, residual: bool
    ) -> tuple[Tensor, MixerState]:
        s, w = self.shape(u, prenorm is not None, residual), self.weights(prenorm)
        s = s._replace(chunk=_fitting_chunk(s.chunk, w))
        if state is None:
            tail = u.new_zeros(len(u), s.taps - 1, s.mixed, dtype=s.dtype)
            scan = w.A.new_zeros(len(u), s.groups, s.states, s.heads // s.groups, s.head_dim)
        else:
            tail, scan = state.tail, state.scan
        given: tuple[Any, ...] = (u, tail, scan, s, *w)
        if not torch.is_grad_enabled():
            # A Function cannot see that no gradients are recorded: it would keep all activations.
            given = tuple(t.detach() if isinstance(t, Tensor) else t for t in given)
        with _no_autocast(u):
            out, tail, scan = Mix.apply(*given)
        return out, MixerState(tail, scan)

    def _step(
        self, u: Tensor, state: MixerState, prenorm: Tensor | None, residual: bool
    ) -> tuple[Tensor, MixerState]:
        """One token, without what a slice needs to be cut and put together."""
        s = self.shape(u, prenorm is not None, residual)
        w = self.weights(prenorm).cast(s.dtype)
        source, u = u, u[:, 0].to(s.dtype)
        with _no_autocast(u):
            if prenorm is not None:
                u = F.rms_norm(u, u.shape[-1:], eps=EPS)
            projected = F.linear(u, w.inward, w.inward_bias)
            z, xBC, dt = torch.split(projected, [s.inner, s.mixed, s.heads], -1)
            window = torch.cat([state.tail, xBC.unsqueeze(1)], 1)
            mixed = F.silu((window * w.conv.t()).sum(1) + w.conv_bias)
            x, B, C = torch.split(mixed, [s.inner, s.groups * s.states, s.groups * s.states], -1)
            x = torch.unflatten(x, -1, (s.heads, s.head_dim))
            y, scan = step(
                x,
                F.softplus(dt.to(w.A.dtype) + w.dt_bias),
                w.A,
                torch.unflatten(B, -1, (s.groups, s.states)),
                torch.unflatten(C, -1, (s.groups, s.states)),
                state.scan,
            )
            gated = (torch.addcmul(y, x, w.D[:, None]).flatten(1) * F.silu(z)).view(
                len(u), s.groups, -1
            )
            normed = F.rms_norm(gated, gated.shape[-1:], eps=EPS).flatten(1)
            out = F.linear(normed, w.outward, w.outward_bias).unsqueeze(1)
        out = (source + out if residual else out).to(source.dtype)
        return out, MixerState(window[:, 1:], scan)


def _matrix(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a Linear, or of whatever linear module has taken its place.

    An adapter around the Linear (LoRA; ``base_layer`` is what it wraps, which may be an adapter
    too) is read off by what it makes of the unit vectors. Autograd takes the gradient on to the
    adapter. Its dropout, if any, then leaves out the same inputs of all tokens.
    """
    if type(linear) is nn.Linear:
        return linear.weight, linear.bias
    inner: Any = linear
    bias_name = "bias"
    while not isinstance(inner, nn.Linear):
        if not hasattr(inner, "base_layer"):
            raise RecipeError(
                f"a Mamba projection may be a Linear or an adapter with a base_layer, got a "
                f"{type(inner).__name__}"
            )
        inner = inner.base_layer
        bias_name = f"base_layer.{bias_name}"
    weight: Tensor = inner.weight
    bias: Tensor | None = inner.bias
    unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    with _no_autocast(unit):
        # Contiguous as a weight: an adapter that adds nothing yet changes no bit of the products.
        if bias is None:
            return linear(unit).t().contiguous(), None
        # Without the bias: in bf16 the sum would round the weights.
        nothing = {bias_name: torch.zeros_like(bias)}
        return torch.func.functional_call(linear, nothing, (unit,)).t().contiguous(), bias


def _no_autocast(u: Tensor) -> AbstractContextManager[object]:
    """What is computed inside keeps its dtypes (the meta device knows no autocast)."""
    device = u.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _fitting_chunk(chunk: int, w: Weights) -> int:
    """A chunk over which the state decays by less than e^-120 at the steps that the biases give.

    Longer ones would be cut most of the time. By the weights alone: what is computed for a token
    must not depend on later ones.
    """
    if w.A.is_meta or isinstance(w.A, FakeTensor):
        return chunk
    fastest = float((w.A.detach() * F.softplus(w.dt_bias.detach())).amin())
    while chunk > SHORTEST and chunk * fastest * LOG2_E < -LIMIT:
        chunk = max(SHORTEST, chunk // 2)
    return chunk
