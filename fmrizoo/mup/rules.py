"""The rule table of the maximal update parametrization (muP), by parameter name.

Source: Yang et al. 2022, "Tensor Programs V", Table 8 (Adam), for widths that all grow by one
factor m = width / base width. By role of a parameter (σ: its standard deviation at base width;
learning rate, weight decay and Adam's ε as factors on the recipe's)::

    role    axes that grow     σ          rate  decay  ε    such as
    input   out                σ          1     1      1/m  patch embedding, position tables,
                                                            mask token, prompts, conv1d, LoRA's B
    hidden  in (and out)       σ · m^-½   1/m   m      1/m  qkv, MLP, merge, in_proj, LoRA's A
    output  in                 σ (or 0)   1     1      1/m  last projections; input × 1/m
    vector  its only one       σ          1     1      1/m  biases, gains, dt_bias, A_log, D
    fixed   none               σ          1     1      1    biases of outputs, a head's own width

The decay of the table is ``independent``: rate × decay does not depend on the width (Kosson et al.
2025); ``sqrt`` takes m^½, ``coupled`` 1. What decays at all is what decays without muP (two axes or
more, and not marked), so that nothing changes at base width.

Where the shape alone would be wrong the name decides:

- LoRA's A (in → rank) and the complex head's entries (in → its own width) have one growing axis
  as an output has, but what follows them is learned: an internal bottleneck. They are hidden, and
  nothing is multiplied by 1/m. LoRA's B (rank → out) starts at zero and is an input.
- Tables of vectors are inputs: each row is what a one-hot vector picks. So are prompts: a row is a
  token's content in the residual stream, as the mask token is, and every entry must move by Θ(1).
- Mamba's conv1d is a stack of one-channel filters: nothing sums over the width.

ε follows the gradient, which is compared with it. An output layer takes its input × 1/m and has
weights of constant size, so the gradient of every entry of the residual stream is Θ(1/m), and with
it that of all that acts on the stream, whatever its role (CompleteP, table 1, agrees). The
exceptions do not get theirs through the stream (measured, tests/mup/test_eps.py; ``EPS``):

- LoRA's A: the gradient of A x sums B's m columns, which have moved along it, over 1/m each: Θ(1).
- The complex head's entries and all behind them: nothing there is multiplied by 1/m: Θ(1). Norms
  before the entries: through weights of m^-½, which sum over the head's own width: m^-½.

With a base depth (:mod:`fmrizoo.mup.depth`) also: ε × base depth / depth of what is in a residual
branch; learning rates stay, but for what joins factorized blocks on the stream itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fmrizoo.errors import RecipeError
from fmrizoo.mup.depth import Depth
from fmrizoo.mup.dims import ParameterDims, Shapes

ROLES = ("input", "hidden", "output", "vector", "fixed")
WEIGHT_DECAY = ("independent", "sqrt", "coupled")

# Every parameter of the zoo: `#` is a number, `*` anything. A name that is not here is refused.
KNOWN: tuple[tuple[str, str], ...] = (
    # Swin encoders
    ("backbone.patch_embed.fc.weight", "input"),
    ("backbone.patch_embed.fc.bias", "vector"),
    ("backbone.patch_embed.norm.weight", "vector"),
    ("backbone.patch_embed.norm.bias", "vector"),
    ("backbone.pos_embeds.#.pos_embed", "input"),
    ("backbone.pos_embeds.#.time_embed", "input"),
    ("backbone.layers.*.attn.qkv.weight", "hidden"),
    ("backbone.layers.*.attn.qkv.bias", "vector"),
    ("backbone.layers.*.attn.proj.weight", "hidden"),
    ("backbone.layers.*.attn.proj.bias", "vector"),
    ("backbone.layers.*.mlp.linear#.weight", "hidden"),
    ("backbone.layers.*.mlp.linear#.bias", "vector"),
    ("backbone.layers.*.norm#.weight", "vector"),
    ("backbone.layers.*.norm#.bias", "vector"),
    ("backbone.layers.#.blocks.#.norm.weight", "vector"),
    ("backbone.layers.#.blocks.#.norm.bias", "vector"),
    ("backbone.layers.#.blocks.#.weight", "vector"),
    ("backbone.layers.#.downsample.norm.weight", "vector"),
    ("backbone.layers.#.downsample.norm.bias", "vector"),
    ("backbone.layers.#.downsample.reduction.weight", "hidden"),
    ("backbone.norm.weight", "vector"),
    ("backbone.norm.bias", "vector"),
    # NeuroMamba
    ("backbone.embed.weight", "input"),
    ("backbone.embed.bias", "vector"),
    ("backbone.position.weight", "input"),
    ("backbone.position.bias", "vector"),
    ("backbone.blocks.#.norm.weight", "vector"),
    ("backbone.blocks.*.in_proj.weight", "hidden"),
    ("backbone.blocks.*.out_proj.weight", "hidden"),
    ("backbone.blocks.*.conv1d.weight", "input"),
    ("backbone.blocks.*.conv1d.bias", "vector"),
    ("backbone.blocks.*.dt_bias", "vector"),
    ("backbone.blocks.*.A_log", "vector"),
    ("backbone.blocks.*.D", "vector"),
    ("backbone.blocks.#.mixer.norm.weight", "vector"),
    ("backbone.blocks.#.reverse.norm.weight", "vector"),
    # adapters in any encoder
    ("backbone.*.lora_A.*.weight", "hidden"),
    ("backbone.*.lora_B.*.weight", "input"),
    # objectives and their decoders
    ("objective.mask_token", "input"),
    ("objective.decoder.project.weight", "output"),
    ("objective.decoder.project.bias", "fixed"),
    ("objective.decoder.time_embed.weight", "hidden"),
    ("objective.decoder.time_embed.bias", "vector"),
    ("objective.decoder.time_norm.weight", "vector"),
    ("objective.decoder.time_norm.bias", "vector"),
    ("objective.decoder.time_project.weight", "hidden"),
    ("objective.decoder.time_project.bias", "vector"),
    ("objective.decoder.frame_embed", "input"),
    ("objective.decoder.space_embed.weight", "hidden"),
    ("objective.decoder.space_embed.bias", "vector"),
    ("objective.decoder.space_norm.weight", "vector"),
    ("objective.decoder.space_norm.bias", "vector"),
    ("objective.decoder.space_project.weight", "output"),
    ("objective.decoder.space_project.bias", "fixed"),
    # heads: linear, lora, prompt
    ("head.project.weight", "output"),
    ("head.project.bias", "fixed"),
    ("head.tokens.#", "input"),
    # complex head: behind its entries, all is of its own constant width
    ("head.norms.#.weight", "vector"),
    ("head.norms.#.bias", "vector"),
    ("head.inputs.#.weight", "hidden"),
    ("head.inputs.#.bias", "fixed"),
    ("head.kind", "fixed"),
    ("head.place.weight", "fixed"),
    ("head.queries", "fixed"),
    ("head.look.*", "fixed"),
    ("head.norm.weight", "fixed"),
    ("head.norm.bias", "fixed"),
    ("head.mlp.*", "fixed"),
    ("head.mixer.#.*", "fixed"),
    ("head.last_norm.weight", "fixed"),
    ("head.last_norm.bias", "fixed"),
    ("head.project.#.weight", "fixed"),
    ("head.project.#.bias", "fixed"),
)
# Power of m that the gradient, and so ε, goes with, where it is not −1 (`fixed`: 0).
EPS: tuple[tuple[str, float], ...] = (
    ("backbone.*.lora_A.*.weight", 0.0),
    ("head.inputs.#.weight", 0.0),
    ("head.norms.#.*", -0.5),
)
# What the name may say about a parameter of a shape that by itself would have the role before it.
READINGS: dict[str, frozenset[str]] = {
    "fixed": frozenset({"fixed"}),
    "vector": frozenset({"vector", "input"}),
    "input": frozenset({"input"}),
    "output": frozenset({"output", "hidden", "input"}),
    "hidden": frozenset({"hidden"}),
}


@dataclass(frozen=True)
class Rule:
    """How one parameter is scaled; factors on what it has at base width.

    Attributes:
        role: One of ``ROLES``.
        lr_scale: On the learning rate.
        init_scale: On the standard deviation it starts with.
        wd_scale: On the weight decay, if it decays.
        eps_scale: On Adam's ε.
        decay: Whether it decays.
    """

    role: str
    lr_scale: float
    init_scale: float
    wd_scale: float
    eps_scale: float
    decay: bool


def rule_table(
    dims: Shapes,
    overrides: Mapping[str, str] | None = None,
    *,
    m: float,
    weight_decay: str = "independent",
    depth: Depth | None = None,
) -> dict[str, Rule]:
    """The rule of every parameter.

    Args:
        dims: From :func:`fmrizoo.mup.dims.infer`. Names begin with ``backbone.``, ``objective.`` or
            ``head.``; any other name is taken for one of a bare backbone.
        overrides: Role by pattern (as in ``KNOWN``); they win over it.
        m: Width / base width, of every input that grows.
        weight_decay: One of ``WEIGHT_DECAY``.
        depth: None: every depth is the base's.

    Raises:
        RecipeError: a parameter that no pattern names, that two patterns give different roles, or
            whose shape cannot have the role of its name.
    """
    given = _compiled((overrides or {}).items())
    table = {}
    for name, found in dims.items():
        role = _role(name, found, given)
        k = m if role == "hidden" else 1.0
        decay = {"independent": k, "sqrt": k**0.5, "coupled": 1.0}[weight_decay]
        table[name] = Rule(
            role=role,
            lr_scale=1 / k * (1.0 if depth is None else depth.join(name)),
            init_scale=k**-0.5,
            wd_scale=decay,
            eps_scale=m ** _eps_power(name, role) * (1.0 if depth is None else depth.branch(name)),
            decay=len(found.dims) >= 2 and not found.marked,
        )
    return table


def shape_role(found: ParameterDims) -> str | None:
    """The role that the growing axes suggest; None: no parameter of the zoo has such axes."""
    matrix = len(found.dims) > 1
    roles = {(): "fixed", (0,): "input" if matrix else "vector", (1,): "output", (0, 1): "hidden"}
    return roles.get(found.growing)


def _eps_power(name: str, role: str) -> float:
    """Power of m that the gradient of a parameter goes with."""
    if role == "fixed":
        return 0.0
    full = _full(name)
    return next((power for pattern, power in _EPS if pattern.fullmatch(full)), -1.0)


def _role(name: str, found: ParameterDims, given: list[tuple[re.Pattern[str], str]]) -> str:
    roles = _named(name, given) or _named(name, _KNOWN)
    if not roles:
        raise RecipeError(
            f"muP has no rule for the parameter {name} {found.shape}: give its role "
            f"({', '.join(ROLES)}) in fmrizoo.mup.rules.KNOWN or in its component's `mup_roles`"
        )
    if len(roles) > 1:
        raise RecipeError(
            f"muP has several roles for the parameter {name}: {', '.join(sorted(roles))}"
        )
    (role,) = roles
    by_shape = shape_role(found)
    if by_shape is None or role not in READINGS[by_shape]:
        grows = ", ".join(map(str, found.growing)) or "none"
        raise RecipeError(
            f"muP has the role {role} for the parameter {name}, but of its axes {found.shape} "
            f"these grow with the width: {grows}"
        )
    return role


def _named(name: str, patterns: Iterable[tuple[re.Pattern[str], str]]) -> set[str]:
    plain = _full(name).replace(".base_layer.", ".")  # a Linear under adapters is what it was
    return {role for pattern, role in patterns if pattern.fullmatch(plain)}


def _full(name: str) -> str:
    return name if name.startswith(("backbone.", "objective.", "head.")) else f"backbone.{name}"


def _compiled(patterns: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    done = []
    for glob, role in patterns:
        if role not in ROLES:
            raise RecipeError(f"{role!r} for {glob} is no role of muP: {', '.join(ROLES)}")
        done.append((_regex(glob), role))
    return done


def _regex(glob: str) -> re.Pattern[str]:
    return re.compile(re.escape(glob).replace(r"\*", ".+").replace(r"\#", r"\d+"))


_KNOWN = _compiled(KNOWN)
_EPS = [(_regex(glob), power) for glob, power in EPS]
