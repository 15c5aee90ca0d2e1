"""What one micro-step keeps in memory and computes, without weights and without arithmetic.

The recipe's real model runs forward and backward on *ghosts*: tensors that say they are on the CPU
but hold a tensor of the meta device, which has a shape and no memory. Index tables, masks and other
integers stay real, so code that asks which voxels are brain gets its answer. Every storage that
comes and goes is counted with its bytes; every matrix product with its FLOPs. So checkpointing,
objectives and decoders need no formula of their own, and a 3B model is traced on a laptop.

What a trace does not see: workspaces inside kernels, the allocator's fragments, and what a device
with other kernels keeps (attention is counted as the fused one, which keeps no score matrix).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fmrizoo.analysis.sizes import brain_of
from fmrizoo.config import Recipe
from fmrizoo.errors import RecipeError
from fmrizoo.trainer.engine import set_checkpointing
from fmrizoo.trainer.zero import DTYPES
from fmrizoo.types import Backbone, Batch, Grid, Voxels
from fmrizoo.zoo import build_model

aten = torch.ops.aten
_REAL = 1 << 16  # elements of a float table that is small enough to be real
_NEW = {aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided}
_FACTORIES = {aten.empty, aten.zeros, aten.ones, aten.full, aten.rand, aten.randn}
# torch's table of FLOPs does not know that these are products too.
_IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
_FLASH = 1  # SDPBackend.FLASH_ATTENTION: what PyTorch chooses on a CPU and on GPUs in bf16


class Ghost(Tensor):
    """A tensor of the CPU to whoever asks, of the meta device inside (``meta``)."""

    meta: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=torch.device("cpu"),
        )
        made.meta = meta
        return made

    def __init__(self, meta: Tensor) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Ghost({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _on_meta(func, args, kwargs or {})


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` with every ghost and every real tensor replaced by a meta tensor."""
    packet = func.overloadpacket
    if packet is aten._local_scalar_dense:
        # A condition counts as not met: "while any value lies outside" must end.
        return 1.0 if args[0].is_floating_point() else args[0].dtype != torch.bool
    if packet is aten._fused_sdp_choice:
        return _FLASH
    if packet is aten.equal:
        return False
    dtype = kwargs.get("dtype")
    if packet in _NEW and dtype is not None and not dtype.is_floating_point:
        return func(torch.empty(0, dtype=args[0].dtype), *args[1:], **kwargs)
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index):
        args = (args[0], _positions(args[1]), *args[2:])
    kind = _kind(func)
    key = None if kind == "view" else (func, _described(args), _described(tuple(kwargs.items())))
    if key in _seen:
        return _again(kind, func, args, kwargs, *_seen[key])
    global _flops
    before = _flops
    owner: dict[int, Tensor] = {}  # meta tensor → the argument that it stands for

    def meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            inner = value.meta if isinstance(value, Ghost) else value.to("meta")
            owner[id(inner)] = value
            return inner
        if isinstance(value, torch.device):
            return torch.device("meta")
        return None if isinstance(value, torch.Generator) else value

    meta_args = _changed(args, meta)
    meta_kwargs = {name: _changed(value, meta) for name, value in kwargs.items()}
    try:
        out = func(*meta_args, **meta_kwargs)
    except NotImplementedError as error:
        raise RecipeError(
            f"this recipe cannot be planned: {packet} depends on values that are not computed "
            f"({str(error).splitlines()[0]})"
        ) from error
    _count(packet, meta_args, meta_kwargs, out)
    if key is not None:
        _seen[key] = _changed(out, _layout), _flops - before

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return owner[id(value)] if id(value) in owner else Ghost(value)

    return _changed(out, wrapped)


