"""Recipes: YAML ``defaults`` + file + dotted overrides, checked against typed dataclasses.

Component sections (``backbone``, ``objective``, ``head``) take the schema of the component that
their ``name`` picks; the other sections are in :mod:`fmrizoo.sections`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fmrizoo.errors import RecipeError
from fmrizoo.registry import BACKBONES, HEADS, OBJECTIVES, Registry, suggest
from fmrizoo.sections import CHECKPOINTING as CHECKPOINTING
from fmrizoo.sections import NORMALIZATIONS as NORMALIZATIONS
from fmrizoo.sections import AffineConfig as AffineConfig
from fmrizoo.sections import AugmentConfig as AugmentConfig
from fmrizoo.sections import DataConfig as DataConfig
from fmrizoo.sections import MatchConfig as MatchConfig
from fmrizoo.sections import PrepareConfig as PrepareConfig
from fmrizoo.sections import QcConfig as QcConfig
from fmrizoo.sections import SplitConfig as SplitConfig
from fmrizoo.sections import StoreConfig as StoreConfig
from fmrizoo.sections import SweepConfig as SweepConfig
from fmrizoo.sections import TaskConfig as TaskConfig
from fmrizoo.sections import TrainConfig as TrainConfig
from fmrizoo.sections import one_of, require
from fmrizoo.sections.axes import AblateConfig as AblateConfig

# What OmegaConf and PyYAML raise on content that they cannot take, beside their own errors.
_UNUSABLE = (
    OmegaConfBaseException,
    YAMLError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    OverflowError,
    AssertionError,
)
BASE_KEYS = ("embed_dim", "num_heads")
DEPTH_KEYS = ("depths", "depth")  # of Swin encoders, one a stage; of NeuroMamba


@dataclass
class ParametrizationConfig:
    """How starts, learning rates and multipliers follow the width."""

    name: str = "sp"  # sp (PyTorch's own) | mup (what is tuned at base width holds at every width)
    base: dict[str, Any] = field(
        default_factory=dict
    )  # the backbone at base size: {embed_dim: 36, num_heads: [3, 6, 12, 24]}, completep: + depths
    readout_zero_init: bool = True  # mup: output layers start with zero weights
    query_zero_init: bool = False  # mup: queries start at zero; for heads that grow in size
    ssm_init: str = "random"  # mup, Mamba's steps and decay rates: random | stratified (placed)
    output_mult: float = 1.0  # mup: on the input of output layers, beside base width / width
    input_mult: float = 1.0  # mup: on the voxels that are embedded
    attn_mult: float = 1.0  # mup: on attention logits, beside head_dim ** -0.5
    weight_decay: str = (
        "independent"  # mup: lr × decay stays (independent) | × width^½ (sqrt) | coupled
    )
    depth: str = "none"  # mup: none | completep (residual branches × base depth / depth)

    def __post_init__(self) -> None:
        one_of("parametrization.name", self.name, ("sp", "mup"))
        one_of("parametrization.ssm_init", self.ssm_init, ("random", "stratified"))
        one_of(
            "parametrization.weight_decay", self.weight_decay, ("independent", "sqrt", "coupled")
        )
        one_of("parametrization.depth", self.depth, ("none", "completep"))
        for key in ("output_mult", "input_mult", "attn_mult"):
            value = getattr(self, key)
            require(
                0 < value < math.inf, f"parametrization.{key} must be a number > 0, got {value}"
            )
            require(
                value == 1 or self.name == "mup",
                f"parametrization.{key}={value} needs parametrization.name=mup",
            )
        for key, value in self.base.items():
            self._check_base(key, value)
        require(
            self.name == "sp" or "embed_dim" in self.base,
            "parametrization.name=mup needs the width to scale from: set "
            "parametrization.base={embed_dim: …}",
        )
        if self.depth == "completep":
            require(
                self.name == "mup",
                "parametrization.depth=completep needs parametrization.name=mup: for depth alone, "
                "give the model's own width as base",
            )
            require(
                sum(key in self.base for key in DEPTH_KEYS) == 1,
                "parametrization.depth=completep needs the depth to scale from: set "
                "parametrization.base.depths=[…] (Swin encoders, one a stage) or base.depth "
                "(NeuroMamba)",
            )

    def _check_base(self, key: str, value: Any) -> None:
        """One entry of ``base``."""
        require(
            key in (*BASE_KEYS, *DEPTH_KEYS),
            f"parametrization.base.{key}: base and model may differ in widths "
            f"({', '.join(BASE_KEYS)}) and depth ({', '.join(DEPTH_KEYS)}) only",
        )
        require(
            key not in DEPTH_KEYS or self.depth != "none",
            f"parametrization.base.{key} needs parametrization.depth=completep: with depth=none "
            "the base has the model's own depth",
        )
        several = key in ("num_heads", "depths")
        numbers = value if several and isinstance(value, list) else [value]
        require(
            several == isinstance(value, list)
            and bool(numbers)
            and all(type(n) is int and n >= 1 for n in numbers),
            f"parametrization.base.{key} needs "
            f"{'whole numbers, one a stage' if several else 'a whole number'} ≥ 1, got {value!r}",
        )


@dataclass
class Recipe:
    """Everything one run needs. A pretraining recipe has an objective, a fine-tuning one a head."""

    backbone: Any = None  # the registered backbone's own config
    objective: Any = None  # the registered objective's own config
    head: Any = None  # the registered head's own config
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parametrization: ParametrizationConfig = field(default_factory=ParametrizationConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    ablate: AblateConfig = field(default_factory=AblateConfig)
    init_from: str | None = (
        None  # model folder whose encoder weights start the run; {fold} is filled in
    )

    def __post_init__(self) -> None:
        require(
            self.objective is None or self.head is None,
            "a recipe has an objective (pretraining) or a head (fine-tuning), not both",
        )
        moved = self.data.windows == "random"
        require(
            not (moved and self.head is not None and self.task.source == "events"),
            "data.windows=random would move clips off their events: use fixed windows, or "
            "task.source=participants",
        )
        require(
            not (moved and self.train.cache_features),
            "train.cache_features=true keeps the features of fixed clips, and data.windows=random "
            "moves them: use one of the two",
        )
        augment = self.data.augment
        require(
            not ((augment.on_device or augment.time_shift) and self.train.cache_features),
            "train.cache_features=true keeps the features of unchanged clips, and data.augment "
            "changes them: use one of the two",
        )


COMPONENTS: dict[str, Registry] = {"backbone": BACKBONES, "objective": OBJECTIVES, "head": HEADS}


def _line(error: BaseException) -> str:
    """The first line of what a library said."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _read(path: Path, stack: tuple[Path, ...] = ()) -> DictConfig:
    """One YAML file with its ``defaults`` (paths relative to it, no suffix) merged underneath."""
    path = path.resolve()
    if path in stack:
        raise RecipeError("defaults loop: " + " -> ".join(p.name for p in (*stack, path)))
    if not path.is_file():
        raise RecipeError(f"no recipe file {path}")
    try:
        loaded = OmegaConf.load(path)
    except (OSError, *_UNUSABLE) as error:
        raise RecipeError(f"{path} is not a YAML recipe: {_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise RecipeError(f"{path} is not a YAML mapping of recipe sections")
    defaults = loaded.pop("defaults", [])
    if not isinstance(defaults, list | ListConfig) or not all(isinstance(d, str) for d in defaults):
        raise RecipeError(f"{path}: 'defaults' must be a list of recipe files")
    bases = [_read(path.parent / f"{name}.yaml", (*stack, path)) for name in defaults]
    try:
        return _merge(*bases, loaded)
    except _UNUSABLE as error:  # such as a section that is an interpolation of nothing
        raise RecipeError(f"{path}: {_line(error)}") from None


def _merge(*parts: DictConfig) -> DictConfig:
    """Merge left to right; a component section with another ``name`` replaces the whole section."""
    result = OmegaConf.create({})
    for part in parts:
        for section in COMPONENTS:
            new, old = part.get(section), result.get(section)
            if isinstance(new, str):
                part[section] = new = OmegaConf.create({"name": new})
            renamed = (
                isinstance(new, DictConfig)
                and isinstance(old, DictConfig)
                and new.get("name", old.get("name")) != old.get("name")
            )
            if renamed:
                result.pop(section)
        result = cast(DictConfig, OmegaConf.merge(result, part))
    return result


_hints = cache(get_type_hints)


def _check_keys(schema: type, values: DictConfig, prefix: str) -> None:
    """Raise on a key that ``schema`` does not have, at any depth, and suggest the nearest one."""
    hints = _hints(schema)
    for key in map(str, values):
        if key not in hints:
            shown = key if len(key) <= 60 else f"{key[:60]}…"
            raise RecipeError(f"unknown key '{prefix}{shown}'.{suggest(key, list(hints))}")
        if is_dataclass(hints[key]):
            if not isinstance(values[key], DictConfig):
                raise RecipeError(
                    f"{prefix}{key} is a section of keys and values, got {values[key]!r}"
                )
            _check_keys(cast(type, hints[key]), values[key], f"{prefix}{key}.")


@cache
def _template(schema: type) -> DictConfig:
    """``schema``'s types and defaults; a merge copies it. Making one takes longer than merging."""
    return cast(DictConfig, OmegaConf.structured(schema))


def _typed(schema: type, values: DictConfig, prefix: str = "") -> Any:
    """``values`` as an instance of ``schema`` (its ``__post_init__`` may reject them)."""
    _check_keys(schema, values, prefix)
    try:
        return OmegaConf.to_object(OmegaConf.merge(_template(schema), values))
    except RecipeError:
        raise
    except _UNUSABLE as error:
        if isinstance(error.__cause__, RecipeError):
            raise error.__cause__ from None
        where = f"{prefix}{getattr(error, 'full_key', None) or ''}"
        raise RecipeError(f"{where}: {_line(error)}") from None


def _named(item: str) -> str:
    key, _, value = item.partition("=")
    plain = re.fullmatch(r"[A-Za-z_][\w-]*", value) and value.lower() not in ("null", "none")
    return f"{key}.name={value}" if key in COMPONENTS and plain else item


def _overrides(items: Sequence[str]) -> DictConfig:
    for item in items:
        if "=" not in item or item.startswith("="):
            raise RecipeError(f"override {item!r} is not of the form key=value")
    # head=linear head.dropout=0.1: the short form of the name must not swallow the section.
    dotted = [_named(item) for item in items]
    try:
        return OmegaConf.from_dotlist(dotted)
    except _UNUSABLE as error:
        raise RecipeError(f"overrides {list(items)}: {_line(error)}") from None


def _mappings(items: Sequence[str]) -> list[str]:
    """Dotted keys whose override is a mapping written in braces."""
    pairs = (item.partition("=") for item in items)
    return [key for key, _, value in pairs if "." in key and value.lstrip().startswith("{")]


def compose(source: Path | dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Compose and check a recipe (names are resolved by :func:`fmrizoo.zoo.load_recipe`).

    Args:
        source: A YAML file, or the same content as a dict.
        overrides: Dotted ``key=value`` strings; they win over the file.

    Raises:
        RecipeError: unknown key or name, a value of the wrong type, or values that contradict.
    """
    if isinstance(source, dict):
        try:
            base = OmegaConf.create(source)
        except _UNUSABLE as error:
            raise RecipeError(f"recipe dict: {_line(error)}") from None
    else:
        base = _read(source)
    try:
        given = _overrides(overrides)
        merged = _merge(base, given)
        for key in _mappings(overrides):
            # data.select={run: 1} says what is selected, not what is added to the selection.
            OmegaConf.update(merged, key, OmegaConf.select(given, key), merge=False)
        OmegaConf.resolve(merged)
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise RecipeError(f"{missing[0]} is ???: give it a value")
    except RecipeError:
        raise
    except _UNUSABLE as error:
        raise RecipeError(f"sections that cannot be merged: {_line(error)}") from None
    parts = {kind: _component(kind, merged.pop(kind, None)) for kind in COMPONENTS}
    sections = _typed(Recipe, merged)
    recipe = Recipe(
        **{f.name: parts.get(f.name, getattr(sections, f.name)) for f in fields(Recipe)}
    )
    try:
        OmegaConf.structured(recipe)  # merging lets lists into mappings of text; this does not
    except _UNUSABLE as error:
        where = getattr(error, "full_key", None) or "recipe"
        raise RecipeError(f"{where}: {_line(error)}") from None
    return recipe


def read_values(source: Path | dict[str, Any] | Sequence[str]) -> dict[str, Any]:
    """A YAML file, a dict, or dotted ``key=value`` strings as plain containers, unchecked.

    Raises:
        RecipeError: not readable as keys and values.
    """
    try:
        if isinstance(source, Path):
            found = _read(source)
        else:
            found = OmegaConf.create(source) if isinstance(source, dict) else _overrides(source)
        return cast(dict[str, Any], OmegaConf.to_container(found, resolve=True))
    except RecipeError:
        raise
    except _UNUSABLE as error:
        raise RecipeError(f"settings that cannot be read: {_line(error)}") from None


def typed_section(schema: type, *parts: dict[str, Any]) -> Any:
    """An instance of a dataclass that is no part of a recipe; later parts win.

    Raises:
        RecipeError: unknown key, a value of the wrong type, or values that contradict.
    """
    try:
        merged = cast(DictConfig, OmegaConf.merge(*map(OmegaConf.create, parts)))
    except _UNUSABLE as error:
        raise RecipeError(f"settings that cannot be merged: {_line(error)}") from None
    return _typed(schema, merged)


def _component(kind: str, values: Any) -> Any:
    if values is None:
        return None
    table = COMPONENTS[kind]
    if not isinstance(values, DictConfig) or "name" not in values:
        raise RecipeError(f"'{kind}.name' is missing. Available: {', '.join(table.list())}")
    if not isinstance(values.name, str):
        raise RecipeError(
            f"{kind}.name must be a name, got {values.name!r}. Available: {', '.join(table.list())}"
        )
    return _typed(table[values.name].config, values, f"{kind}.")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain containers; ``compose(to_dict(r)) == r``."""
    values = OmegaConf.to_container(OmegaConf.structured(recipe))
    return {k: v for k, v in cast(dict[str, Any], values).items() if v is not None}


def to_yaml(recipe: Recipe) -> str:
    """The fully resolved recipe; loading it again gives an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(recipe)))
