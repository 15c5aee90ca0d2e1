"""A model of several ranks is drawn or loaded once: by rank 0. The others take its values.

Built inside :func:`construction`, a model on another rank has parameters with shapes but no values
(PyTorch's meta device) and real buffers. The engine gives it rank 0's values, one parameter at a
time: a rank then holds its own copy or, at ZeRO 3, its share and one whole parameter, never a
second model beside it.

``deepspeed.zero.Init()`` around the constructors is not used for this: it takes a module's
parameters apart as soon as the module is made, and loses what its parent draws for it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmrizoo.trainer.device import World


@contextmanager
def construction(world: World) -> Iterator[None]:
    """Build a model inside: rank 0's has values, those of the other ranks have none.

    A constructor may do to its parameters what it likes, but not look at what their values are.
    """
    if world.main:
        yield
        return
    register = nn.Module.register_parameter

    def withheld(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            _become(param, torch.empty_like(param, device="meta"))

    nn.Module.register_parameter = withheld  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def share(
    model: nn.Module, world: World, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Rank 0's parameters and buffers on all ranks, which call this together, and on ``device``.

    Args:
        model: In place: its parameters stay the objects that they are.
        dtype: Of the parameters afterwards.
    """
    for parameter in model.parameters():
        _place(parameter, device, dtype)
        _broadcast(parameter.data, world)
    _share_buffers(model, world, device)


def partition(
    model: nn.Module, world: World, device: torch.device, dtype: torch.dtype, zero: Any, config: Any
) -> None:
    """As :func:`share`, for ZeRO 3: every parameter is taken apart before the next one is made.

    Args:
        zero: ``deepspeed.zero``.
        config: DeepSpeed's, of the engine that will train the model.
    """
    # What deepspeed.initialize would do with the whole model; it broadcasts from rank 0 as well.
    zero.Init(module=_OneByOne(model, device, dtype), config_dict_or_path=config, dtype=dtype)
    _share_buffers(model, world, device)


class _OneByOne(nn.Module):
    """Parameters of another model that are made when they are asked for."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._given = [model]  # in a list: not a submodule
        self._device, self._dtype = device, dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """One after the other; what is done with one is done before the next is made."""
        for parameter in self._given[0].parameters():
            _place(parameter, self._device, self._dtype)
            yield parameter


def _place(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> None:
    """On ``device`` in ``dtype``, with its values, or with any if it has none."""
    if not parameter.is_meta:
        parameter.data = parameter.data.to(device, dtype).contiguous()
    else:
        _become(parameter, torch.empty_like(parameter, device=device, dtype=dtype))


def _become(parameter: nn.Parameter, value: Tensor) -> None:
    """``parameter`` stays the object that others know, with another tensor in it."""
    # Assigning to .data cannot cross from or to the meta device.
    other = nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
    other.__dict__.update(parameter.__dict__)  # marks, such as _no_weight_decay
    torch.utils.swap_tensors(parameter, other)  # type: ignore[no-untyped-call]


def _share_buffers(model: nn.Module, world: World, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device).contiguous()
                _broadcast(module._buffers[name], world)


def _broadcast(value: Tensor | None, world: World) -> None:
    if world.size > 1 and value is not None and value.numel():
        # As bytes: backends differ in the types that they know.
        dist.broadcast(value.view(-1).view(torch.uint8), 0)
