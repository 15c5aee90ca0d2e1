"""Tensors without values: they say that they are on the CPU and hold one of the meta device.

:class:`Tracer` counts the bytes of all that are alive and the FLOPs of what is done to them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fmrizoo.errors import RecipeError

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


def forget() -> None:
    """What operations gave before is not remembered any longer."""
    _seen.clear()


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
        self._ignored.add(storage_of(tensor)._cdata)

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
        storage = storage_of(tensor)
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


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Of the meta tensor inside, for a ghost."""
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
