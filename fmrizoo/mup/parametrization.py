"""One model's parametrization: its rule table, its base, its multipliers; and how it is kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fmrizoo.config import BASE_KEYS, DEPTH_KEYS, ParametrizationConfig, Recipe
from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.mup.apply import Multipliers, apply, attention_factors
from fmrizoo.mup.base import base_backbone, base_depth, resized_heads
from fmrizoo.mup.depth import Depth
from fmrizoo.mup.dims import Shapes, infer
from fmrizoo.mup.init import initialise
from fmrizoo.mup.partition import whole_modules
from fmrizoo.mup.rules import Rule, rule_table
from fmrizoo.registry import BACKBONES, HEADS, OBJECTIVES
from fmrizoo.types import Backbone, TaskSpec

SCHEMA = 2  # 2: with depths
FILE = "parametrization.json"
Table = Mapping[str, Rule]


@dataclass(frozen=True)
class Scales:
    """Factors of one parameter on the recipe's ``train.lr``, ``weight_decay`` and ``eps``.

    Attributes:
        lr_scale, wd_scale, eps_scale: The factors.
        decays: Whether it decays at all.
    """

    lr_scale: float
    wd_scale: float
    eps_scale: float
    decays: bool


@dataclass(frozen=True)
class Parametrization:
    """What muP has done to a model and asks of its optimizer.

    Attributes:
        m: Width / base width.
        base: ``parametrization.base``: every width that the backbone has, and a base depth.
        depth: What residual branches are scaled by; None: nothing.
        table: Rule of every parameter by name.
        multipliers: Set on the model.
        weight_decay: How the decay follows the width.
        attention: Factors on the logits of heads of another size than at base width, by name of
            their module in the encoder (:func:`fmrizoo.mup.apply.attention_factors`).
    """

    m: float
    base: Mapping[str, Any]
    table: Table
    multipliers: Multipliers
    weight_decay: str
    attention: Mapping[str, float] = field(default_factory=dict)
    depth: Depth | None = None

    @property
    def sha256(self) -> str:
        """Of the table (as JSON, names in order)."""
        rows = {name: asdict(rule) for name, rule in sorted(self.table.items())}
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def groups(self, model: nn.Module) -> dict[str, Scales]:
        """Factors of every parameter of ``model`` by name, in its order.

        Four different ones at most for what trains together. With a base depth two more for each
        ratio base depth / depth that is not 1 (matrices and vectors of blocks: their ε differs),
        and a third where factorized blocks have a join: 6 for one ratio, 12 for four stages of
        four ratios, 7 and 16 with joins.

        Raises:
            RecipeError: the model has a parameter that the table lacks, or the other way round.
        """
        names = [name for name, _ in model.named_parameters()]
        if odd := sorted(set(names) ^ self.table.keys()):
            raise RecipeError(
                f"the muP table was made for another model: {odd[0]} is in one of them only"
            )
        return {
            name: Scales(rule.lr_scale, rule.wd_scale, rule.eps_scale, rule.decay)
            for name, rule in ((name, self.table[name]) for name in names)
        }

    def lr_scales(self) -> dict[str, float]:
        """Factor on the learning rate by parameter name."""
        return {name: rule.lr_scale for name, rule in self.table.items()}

    def differences(self, other: Parametrization) -> list[str]:
        """What differs, one sentence each; rules are compared for parameters that both have."""
        found = [
            f"{key} {getattr(self, key)} ≠ {getattr(other, key)}"
            for key in ("m", "base", "multipliers", "weight_decay", "depth")
            if getattr(self, key) != getattr(other, key)
        ]
        if self.attention != other.attention:
            found.append(f"{_heads_said(self.attention)} ≠ {_heads_said(other.attention)}")
        shared = (name for name in self.table if name in other.table)
        changed = [name for name in shared if self.table[name] != other.table[name]]
        if changed:
            found.append(f"{len(changed)} rules ({changed[0]}, …)")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Content of ``parametrization.json``; :meth:`from_dict` gives an equal object."""
        return {
            "schema": SCHEMA,
            "name": "mup",
            "m": self.m,
            "base": dict(self.base),
            "multipliers": asdict(self.multipliers),
            "weight_decay": self.weight_decay,
            "attention": dict(self.attention),
            "depth": None if self.depth is None else asdict(self.depth),
            "sha256": self.sha256,
            "table": {name: asdict(rule) for name, rule in self.table.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Parametrization:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: another schema, a missing field, or a table that its sum does not fit.
        """
        if values.get("schema") != SCHEMA or values.get("name") != "mup":
            raise CheckpointError(
                f"{FILE} has schema {values.get('schema')!r} and name {values.get('name')!r}, "
                f"this version reads schema {SCHEMA} and name 'mup'"
            )
        try:
            made = cls(
                m=float(values["m"]),
                base=dict(values["base"]),
                table={name: Rule(**rule) for name, rule in values["table"].items()},
                multipliers=Multipliers(**values["multipliers"]),
                weight_decay=str(values["weight_decay"]),
                attention={n: float(v) for n, v in values["attention"].items()},
                depth=None if values["depth"] is None else Depth.of(**values["depth"]),
            )
            said = values["sha256"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{FILE}: a field is missing or malformed: {error}") from None
        if made.sha256 != said:
            raise CheckpointError(
                f"{FILE} was changed: its table does not have the SHA-256 it states"
            )
        return made


def _heads_said(attention: Mapping[str, float]) -> str:
    factors = ", ".join(f"{value:.4g}" for value in dict.fromkeys(attention.values()))
    return f"attention factors {factors or '1'}"


def parametrize(recipe: Recipe, model: nn.Module) -> Parametrization:
    """The parametrization of a model that was built from ``recipe`` (nothing of it is changed).

    Args:
        recipe: With ``parametrization.name=mup``.
        model: Backbone with its objective or head, or a bare backbone.

    Raises:
        RecipeError: not muP, a base that does not fit, or a parameter without a rule.
    """
    made, _ = _parametrize(recipe, model)
    return made


def install(
    recipe: Recipe, model: nn.Module, *, fresh: Sequence[str] = ("",)
) -> Parametrization | None:
    """Scale a new model's start, set its multipliers, and keep the result as an attribute.

    Args:
        recipe: What it was built from.
        model: ``model.parametrization`` is set to what is returned.
        fresh: Parameters whose names begin so, or hold an adapter, are as drawn and are scaled; the
            others have been already, or are trained. Default: all are fresh.

    Returns:
        None without muP; nothing is done then.

    Raises:
        RecipeError: see :func:`parametrize`.
    """
    if recipe.parametrization.name == "sp":
        model.parametrization = None  # type: ignore[assignment]
        return None
    made, dims = _parametrize(recipe, model)
    config = recipe.parametrization

    def is_fresh(name: str) -> bool:
        return name.startswith(tuple(fresh)) or ".lora_A." in name or ".lora_B." in name

    initialise(
        model,
        dims,
        made.table,
        readout_zero_init=config.readout_zero_init,
        query_zero_init=config.query_zero_init,
        ssm_init=config.ssm_init,
        only=is_fresh,
    )
    apply(model, made.table, made.m, made.multipliers, made.attention, made.depth)
    model.parametrization = made  # type: ignore[assignment]
    return made


def infer_dims(recipe: Recipe, tasks: Sequence[TaskSpec] = ()) -> Shapes:
    """Dims of every parameter of the recipe's model (``tasks``: of its head, if it has one).

    Raises:
        RecipeError: a base that does not fit.
    """
    base = base_backbone(recipe)
    delta = base_backbone(recipe, times=2)
    configs = (base, delta, recipe.backbone)
    return infer(*(lambda c=config: skeleton(recipe, c, tasks) for config in configs))


def skeleton(recipe: Recipe, backbone: Any, tasks: Sequence[TaskSpec] = ()) -> nn.Module:
    """A model with the parameters and names of the recipe's, around another backbone section."""
    encoder: Backbone = BACKBONES.build(backbone)
    if recipe.objective is not None:
        objective = OBJECTIVES.build(recipe.objective, backbone=encoder)
        return nn.ModuleDict({"backbone": encoder, "objective": objective})
    if recipe.head is not None:
        head = HEADS.build(recipe.head, backbone=encoder, tasks=tuple(tasks))
        head.attach(encoder)
        return nn.ModuleDict({"backbone": encoder, "head": head})
    return encoder


def make(
    recipe: Recipe, tasks: Sequence[TaskSpec] = (), overrides: Mapping[str, str] | None = None
) -> tuple[Parametrization, Shapes]:
    """Parametrization and dims of the recipe's model, without the model.

    Raises:
        RecipeError: see :func:`parametrize`.
    """
    config: ParametrizationConfig = recipe.parametrization
    dims = infer_dims(recipe, tasks)
    base = base_backbone(recipe)
    m = recipe.backbone.embed_dim / base.embed_dim
    depth = base_depth(recipe)
    table = rule_table(dims, overrides, m=m, weight_decay=config.weight_decay, depth=depth)
    _check_one_m(dims, table, m)
    sizes = {key: getattr(base, key) for key in BASE_KEYS if hasattr(base, key)}
    sizes |= {key: config.base[key] for key in DEPTH_KEYS if key in config.base}
    made = Parametrization(
        m=m,
        base=sizes,
        table=table,
        multipliers=Multipliers(config.output_mult, config.input_mult, config.attn_mult),
        weight_decay=config.weight_decay,
        attention=_attention(recipe, base),
        depth=depth,
    )
    return made, dims


def _attention(recipe: Recipe, base: Any) -> dict[str, float]:
    narrow = resized_heads(recipe, base)
    if narrow is None:
        return {}
    with whole_modules(), torch.device("meta"):
        encoders = [BACKBONES.build(config) for config in (narrow, recipe.backbone)]
    return attention_factors(*encoders)


def _parametrize(recipe: Recipe, model: nn.Module) -> tuple[Parametrization, Shapes]:
    head = getattr(model, "head", None)
    if isinstance(model, Backbone):
        recipe = replace(recipe, objective=None, head=None)
    overrides: dict[str, str] = {}
    for part in (model, *model.children()):
        overrides |= getattr(part, "mup_roles", {})
    made, dims = make(recipe, () if head is None else head.tasks, overrides)
    made.groups(model)  # the same parameters
    return made, dims


def _check_one_m(dims: Shapes, table: Table, m: float) -> None:
    """Inputs that grow must grow by m: one number stands for the whole model."""
    for name, rule in table.items():
        if rule.role in ("hidden", "output"):
            entry = dims[name].dims[1]
            if not math.isclose(entry.ratio, m):
                raise RecipeError(
                    f"{name} takes {entry.base} inputs at base width and {entry.size} here, not "
                    f"{m:g} times as many: choose widths (embed_dim, mlp_ratio) that come out even"
                )
