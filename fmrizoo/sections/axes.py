"""What an ablation varies: the recipe's section ``ablate``, and the source's codes for its axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fmrizoo.errors import RecipeError
from fmrizoo.registry import suggest
from fmrizoo.sections.checks import one_of, require

# Code → key that it stands for (source report, Table 1).
CODES = {
    "ISM": "data.normalization",
    "MPS": "objective.mask_patch_size",
    "MR": "objective.mask_ratio",
    "MT": "objective.mask_type",
    "PS": "backbone.patch_size",
    "SBS": "data.clip_stride",
    "SL": "data.clip_frames",
    "SWS": "data.frame_stride",
}
MEANINGS = {
    "ISM": "input scaling",
    "MPS": "masking patch size",
    "MR": "mask ratio",
    "MT": "mask type",
    "PS": "patch size",
    "SBS": "stride between segments, as a share of the segment",
    "SL": "sequence length",
    "SWS": "stride within a segment",
}
DESIGNS = ("one_at_a_time", "grid")
MATCHES = ("none", "parameters", "flops", "tokens")
CONTROLS = ("frozen random", "from scratch")
PRETRAININGS = ("auto", "once", "fold")
TUNE = "finetune."  # overrides that start so change the fine-tuning, not the pretraining
SECTIONS = ("backbone", "objective", "data", "train", "parametrization", "split")


@dataclass
class AblateTaskConfig:
    """One downstream task that all cells are tested on."""

    recipe: str = ""  # a fine-tuning recipe: its head, task, split and train are used
    overrides: list[str] = field(default_factory=list)  # key=value; they win over the cell's
    subsets: list[str] = field(
        default_factory=list
    )  # sums of z-scores, beside that over all tasks, which it enters
    metric: str = ""  # which one is ranked by; empty: the usual one of its kind

    def __post_init__(self) -> None:
        for name in self.subsets:
            require(name != "all", "ablate.tasks: the subset 'all' has every task by itself")


@dataclass
class AblateConfig:
    """Cells of an ablation (pretrainings that differ in what the axes say) and their tests."""

    axes: dict[str, Any] = field(
        default_factory=dict
    )  # code (MR) or dotted key → values; or a word → {value's name: [overrides]}
    design: str = "one_at_a_time"  # the recipe and single changes of it | grid (every combination)
    match: str = "none"  # none | parameters | flops | tokens: made equal to the first cell's
    tasks: dict[str, AblateTaskConfig] = field(default_factory=dict)  # by name
    pretrain: str = "auto"  # auto | once | fold (fold: test runs are left out of the pretraining)
    controls: list[str] = field(
        default_factory=lambda: list(CONTROLS)
    )  # trainings without pretraining, of every backbone
    frozen_random: list[str] = field(
        default_factory=lambda: ["head=linear", "head.train_encoder=none"]
    )  # what that control changes of the fine-tuning
    from_scratch: list[str] = field(
        default_factory=lambda: ["head=linear", "head.train_encoder=all"]
    )  # likewise; its own rate belongs here
    baselines: bool = True  # chance, linear models and connectivity on the same folds
    seeds: int = 3  # pretrainings and fine-tunings of every cell, train.seed and on
    repeats: int = 1  # of the k-fold, each with another split.seed

    def __post_init__(self) -> None:
        one_of("ablate.design", self.design, DESIGNS)
        one_of("ablate.match", self.match, MATCHES)
        one_of("ablate.pretrain", self.pretrain, PRETRAININGS)
        for key in ("seeds", "repeats"):
            value = getattr(self, key)
            require(value >= 1, f"ablate.{key} must be ≥ 1, got {value}")
        for name in self.controls:
            one_of("ablate.controls", name, CONTROLS)
        for name in self.tasks:
            require(
                bool(name.strip()) and not set(name) & set('/\\:*?"<>|') and name[0] != ".",
                f"ablate: the name {name!r} becomes a folder: use letters, digits, spaces, - and _",
            )


@dataclass(frozen=True)
class Value:
    """One value of an axis.

    Attributes:
        label: How tables name it.
        overrides: Of the pretraining.
        finetune: Of every task's fine-tuning.
        recipe: Another pretraining recipe, or None.
    """

    label: str
    overrides: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    recipe: str | None = None


def values_of(name: str, given: Any, img_size: Sequence[int] | None = None) -> list[Value]:
    """The values of one axis.

    Args:
        name: Code, dotted key or a word.
        given: A list of values (code, key), or a mapping of names to overrides (a word).
        img_size: ``(x, y, z, frames)`` that the backbone is built for: a longer sequence (SL) needs
            one that is built for it.

    Raises:
        RecipeError: no such axis, or no values.
    """
    if isinstance(given, Mapping):
        found = [_named(name, str(label), items) for label, items in given.items()]
    elif isinstance(given, list):
        key = _key(name)
        found = [_plain(name, key, value, img_size) for value in given]
    else:
        raise RecipeError(
            f"ablate.axes.{name} needs a list of values, or a mapping of names to overrides, got "
            f"{given!r}"
        )
    if not found:
        raise RecipeError(f"ablate.axes.{name} is empty: list its values or leave it out")
    labels = [value.label for value in found]
    if len(set(labels)) < len(labels):
        raise RecipeError(f"ablate.axes.{name} has a value twice: {', '.join(labels)}")
    return found


def _key(name: str) -> str:
    if name in CODES:
        return CODES[name]
    if name.split(".")[0] in SECTIONS and "." in name:
        return name
    codes = ", ".join(f"{code} ({meaning})" for code, meaning in MEANINGS.items())
    near = suggest(name, list(CODES), "").rstrip()
    raise RecipeError(
        f"ablate.axes.{name} is no axis.{near} Codes: {codes}; or a dotted key such as "
        "backbone.embed_dim, or a word of your own with {name: [key=value, …]} for each value"
    )


def _plain(name: str, key: str, value: Any, img_size: Sequence[int] | None) -> Value:
    if name in ("MPS", "PS") and not isinstance(value, list):
        value = _sizes(name, value)
    label = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    overrides = [f"{key}={value}"]
    if name == "SL" and img_size is not None:
        overrides.append(f"backbone.img_size={[*img_size[:3], int(value)]}")
    return Value(label, tuple(overrides))


def _sizes(name: str, text: Any) -> list[int]:
    """``6_6_6_2`` as the source writes it; YAML takes it for a number unless it is quoted."""
    parts = text.split("_") if isinstance(text, str) else []
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise RecipeError(
            f"ablate.axes.{name}: {text!r} is no size: write [6, 6, 6, 2] (x, y, z, t), or "
            '"6_6_6_2" in quotes'
        )
    return [int(part) for part in parts]


def _named(axis: str, label: str, items: Any) -> Value:
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise RecipeError(
            f"ablate.axes.{axis}.{label} needs a list of key=value overrides, got {items!r}"
        )
    recipe, overrides, finetune = None, [], []
    for item in items:
        if item.startswith("recipe="):
            recipe = item.partition("=")[2]
        elif item.startswith(TUNE):
            finetune.append(item.removeprefix(TUNE))
        elif item.split("=")[0].split(".")[0] in ("head", "task"):
            raise RecipeError(
                f"ablate.axes.{axis}.{label}: {item} is of the fine-tuning: write {TUNE}{item}"
            )
        else:
            overrides.append(item)
    return Value(label, tuple(overrides), tuple(finetune), recipe)
