"""Forward multipliers: plain floats on the modules that have a place for one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fmrizoo.errors import RecipeError
from fmrizoo.mup.depth import Depth
from fmrizoo.mup.rules import Rule


@dataclass(frozen=True)
class Multipliers:
    """Constants to tune at base width; they hold at every width.

    Attributes:
        output: On the input of every output layer, beside 1/m.
        input: On the voxels that are embedded.
        attention: On the logits, beside head_dim^-½ and :func:`attention_factors`.
    """

    output: float = 1.0
    input: float = 1.0
    attention: float = 1.0


def attention_factors(base: nn.Module, target: nn.Module) -> dict[str, float]:
    """√(head_dim at base width / head_dim) by name of the attention module, where it is not 1.

    muP's logits are ``q·k / d`` (Yang et al. 2022, definition 4.1): q and k grow alike in training,
    so their product adds up over the channels of a head. With the constant √d of the base width
    this is ``q·k · d^-½`` × the factor: 1 at base width, and where heads grow in number only.

    Args:
        base: Encoder at base width, with the same modules as ``target``.
        target: On any device.
    """
    sizes = [
        {n: m.head_dim for n, m in model.named_modules() if _multiplies(m) == "attention"}
        for model in (base, target)
    ]
    pairs = {name: (sizes[0][name], size) for name, size in sizes[1].items()}
    return {name: math.sqrt(old / new) for name, (old, new) in pairs.items() if old != new}


def _multiplies(module: nn.Module) -> str | None:
    kind: str | None = getattr(module, "multiplies", None)
    return kind


def apply(
    model: nn.Module,
    table: Mapping[str, Rule],
    m: float,
    given: Multipliers | None = None,
    attention: Mapping[str, float] | None = None,
    depth: Depth | None = None,
) -> None:
    """Set the ``multiplier`` of every module that ``multiplies`` something; twice is as once.

    An output layer whose input does not grow with the width (the complex head's) keeps 1.

    Args:
        model: Any model of the zoo, on any device, trained or not.
        table: Rules of its parameters.
        m: Width / base width.
        given: None: all 1.
        attention: From :func:`attention_factors`, by module name in the encoder; None: all 1.
        depth: Gives residual branches their multiplier, block by block; None: 1.

    Raises:
        RecipeError: a multiplier that the model has no place for.
    """
    given = given or Multipliers()
    values = {
        "output": given.output / m,
        "input": given.input,
        "attention": given.attention,
    }
    seen: set[str] = set()
    for name, module in model.named_modules():
        kind = _multiplies(module)
        if kind is None:
            continue
        if kind == "output":
            rule = table[f"{name}.weight" if name else "weight"]
            module.multiplier = values[kind] if rule.role == "output" else 1.0
            seen.update({kind} if rule.role == "output" else ())
        elif kind == "branch":
            module.multiplier = 1.0 if depth is None else depth.branch(name)
        else:
            own = name.removeprefix("backbone.")
            factor = (attention or {}).get(own, 1.0) if kind == "attention" else 1.0
            module.multiplier = values[kind] * factor
            seen.add(kind)
    unused = {"input": given.input, "attention": given.attention}
    for kind, value in unused.items():
        if value != 1.0 and kind not in seen:
            key = {"input": "input_mult", "attention": "attn_mult"}[kind]
            raise RecipeError(f"parametrization.{key}={value:g} has nothing to act on here")
