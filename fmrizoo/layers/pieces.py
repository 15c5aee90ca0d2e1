"""Working on some rows at a time, with the activations kept or made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Of the widest activation (in the MLP) of the rows that are worked on at a time: what a CPU's cache
# holds, and elsewhere what keeps a device busy.
PIECE_BYTES = 1 << 23
DEVICE_PIECE_BYTES = 1 << 27


def piece_rows(width: int, mlp_ratio: float, device: torch.device) -> int:
    """Rows of ``width`` that are best worked on at a time."""
    size = PIECE_BYTES if device.type == "cpu" else DEVICE_PIECE_BYTES
    return max(1, int(size / (4 * width * mlp_ratio)))


def works_by_pieces(x: Tensor, checkpointing: str) -> bool:
    """Whether a pass over ``x`` is split up.

    On a CPU fp32 products are several times faster on pieces that fit the cache, bf16 ones are not;
    recomputing by pieces keeps the activations of one piece only.
    """
    cached = x.device.type == "cpu" and x.dtype == torch.float32
    return cached or checkpointing == "window-chunk"


def wants_gradient(x: Tensor, used: Iterable[nn.Module | Tensor | None]) -> bool:
    """Whether a gradient is wanted of ``x``, or of anything that is ``used`` on it.

    False for the frozen layers below all that trains: nothing has to be kept, or made again.
    """
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad:
        return True
    for one in used:
        if isinstance(one, nn.Module):
            if any(parameter.requires_grad for parameter in one.parameters()):
                return True
        elif one is not None and one.requires_grad:
            return True
    return False


def by_piece(
    job: Callable[[Tensor, int], Tensor],
    x: Tensor,
    sizes: Sequence[int],
    used: Iterable[nn.Module | Tensor | None],
    *,
    dim: int = 0,
    checkpointing: str = "none",
    in_place: bool = True,
) -> Tensor:
    """Run ``job(piece, number)`` on one piece of ``x`` after the other.

    Args:
        job: What to do; its results are put together along ``dim``.
        x: Overwritten where no gradient is wanted: what a piece needs on the way stays small.
        sizes: Of the pieces along ``dim``.
        used: Modules and tensors that ``job`` works with, beside the piece.
        dim: Which axis is cut.
        checkpointing: ``none``; ``block``: keep ``x`` only and do all of it again in the backward
            pass; ``window-chunk``: the same, a piece at a time.
        in_place: False where results have another shape than the pieces.
    """
    wanted = wants_gradient(x, used)
    if not wanted and in_place:
        for number, part in enumerate(torch.split(x, list(sizes), dim)):
            part.copy_(job(part, number))
        return x
    each = job
    if checkpointing == "window-chunk" and wanted:

        def each(part: Tensor, number: int) -> Tensor:
            again: Tensor = checkpoint(job, part, number, use_reentrant=False)
            return again

    def whole(rows: Tensor) -> Tensor:
        done = [each(part, n) for n, part in enumerate(torch.split(rows, list(sizes), dim))]
        return done[0] if len(done) == 1 else torch.cat(done, dim)

    if checkpointing == "block" and wanted:
        result: Tensor = checkpoint(whole, x, use_reentrant=False)
        return result
    return whole(x)