class _Layout(NamedTuple):
    """What decides shapes and FLOPs of an operation on a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


# Operations that ran before: what they made and their FLOPs. A model repeats the same operations
# block after block, and PyTorch takes half a millisecond to find the shape of a sum.
_seen: dict[Any, tuple[Any, int]] = {}


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Layout(tuple(value.shape), value.stride(), value.dtype)
    return value


def _described(value: Any) -> Any:
    """Equal for arguments that give the same shapes."""
    if isinstance(value, Tensor):
        return _Layout(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple([_described(one) for one in value])
    return type(value), value  # True is not 1


@cache
def _kind(func: Any) -> str:
    """``fresh`` (its results are new tensors), ``change`` (they are arguments) or ``view``."""
    said = [one.alias_info for one in func._schema.returns]
    if not any(said):
        return "fresh" if not func._schema.is_mutable and said else "view"
    return "change" if all(one is not None and one.is_write for one in said) else "view"


def _again(
    kind: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any, flops: int
) -> Any:
    """What an operation gives that ran before on such arguments."""
    global _flops
    _flops += flops
    if kind == "fresh":
        return _changed(made, _new)
    written = [
        args[at] if at < len(args) else kwargs[one.name]
        for at, one in enumerate(func._schema.arguments)
        if one.alias_info is not None and one.alias_info.is_write
    ]
    return written[0] if len(written) == 1 else tuple(written)


def _new(made: Any) -> Any:
    if not isinstance(made, _Layout):
        return made
    return Ghost(torch.empty_strided(made.shape, made.strides, dtype=made.dtype, device="meta"))


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` made to all that its lists and tuples hold."""
    # An operation's arguments are no deeper trees; torch's pytree takes ten times as long.
    if isinstance(value, list):
        return [_changed(one, change) for one in value]
    if isinstance(value, tuple) and not isinstance(value, _Layout):
        return tuple(_changed(one, change) for one in value)
    return change(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in ``value``, and in its lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _positions(indices: Any) -> list[Tensor | None]:
    """Index tensors with every real mask written as positions, as a meta tensor needs them."""
    found: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            found.extend(index.nonzero().unbind(1))
        else:
            found.append(index)
    return found


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live bytes and FLOPs while it is on.

    Attributes:
        live, peak: Bytes of storages made since the start, now and at most.
        flops: Multiply-adds × 2.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.flops = 0
        self._known: dict[int, int] = {}
        self._ignored: set[int] = set()

    def ignore(self, tensor: Tensor) -> None:
        """Do not count what is there from the start (weights, the batch)."""
        self._ignored.add(_storage(tensor)._cdata)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        for known in tensors:  # a table that an earlier call has made and kept: it is there too
            self._see(known)
        global _flops
        before, _flops = _flops, 0
        if any(isinstance(v, Ghost) for v in tensors):
            out = _on_meta(func, args, kwargs)
        elif not tensors and _large(out := _shape_of(func, args, kwargs)):
            out = Ghost(out)
        else:
            out = func(*args, **kwargs)
        self.flops += _flops
        _flops = before
        for value in _tensors(out):
            self._see(value)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        key = storage._cdata
        if key in self._known or key in self._ignored:
            return
        self._known[key] = size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.live -= size


# torch has no types for these.
_attention: Callable[..., Any] = sdpa_flop_count
_attention_backward: Callable[..., Any] = sdpa_backward_flop_count
_flops = 0  # of the operation that runs now


def _count(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    global _flops
    packet = _IN_PLACE.get(packet, packet)
    if packet in flop_registry:
        _flops += int(flop_registry[packet](*args, **kwargs, out_val=out))
    elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
        _flops += int(_attention(args[0].shape, args[1].shape, args[2].shape))
    elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        shapes = (a.shape for a in args[:4])
        _flops += int(_attention_backward(*shapes))


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.meta if isinstance(tensor, Ghost) else tensor).untyped_storage()


def _shape_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a factory of floats makes, on the meta device; None for anything else."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    if func.overloadpacket not in _FACTORIES or not dtype.is_floating_point:
        return None
    if kwargs.get("generator") is not None:  # drawn on purpose: masks
        return None
    return func(*args, **kwargs | {"device": "meta"})


def _large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > _REAL


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
    _seen.clear()
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
        size = _storage(parameter.grad).nbytes()
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
        batch=_storage(batch.voxels.values).nbytes(),
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
