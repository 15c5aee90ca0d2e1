"""What one micro-step keeps in memory and computes, without weights and without arithmetic.

The recipe's real model runs forward and backward on :mod:`fmrizoo.cluster.ghosts`: tensors that
say they are on the CPU but hold a tensor of the meta device, which has a shape and no memory. Index
tables, masks and other integers stay real, so code that asks which voxels are brain gets its
answer. Every storage that comes and goes is counted with its bytes; every matrix product with its
FLOPs. So checkpointing, objectives and decoders need no formula of their own, and a 3B model is
traced on a laptop.

What a trace does not see: workspaces inside kernels, the allocator's fragments, and what a device
with other kernels keeps (attention is counted as the fused one, which keeps no score matrix).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmrizoo.analysis.sizes import brain_of
from fmrizoo.cluster.ghosts import Ghost, Tracer, forget, storage_of
from fmrizoo.config import Recipe
from fmrizoo.errors import RecipeError
from fmrizoo.trainer.engine import set_checkpointing
from fmrizoo.trainer.zero import DTYPES
from fmrizoo.types import Backbone, Batch, Grid, Voxels
from fmrizoo.zoo import build_model


@dataclass(frozen=True)
class Moment:
    """The stretch of a step that ends when a parameter's gradient is ready.

    Attributes:
        peak: Bytes of activations at most, this gradient not counted.
        gradient: Elements of the parameter whose gradient ends the stretch; 0 for the last stretch.
    """

    peak: int
    gradient: int


@dataclass(frozen=True)
class Trace:
    """One micro-step of one rank.

    Attributes:
        parameters, trained: Of the model.
        largest: Elements of the largest trained parameter.
        buffers: Bytes of the model's buffers.
        batch: Bytes of the clips as they arrive.
        forward: Bytes kept at the end of the forward pass.
        peak: Bytes of activations at most.
        moments: The step in order, for what the gradients add.
        forward_flops, flops: Of one micro-step; the latter with backward pass and recomputation.
    """

    parameters: int
    trained: int
    largest: int
    buffers: int
    batch: int
    forward: int
    peak: int
    moments: tuple[Moment, ...]
    forward_flops: int
    flops: int


def trace_step(recipe: Recipe, clips: int) -> Trace:
    """Trace a micro-step of ``clips`` clips of a pretraining recipe, with its checkpointing.

    Raises:
        RecipeError: no objective, no clip, or a model that asks for values.
    """
    if recipe.objective is None or recipe.backbone is None:
        raise RecipeError("plan train needs a pretraining recipe, with a backbone and an objective")
    if clips < 1:
        raise RecipeError(f"a micro-step needs at least 1 clip, got {clips}")
    dtype = DTYPES[recipe.train.precision]
    forget()
    with _sane(), Tracer():
        model = build_model(recipe)
    # Outside: a factory that runs under the tracer gives a ghost, and this one must not be nested.
    _haunt(model, dtype)
    model.train()
    set_checkpointing(model, recipe.train.checkpointing)
    parameters = list(model.parameters())
    with _sane():
        batch = made_up_clips(recipe, model.backbone, clips, dtype, ghosts=True)  # type: ignore[arg-type]
    tracer, moments = Tracer(), list[Moment]()

    def ready(parameter: Tensor) -> None:
        assert parameter.grad is not None
        size = storage_of(parameter.grad).nbytes()
        # Its own bytes belong to the stage's rule for gradients, not to the activations.
        moments.append(Moment(max(tracer.peak - size, 0), parameter.numel()))
        parameter.grad = None
        tracer.peak = tracer.live

    for buffer in model.buffers():
        tracer.ignore(buffer)
    for parameter in parameters:
        tracer.ignore(parameter)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(ready)  # type: ignore[no-untyped-call]
    assert batch.voxels is not None
    tracer.ignore(batch.voxels.values)
    with _sane(), tracer:
        loss, _ = model(batch)
        forward, forward_flops = tracer.live, tracer.flops
        loss.backward()
    moments.append(Moment(tracer.peak, 0))
    trained = [p.numel() for p in parameters if p.requires_grad]
    return Trace(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(trained),
        largest=max(trained),
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        batch=storage_of(batch.voxels.values).nbytes(),
        forward=forward,
        peak=max(m.peak for m in moments),
        moments=tuple(moments),
        forward_flops=forward_flops,
        flops=tracer.flops,
    )


@contextmanager
def _sane() -> Iterator[None]:
    """The caller's random state is left alone."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _haunt(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters become ghosts of ``dtype``; buffers stay real, those of floats in ``dtype``."""
    made: dict[int, nn.Parameter] = {}  # a shared parameter stays one
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = made.setdefault(id(old), _parameter(old, dtype))
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def _parameter(old: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    inner = torch.empty(old.shape, dtype=dtype, device="meta")
    new = nn.Parameter(Ghost(inner), requires_grad=old.requires_grad)
    for key, value in vars(old).items():
        if key != "meta":  # of a parameter that was born a ghost
            setattr(new, key, value)
    return new


def made_up_clips(
    recipe: Recipe, backbone: Backbone, clips: int, dtype: torch.dtype, *, ghosts: bool = False
) -> Batch:
    """Made-up compact clips whose brain is a ball that meets as many patches as a brain does."""
    size = getattr(recipe.backbone, "img_size", None)
    grid = (Grid(*size) if size else backbone.clip_grid)._replace(t=recipe.data.clip_frames)
    mask = brain_of(grid[:3])
    index = mask.flatten().nonzero()[:, 0]
    shape = (grid.t, clips * len(index))
    values = (
        Ghost(torch.empty(shape, dtype=dtype, device="meta"))
        if ghosts
        else torch.randn(shape).to(dtype)
    )
    background = torch.full((clips,), -2.0, dtype=dtype)
    return Batch.compact(
        Voxels(values, index.repeat(clips), (len(index),) * clips, background, grid),
        mask=mask.expand(clips, *mask.shape),
        tr=torch.ones(clips),
        subject=["made up"] * clips,
        run=["made up"] * clips,
        start=torch.zeros(clips),
        seed=torch.arange(clips),
    )
