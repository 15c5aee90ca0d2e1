"""``train.compile``: ``torch.compile`` on the blocks of a backbone, or on the model as a whole.

Modules are compiled in place (:meth:`torch.nn.Module.compile`), so that no parameter gets another
name. What cannot be compiled is an error and never quietly run as it is; a graph may still break
into several, as it does around the hooks with which ZeRO 3 brings parameters together.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fmrizoo.errors import RecipeError, TrainingError

log = logging.getLogger(__name__)

# Shapes for which one piece of code may be compiled: stages differ in width, clips in length,
# training from validation. PyTorch's 8 would be used up, and the rest run uncompiled.
MOST_SHAPES = 256
BACKEND = "inductor"  # PyTorch's default


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated parts of a model's backbone by name: members of its innermost module lists.

    Blocks of one shape share what is compiled for the first of them.
    """
    backbone = getattr(model, "backbone", model)
    lists = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList)]
    inner = [
        (name, members)
        for name, members in lists
        if not any(other.startswith(f"{name}.") for other, _ in lists)
    ]
    return {
        f"{name}.{number}": member
        for name, members in inner
        for number, member in enumerate(members)
        # A table or a single layer is nothing to compile.
        if next(member.children(), None) is not None
    }


def set_compile(model: nn.Module, mode: str, device: torch.device) -> None:
    """Have ``model``, or the blocks of its backbone, compiled when they first run.

    Raises:
        RecipeError: ``blocks`` of a model that has none.
        TrainingError: this machine has no compiler.
    """
    if mode == "none":
        return
    _check_compiler(mode, device)
    # Cached functions of the backbones give the same for the same; so does tracing through them.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    # Dynamo looks at the gradient of what goes into a block, which has none of its own.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
    # Beyond the limit PyTorch warns and goes on uncompiled.
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    chosen = {"the model": model} if mode == "model" else blocks_of(model)
    if not chosen:
        raise RecipeError(
            f"train.compile=blocks but {type(getattr(model, 'backbone', model)).__name__} has no "
            f"list of blocks; use train.compile=model or none"
        )
    for module in chosen.values():
        module.compile(backend=BACKEND)
    log.info("train.compile=%s: %d modules are compiled at their first step", mode, len(chosen))


def check_gathered(model: nn.Module) -> None:
    """Refuse to compile at ZeRO 3 what reads parameters of modules that it does not call.

    The compiler does not see that DeepSpeed gathers them then, and takes them for empty ones.

    Raises:
        RecipeError: a module whose class says so (``reads_parameters``).
    """
    found = (type(m).__name__ for m in model.modules() if getattr(m, "reads_parameters", False))
    if name := next(found, None):
        raise RecipeError(
            f"train.compile cannot be used at ZeRO 3 with {name}, which reads the parameters of "
            f"its parts by itself; use train.zero_stage=2 or train.compile=none"
        )


def hide_gathering(optimizer: Any) -> None:
    """Keep Dynamo out of the hooks with which DeepSpeed's ZeRO 3 ``optimizer`` gathers parameters.

    It would trace their bookkeeping, and fails in it where a block is recomputed.
    """
    hooks = optimizer.parameter_offload
    for when in ("pre", "post"):
        for what in ("forward", "backward"):
            name = f"{when}_sub_module_{what}_function"
            setattr(hooks, name, torch.compiler.disable(getattr(hooks, name)))  # type: ignore[no-untyped-call]


@contextmanager
def compiled(mode: str) -> Iterator[None]:
    """Around what runs compiled modules: their failures in one sentence.

    Raises:
        TrainingError: something could not be compiled.
    """
    if mode == "none":
        yield
        return
    try:
        yield
    except (
        torch._dynamo.exc.TorchDynamoException,
        torch._dynamo.exc.FailOnRecompileLimitHit,
    ) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The first line often only says who raised what the second says.
        reason = " ".join(lines[: 2 if lines[:1] and lines[0].endswith(":") else 1])
        raise TrainingError(
            f"train.compile={mode} failed: {reason or type(error).__name__}; use "
            f"train.compile=none, or TORCH_LOGS=+dynamo to see where"
        ) from error


def _check_compiler(mode: str, device: torch.device) -> None:
    """What PyTorch's default backend writes must find a compiler: C++ on a CPU, else Triton too."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise TrainingError(
            f"train.compile={mode} needs a C++ compiler, and there is no {compiler} in PATH: "
            f"install one, set CXX to it, or use train.compile=none"
        )
    if device.type != "cpu" and not torch.utils._triton.has_triton():
        raise TrainingError(
            f"train.compile={mode} on {device.type} needs Triton, which this PyTorch "
            f"({torch.__version__}) does not find: install it, or use train.compile=none"
        )
