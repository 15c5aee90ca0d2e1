"""The Mamba-2 mixer on mamba-ssm's Triton scan and causal-conv1d's kernel, on CUDA.

**Written from the packages' interfaces (mamba-ssm 2.3, causal-conv1d 1.5); the kernels could not be
run where fmrizoo is developed (no GPU).** There, tests put plain functions with their interfaces in
their place. What is guarded against, from the packages' sources and issues:

- A packed row resets the state where ``seq_idx`` changes; ``cu_seqlens`` alone does not.
- The convolution wants channels last, with strides and channels in multiples of 8.
- 32-bit offsets overflow without an error (mamba issue 1015): what one call gets is bounded.
"""

from __future__ import annotations

import importlib
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrizoo.backbones.mamba2_slices import Shape, Weights
from fmrizoo.errors import MissingExtraError, RecipeError

KERNELS = ("mamba_ssm", "causal_conv1d")
OFFSETS = 2**31 - 1


def missing_kernels() -> list[str]:
    """Packages of the kernels that are not installed here (nothing is imported)."""
    return [name for name in KERNELS if importlib.util.find_spec(name) is None]


def require_kernels() -> None:
    """:class:`MissingExtraError` unless the kernels are installed."""
    if missing := missing_kernels():
        raise MissingExtraError(
            f"scan_backend=mamba_ssm needs {', '.join(missing)}: "
            "pip install --no-build-isolation 'fmrizoo[mamba]'"
        )


def most_tokens(heads: int, head_dim: int, groups: int, states: int, chunk: int) -> int:
    """Tokens of one call whose projection, and whose states per chunk, 32-bit offsets reach."""
    inner = heads * head_dim
    width = _to_eight(2 * inner + 2 * groups * states + heads)
    per_token = max(width, math.ceil(inner * states / chunk))
    return OFFSETS // per_token


def run_kernels(u: Tensor, sequence: Tensor | None, s: Shape, w: Weights) -> Tensor:
    """``u (b, l, d)`` → same shape; ``sequence (b, l)`` int32 where rows hold several sequences.

    Raises:
        RecipeError: not on CUDA, or a row too long for the kernels' 32-bit offsets.
    """
    if not u.is_cuda:
        raise RecipeError(f"scan_backend=mamba_ssm runs on CUDA only, got {u.device}")
    most = most_tokens(s.heads, s.head_dim, s.groups, s.states, s.chunk)
    if u.shape[1] > most:
        raise RecipeError(
            f"a sequence of {u.shape[1]} tokens is beyond the {most} that mamba_ssm's 32-bit "
            "offsets reach at this width: use backbone.scan_backend=torch"
        )
    rows = max(1, most // u.shape[1])
    parts = [
        compute(part, None if sequence is None else sequence[i * rows : (i + 1) * rows], s, w)
        for i, part in enumerate(torch.split(u, rows))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def compute(u: Tensor, sequence: Tensor | None, s: Shape, w: Weights) -> Tensor:
    """The mixer on the kernels, wherever ``u`` is. Shapes as :func:`run_kernels`."""
    convolve = importlib.import_module("causal_conv1d").causal_conv1d_fn
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    source, u = u, u.to(s.dtype)
    if s.prenorm:
        u = F.rms_norm(u, u.shape[-1:], eps=s.eps)
    # Rows of a width that is a multiple of 8; the rest stays unused.
    spare = _to_eight(len(w.inward)) - len(w.inward)
    bias = None if w.inward_bias is None else F.pad(w.inward_bias, (0, spare)).to(s.dtype)
    projected = F.linear(u, F.pad(w.inward, (0, 0, 0, spare)).to(s.dtype), bias)
    z, xBC, dt, _ = torch.split(projected, [s.inner, s.mixed, s.heads, spare], -1)
    spare = _to_eight(s.mixed) - s.mixed
    if spare or s.inner % 8:
        xBC = F.pad(xBC, (0, spare)).contiguous()
    xBC = convolve(
        xBC.transpose(1, 2),
        F.pad(w.conv, (0, 0, 0, spare)).to(s.dtype),
        F.pad(w.conv_bias, (0, spare)).to(s.dtype),
        seq_idx=None if sequence is None else sequence.contiguous(),
        activation="silu",
    ).transpose(1, 2)
    shared = s.groups * s.states
    x, B, C, _ = torch.split(xBC, [s.inner, shared, shared, spare], -1)
    y = scan(
        torch.unflatten(x, -1, (s.heads, s.head_dim)),
        dt,
        w.A,
        torch.unflatten(B, -1, (s.groups, s.states)),
        torch.unflatten(C, -1, (s.groups, s.states)),
        chunk_size=1 << (s.chunk - 1).bit_length(),
        D=w.D.to(w.A.dtype),
        dt_bias=w.dt_bias,
        dt_softplus=True,
        seq_idx=None if sequence is None else sequence.contiguous(),
    )
    gated = torch.unflatten(y.flatten(2) * F.silu(z), -1, (s.groups, -1))
    normed = F.rms_norm(gated, gated.shape[-1:], eps=s.eps).flatten(2)
    bias = None if w.outward_bias is None else w.outward_bias.to(s.dtype)
    out = F.linear(normed, w.outward.to(s.dtype), bias).to(source.dtype)
    return source + out if s.residual else out


def _to_eight(width: int) -> int:
    return math.ceil(width / 8) * 8
