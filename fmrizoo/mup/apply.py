"""Forward multipliers: plain floats on the modules that have a place for one."""

from __future__ import annotations

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
        attention: On the logits, beside head_dim^-½ (muP's 1/d, whose √d is constant here: heads
            grow in number, never in size).
    """

    output: float = 1.0
    input: float = 1.0
    attention: float = 1.0


def apply(
    model: nn.Module,
    table: Mapping[str, Rule],
    m: float,
    given: Multipliers | None = None,
    depth: Depth | None = None,
) -> None:
    """Set the ``multiplier`` of every module that ``multiplies`` something; twice is as once.

    An output layer whose input does not grow with the width (the complex head's) keeps 1.

    Args:
        model: Any model of the zoo, on any device, trained or not.
        table: Rules of its parameters.
        m: Width / base width.
        given: None: all 1.
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
        kind = getattr(module, "multiplies", None)
        if kind is None:
            continue
        if kind == "output":
            rule = table[f"{name}.weight" if name else "weight"]
            module.multiplier = values[kind] if rule.role == "output" else 1.0
            seen.update({kind} if rule.role == "output" else ())
        elif kind == "branch":
            module.multiplier = 1.0 if depth is None else depth.branch(name)
        else:
            module.multiplier = values[kind]
            seen.add(kind)
    unused = {"input": given.input, "attention": given.attention}
    for kind, value in unused.items():
        if value != 1.0 and kind not in seen:
            key = {"input": "input_mult", "attention": "attn_mult"}[kind]
            raise RecipeError(f"parametrization.{key}={value:g} has nothing to act on here")
