"""Recipes: YAML ``defaults`` + file + dotted overrides, checked against typed dataclasses.

Component sections (``backbone``, ``objective``, ``head``) take the schema of the component that
their ``name`` picks; the other sections are below, one dataclass each, one comment per field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fmrizoo.errors import RecipeError
from fmrizoo.registry import BACKBONES, HEADS, OBJECTIVES, Registry, suggest

CHECKPOINTING = ("none", "block", "window-chunk")
NORMALIZATIONS = ("znorm_minback", "znorm_zeroback", "minmax", "robust", "voxel", "none")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise RecipeError(message)


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    _require(value in known, f"{key}={value!r} is not known.{suggest(value, list(known))}")


@dataclass
class PrepareConfig:
    """How NIfTI runs become a store."""

    space: str = "MNI152NLin2009cAsym"  # BIDS space to pick; `native`: keep each run's own voxels
    grid: list[int] = field(default_factory=lambda: [96, 96, 96])  # voxels x y z (not for native)
    voxel_size: list[float] = field(default_factory=lambda: [2.0, 2.0, 2.0])  # millimetres
    center: list[float] = field(
        default_factory=lambda: [1.0, -17.0, 17.0]
    )  # mm, middle of the grid
    orientation: str = "RAS"  # axis codes of the stored array; SwiFT's weights expect LAS
    mask: str = "auto"  # auto: the BIDS desc-brain_mask; compute: nilearn's EPI mask; or a file
    dummy_scans: int = 0  # volumes dropped at the start of every run
    tr: float | None = None  # seconds; None: the sidecar's RepetitionTime, else the header's
    on_tr_conflict: str = (
        "stop"  # header and sidecar disagree: stop | sidecar (follow it, and say so)
    )
    confounds: str | None = (
        None  # nilearn strategy: simple, scrubbing, compcor, ica_aroma; None: none
    )
    codec: str = (
        "int8"  # int8 (in-brain voxels, one pread a window) | gzip (dense, any h5py reads it)
    )
    max_error: float = 0.02  # int8 → int16 above this rms error / temporal s.d.
    select: dict[str, str] = field(
        default_factory=dict
    )  # BIDS entities to keep, {acquisition: 1slice}

    def __post_init__(self) -> None:
        _one_of("prepare.codec", self.codec, ("int8", "gzip"))
        _one_of("prepare.on_tr_conflict", self.on_tr_conflict, ("stop", "sidecar"))
        for key in ("grid", "voxel_size"):
            value = getattr(self, key)
            _require(
                len(value) == 3 and all(v > 0 for v in value),
                f"prepare.{key} needs three positive numbers (x, y, z), got {list(value)}",
            )
        _require(
            len(self.center) == 3,
            f"prepare.center needs three numbers (x, y, z), got {list(self.center)}",
        )
        letters = {frozenset("RL"), frozenset("AP"), frozenset("SI")}
        axes = {pair for pair in letters for c in self.orientation if c in pair}
        _require(
            len(self.orientation) == 3 and axes == letters,
            f"prepare.orientation needs one of R/L, A/P and S/I each, got {self.orientation!r}",
        )
        _require(self.dummy_scans >= 0, f"prepare.dummy_scans must be ≥ 0, got {self.dummy_scans}")


@dataclass
class DataConfig:
    """Which store is read and how clips are cut from its runs."""

    store: str = ""  # folder that `fmrizoo prepare` wrote
    select: dict[str, str] = field(default_factory=dict)  # BIDS entities to keep
    clip_frames: int = 20  # frames in a clip (the source's SL)
    frame_stride: int = 1  # frames between two frames of a clip (SWS)
    clip_stride: float = 1.0  # clip starts, as a share of the clip's span; 0.5 = half overlap (SBS)
    normalization: str = "znorm_minback"  # see fmrizoo.data.normalize
    threads: int = 2  # reader threads per rank

    def __post_init__(self) -> None:
        _one_of("data.normalization", self.normalization, NORMALIZATIONS)
        _require(self.clip_frames >= 1, f"data.clip_frames must be ≥ 1, got {self.clip_frames}")
        _require(self.frame_stride >= 1, f"data.frame_stride must be ≥ 1, got {self.frame_stride}")
        _require(self.clip_stride > 0, f"data.clip_stride must be > 0, got {self.clip_stride}")
        _require(self.threads >= 1, f"data.threads must be ≥ 1, got {self.threads}")


@dataclass
class TaskConfig:
    """What a head learns to predict."""

    target: str = "trial_type"  # column of events.tsv or participants.tsv
    kind: str = "classification"  # classification | regression | ordinal (classes in an order)
    targets: dict[str, str] = field(
        default_factory=dict
    )  # several columns at once, {sex: classification, age: regression}; replaces target and kind
    source: str = "events"  # events: one clip per event; participants: all clips of a subject
    levels: list[str] = field(
        default_factory=list
    )  # ordinal: names from low to high; empty: the labels are numbers
    class_weights: str = "none"  # none | balanced: rare classes count as much as frequent ones
    label_smoothing: float = 0.0  # classification: share of the target spread over all classes
    lag: float = 5.0  # seconds after an event's onset at which its clip starts (haemodynamic delay)
    level: str = "event"  # predictions are averaged over the clips of one: event | run | subject

    def __post_init__(self) -> None:
        _one_of("task.source", self.source, ("events", "participants"))
        _one_of("task.class_weights", self.class_weights, ("none", "balanced"))
        for name, kind in self.wanted().items():
            key = "task.kind" if name not in self.targets else f"task.targets.{name}"
            _one_of(key, kind, ("classification", "regression", "ordinal"))
        kinds = list(self.wanted().values())
        _require(
            0 <= self.label_smoothing < 1,
            f"task.label_smoothing is a share in [0, 1), got {self.label_smoothing}",
        )
        _require(
            not self.label_smoothing or "classification" in kinds,
            f"task.label_smoothing={self.label_smoothing} is for classification, not {kinds[0]}",
        )
        _require(
            self.class_weights == "none" or set(kinds) != {"regression"},
            f"task.class_weights={self.class_weights} needs a target with classes",
        )
        _require(
            not self.levels or kinds.count("ordinal") == 1,
            f"task.levels={list(self.levels)} needs one target of kind ordinal",
        )
        _one_of("task.level", self.level, ("event", "run", "subject"))
        _require(math.isfinite(self.lag), f"task.lag is a number of seconds, got {self.lag}")
        _require(
            not (self.source == "participants" and self.level == "event"),
            "task.level=event needs task.source=events; use level=subject for participants.tsv",
        )
        _require(
            len(self.targets) < 2 or self.source == "participants" or self.level == "event",
            f"task.level={self.level} with several targets from events is ambiguous: use "
            "task.level=event",
        )

    def wanted(self) -> dict[str, str]:
        """Kind of each target by its name, in the order of a head's outputs."""
        return dict(self.targets) or {self.target: self.kind}


@dataclass
class SplitConfig:
    """Which units train, validate and test. Written to a file once, then reused."""

    by: str = "subject"  # subject | session | run: what is never divided between the parts
    folds: int = 5  # every unit is in the test part of exactly one fold
    fold: int = 0  # the fold of this run
    validation: float = 0.2  # share of the non-test units held out for validation
    seed: int = 0  # of the shuffle
    file: str | None = None  # an existing split file to use as it is

    def __post_init__(self) -> None:
        _one_of("split.by", self.by, ("subject", "session", "run"))
        _require(self.folds >= 2, f"split.folds must be ≥ 2, got {self.folds}")
        _require(
            0 <= self.fold < self.folds,
            f"split.fold must be in 0..{self.folds - 1}, got {self.fold}",
        )
        _require(
            0 <= self.validation < 1, f"split.validation must be in [0, 1), got {self.validation}"
        )


@dataclass
class TrainConfig:
    """Optimisation; every value is for the whole job, whatever its world size."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 8  # clips per optimizer step over all ranks
    accumulate: int = 1  # gradient accumulation: batch_size = ranks × accumulate × micro-batch
    max_micro_batch: int = 0  # clips a rank takes at a time; accumulates as it must; 0: no limit
    lr: float = 1e-4  # peak learning rate
    warmup: float = 0.01  # share of the steps with linearly rising rate
    min_lr_ratio: float = 0.01  # the cosine ends at lr × this
    weight_decay: float = 0.01  # AdamW, on matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # AdamW
    eps: float = 1e-8  # AdamW
    clip_norm: float = 1.0  # global gradient norm; 0 switches clipping off
    precision: str = "fp32"  # fp32 | bf16 (bf16 weights, fp32 master weights and gradient sums)
    zero_stage: int = 1  # DeepSpeed ZeRO 0–3
    checkpointing: str = "none"  # activations: none | block | window-chunk: recomputed backward
    seed: int = 0  # initialisation, order, masks, dropout
    log_every: int = 1  # steps between two lines of metrics.jsonl
    save_every: int = 0  # steps between two checkpoints; 0: at the end only
    validate_every: int = 0  # steps between two validations; 0: at the end only
    monitor: str = "loss"  # validation metric that says which weights are the best
    patience: int = 0  # validations without a better one before training stops; 0: never
    keep_best: bool = False  # export the weights of the best validation, not the last ones
    cache_features: bool = False  # frozen encoder: run it once per clip, then train the head alone
    keep: int = 2  # checkpoints kept
    device: str = "auto"  # auto | cpu | cuda | xpu

    def __post_init__(self) -> None:
        _require(
            self.max_micro_batch >= 0,
            f"train.max_micro_batch must be ≥ 0, got {self.max_micro_batch}",
        )
        _require(
            not (self.max_micro_batch and self.accumulate > 1),
            f"train.accumulate={self.accumulate} and train.max_micro_batch="
            f"{self.max_micro_batch} both set the accumulation: give one of them",
        )
        _one_of("train.precision", self.precision, ("fp32", "bf16"))
        _one_of("train.checkpointing", self.checkpointing, CHECKPOINTING)
        _one_of("train.device", self.device, ("auto", "cpu", "cuda", "xpu"))
        _require(self.zero_stage in (0, 1, 2, 3), f"train.zero_stage is 0–3, got {self.zero_stage}")
        for key in ("steps", "batch_size", "accumulate", "log_every", "keep"):
            value = getattr(self, key)
            _require(value >= 1, f"train.{key} must be ≥ 1, got {value}")
        for key in ("warmup", "min_lr_ratio"):
            value = getattr(self, key)
            _require(0 <= value <= 1, f"train.{key} is a share in [0, 1], got {value}")
        for key in ("weight_decay", "clip_norm", "save_every", "validate_every", "patience"):
            value = getattr(self, key)
            _require(value >= 0, f"train.{key} must be ≥ 0, got {value}")
        for key in ("lr", "eps"):
            value = getattr(self, key)
            _require(value > 0, f"train.{key} must be > 0, got {value}")
        for key in ("patience", "keep_best"):
            _require(
                not getattr(self, key) or self.validate_every > 0,
                f"train.{key}={getattr(self, key)} needs validations on the way: set "
                "train.validate_every",
            )
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"train.betas needs two numbers in [0, 1), got {list(self.betas)}",
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
    ssm_init: str = "random"  # mup, Mamba's steps and decay rates: random | stratified (placed)
    output_mult: float = 1.0  # mup: on the input of output layers, beside base width / width
    input_mult: float = 1.0  # mup: on the voxels that are embedded
    attn_mult: float = 1.0  # mup: on attention logits, beside head_dim ** -0.5
    weight_decay: str = (
        "independent"  # mup: lr × decay stays (independent) | × width^½ (sqrt) | coupled
    )
    depth: str = "none"  # mup: none | completep (residual branches × base depth / depth)

    def __post_init__(self) -> None:
        _one_of("parametrization.name", self.name, ("sp", "mup"))
        _one_of("parametrization.ssm_init", self.ssm_init, ("random", "stratified"))
        _one_of(
            "parametrization.weight_decay", self.weight_decay, ("independent", "sqrt", "coupled")
        )
        _one_of("parametrization.depth", self.depth, ("none", "completep"))
        for key in ("output_mult", "input_mult", "attn_mult"):
            value = getattr(self, key)
            _require(
                0 < value < math.inf, f"parametrization.{key} must be a number > 0, got {value}"
            )
            _require(
                value == 1 or self.name == "mup",
                f"parametrization.{key}={value} needs parametrization.name=mup",
            )
        for key, value in self.base.items():
            self._check_base(key, value)
        _require(
            self.name == "sp" or "embed_dim" in self.base,
            "parametrization.name=mup needs the width to scale from: set "
            "parametrization.base={embed_dim: …}",
        )
        if self.depth == "completep":
            _require(
                self.name == "mup",
                "parametrization.depth=completep needs parametrization.name=mup: for depth alone, "
                "give the model's own width as base",
            )
            _require(
                sum(key in self.base for key in DEPTH_KEYS) == 1,
                "parametrization.depth=completep needs the depth to scale from: set "
                "parametrization.base.depths=[…] (Swin encoders, one a stage) or base.depth "
                "(NeuroMamba)",
            )

    def _check_base(self, key: str, value: Any) -> None:
        """One entry of ``base``."""
        _require(
            key in (*BASE_KEYS, *DEPTH_KEYS),
            f"parametrization.base.{key}: base and model may differ in widths "
            f"({', '.join(BASE_KEYS)}) and depth ({', '.join(DEPTH_KEYS)}) only",
        )
        _require(
            key not in DEPTH_KEYS or self.depth != "none",
            f"parametrization.base.{key} needs parametrization.depth=completep: with depth=none "
            "the base has the model's own depth",
        )
        several = key in ("num_heads", "depths")
        numbers = value if several and isinstance(value, list) else [value]
        _require(
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
    init_from: str | None = (
        None  # model folder whose encoder weights start the run; {fold} is filled in
    )

    def __post_init__(self) -> None:
        _require(
            self.objective is None or self.head is None,
            "a recipe has an objective (pretraining) or a head (fine-tuning), not both",
        )


COMPONENTS: dict[str, Registry] = {"backbone": BACKBONES, "objective": OBJECTIVES, "head": HEADS}


def _read(path: Path, stack: tuple[Path, ...] = ()) -> DictConfig:
    """One YAML file with its ``defaults`` (paths relative to it, no suffix) merged underneath."""
    path = path.resolve()
    if path in stack:
        raise RecipeError("defaults loop: " + " -> ".join(p.name for p in (*stack, path)))
    if not path.is_file():
        raise RecipeError(f"no recipe file {path}")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} is not a YAML recipe: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, DictConfig):
        raise RecipeError(f"{path} is not a YAML mapping of recipe sections")
    defaults = loaded.pop("defaults", [])
    if not isinstance(defaults, list | ListConfig) or not all(isinstance(d, str) for d in defaults):
        raise RecipeError(f"{path}: 'defaults' must be a list of recipe files")
    bases = [_read(path.parent / f"{name}.yaml", (*stack, path)) for name in defaults]
    return _merge(*bases, loaded)


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


def _check_keys(schema: type, values: DictConfig, prefix: str) -> None:
    """Raise on a key that ``schema`` does not have, at any depth, and suggest the nearest one."""
    hints = get_type_hints(schema)
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


def _typed(schema: type, values: DictConfig, prefix: str = "") -> Any:
    """``values`` as an instance of ``schema`` (its ``__post_init__`` may reject them)."""
    _check_keys(schema, values, prefix)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, RecipeError):
            raise error.__cause__ from None
        where = f"{prefix}{error.full_key or ''}"
        raise RecipeError(f"{where}: {str(error).splitlines()[0]}") from None


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
    except (OmegaConfBaseException, YAMLError) as error:
        raise RecipeError(f"overrides {list(items)}: {str(error).splitlines()[0]}") from None


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
        except OmegaConfBaseException as error:
            raise RecipeError(f"recipe dict: {str(error).splitlines()[0]}") from None
    else:
        base = _read(source)
    try:
        given = _overrides(overrides)
        merged = _merge(base, given)
        for key in _mappings(overrides):
            # data.select={run: 1} says what is selected, not what is added to the selection.
            OmegaConf.update(merged, key, OmegaConf.select(given, key), merge=False)
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise RecipeError(str(error).splitlines()[0]) from None
    parts = {kind: _component(kind, merged.pop(kind, None)) for kind in COMPONENTS}
    sections = _typed(Recipe, merged)
    return Recipe(**{f.name: parts.get(f.name, getattr(sections, f.name)) for f in fields(Recipe)})


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
