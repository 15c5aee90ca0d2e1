"""Sections of a recipe, one dataclass each, one comment per field; they check their own values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from fmrizoo.errors import RecipeError
from fmrizoo.registry import suggest

CHECKPOINTING = ("none", "block", "window-chunk")
NORMALIZATIONS = ("znorm_minback", "znorm_zeroback", "minmax", "robust", "voxel", "none")


def require(ok: bool, message: str) -> None:
    if not ok:
        raise RecipeError(message)


def one_of(key: str, value: str, known: Sequence[str]) -> None:
    require(value in known, f"{key}={value!r} is not known.{suggest(value, list(known))}")


@dataclass
class QcConfig:
    """Limits of the quality checks; a run beyond one is flagged, never dropped. 0: not checked."""

    min_tsnr: float = 20.0  # median over brain voxels of mean / s.d. over time
    max_fd: float = 0.5  # mm, mean framewise displacement; where motion estimates exist
    max_dvars: float = 0.0  # % of the mean signal, mean over frames; depends on voxels and tasks
    max_spikes: float = 0.05  # share of frames whose global signal leaps
    max_dropout: float = 0.1  # share of brain voxels darker than a fifth of the median
    min_inside: float = 0.95  # share of the run's brain that the stored grid holds
    min_cover: float = 0.8  # share of the template's brain that the run covers; MNI spaces only
    max_quantisation: float = 0.02  # rms error of the stored numbers / s.d. over time
    min_minutes: float = 0.0  # of recording

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            require(
                0 <= value < math.inf,
                f"prepare.qc and data.qc: {limit.name} must be a number ≥ 0, got {value}",
            )


@dataclass
class PrepareConfig:
    """How NIfTI runs become a store."""

    space: str = "MNI152NLin2009cAsym"  # BIDS space to pick; `native`: keep each run's own voxels
    desc: str = "preproc"  # BIDS desc to pick among derivatives; HCP: what follows the run's name
    grid: list[int] = field(default_factory=lambda: [96, 96, 96])  # voxels x y z (not for native)
    voxel_size: list[float] = field(default_factory=lambda: [2.0, 2.0, 2.0])  # millimetres
    center: list[float] = field(
        default_factory=lambda: [1.0, -17.0, 17.0]
    )  # mm, middle of the grid
    orientation: str = "RAS"  # axis codes of the stored array; SwiFT's weights expect LAS
    mask: str = "auto"  # auto: desc-brain_mask; compute: an EPI mask; template: MNI's; or a file
    dummy_scans: int = 0  # volumes dropped at the start of every run
    tr: float | None = None  # seconds; None: the sidecar's RepetitionTime, else the header's
    on_tr_conflict: str = (
        "stop"  # header and sidecar disagree: stop | sidecar (follow it, and say so)
    )
    target_tr: float | None = None  # seconds; resample all runs in time; None: keep their TR
    time_interpolation: str = "cubic"  # cubic | linear, for target_tr
    allow_shorter_tr: bool = False  # target_tr may lie below a run's TR: frames are then made up
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
    qc: QcConfig = field(default_factory=QcConfig)  # limits beyond which a run is flagged

    def __post_init__(self) -> None:
        one_of("prepare.codec", self.codec, ("int8", "gzip"))
        one_of("prepare.time_interpolation", self.time_interpolation, ("cubic", "linear"))
        require(
            self.target_tr is None or 0 < self.target_tr < math.inf,
            f"prepare.target_tr must be a number of seconds > 0, got {self.target_tr}",
        )
        one_of("prepare.on_tr_conflict", self.on_tr_conflict, ("stop", "sidecar"))
        for key in ("grid", "voxel_size"):
            value = getattr(self, key)
            require(
                len(value) == 3 and all(v > 0 for v in value),
                f"prepare.{key} needs three positive numbers (x, y, z), got {list(value)}",
            )
        require(
            len(self.center) == 3,
            f"prepare.center needs three numbers (x, y, z), got {list(self.center)}",
        )
        letters = {frozenset("RL"), frozenset("AP"), frozenset("SI")}
        axes = {pair for pair in letters for c in self.orientation if c in pair}
        require(
            len(self.orientation) == 3 and axes == letters,
            f"prepare.orientation needs one of R/L, A/P and S/I each, got {self.orientation!r}",
        )
        require(
            self.mask != "template" or self.space.startswith("MNI152"),
            f"prepare.mask=template is the MNI152 brain, but prepare.space={self.space}: take "
            "prepare.mask=auto or compute, or a file",
        )
        require(self.dummy_scans >= 0, f"prepare.dummy_scans must be ≥ 0, got {self.dummy_scans}")


WINDOWS = ("fixed", "random")
EXCLUDES = ("none", "flagged")
BALANCES = ("none", "subject")


@dataclass
class StoreConfig:
    """One of several stores that are read together."""

    path: str = ""  # folder that `fmrizoo prepare` wrote
    weight: float | None = None  # its share of an epoch's clips; none has one: each clip once

    def __post_init__(self) -> None:
        require(
            self.weight is None or 0 < self.weight < math.inf,
            f"data.stores: a weight is a number > 0, got {self.weight}",
        )


@dataclass
class AffineConfig:
    """Largest random movement of a head about the middle of its box, along or about each axis."""

    rotate: float = 0.0  # degrees
    translate: float = 0.0  # millimetres
    scale: float = 0.0  # share: 0.1 draws from 0.9 to 1.1

    def __post_init__(self) -> None:
        for key, most in (("rotate", 180.0), ("translate", 1000.0), ("scale", 0.9)):
            value = getattr(self, key)
            require(
                0 <= value <= most,
                f"data.augment.affine.{key} must be between 0 and {most:g}, got {value}",
            )


@dataclass
class AugmentConfig:
    """Random changes of training clips on the device; validation and test never see them."""

    affine: AffineConfig = field(default_factory=AffineConfig)
    frequency: float = 0.0  # share of its amplitude that a random band of frequencies loses
    intensity: float = 0.0  # share: brain values are stretched by 1 ± it, shifted by ± it × s.d.
    noise: float = 0.0  # s.d. of white noise, as a share of the clip's s.d. over time
    time_shift: int = 0  # frames that a clip starts earlier or later, at most; inside its run

    def __post_init__(self) -> None:
        for key, most in (("frequency", 1.0), ("intensity", 0.9), ("noise", math.inf)):
            value = getattr(self, key)
            require(
                0 <= value <= most and value < math.inf,
                f"data.augment.{key} must be ≥ 0"
                f"{f' and ≤ {most:g}' if most < math.inf else ''}, got {value}",
            )
        require(self.time_shift >= 0, f"data.augment.time_shift ≥ 0, got {self.time_shift}")

    @property
    def on_device(self) -> bool:
        """Whether voxels change (a shift in time only reads other frames)."""
        moved = self.affine.rotate or self.affine.translate or self.affine.scale
        return bool(moved or self.frequency or self.intensity or self.noise)


@dataclass
class DataConfig:
    """Which store is read and how clips are cut from its runs."""

    store: str = ""  # folder that `fmrizoo prepare` wrote
    stores: dict[str, StoreConfig] = field(
        default_factory=dict
    )  # several at once, by data set: {ukb: {path: FOLDER, weight: 2}, abcd: {path: FOLDER, …}}
    select: dict[str, str] = field(
        default_factory=dict
    )  # BIDS entities to keep, {task: rest}; one of several values: {run: 1|2|3}
    exclude: str = "none"  # runs not used: none | flagged (beyond a limit of data.qc)
    qc: QcConfig = field(default_factory=QcConfig)  # the limits of exclude=flagged
    leave_out: list[str] = field(
        default_factory=list
    )  # runs, sessions or subjects not used, [sub-03, sub-05_task-rest_run-2]
    clip_frames: int = 20  # frames in a clip (the source's SL)
    frame_stride: int = 1  # frames between two frames of a clip (SWS)
    clip_stride: float = 1.0  # clip starts, as a share of the clip's span; 0.5 = half overlap (SBS)
    windows: str = "fixed"  # training clips: fixed | random (a new start for each, every epoch)
    balance: str = "none"  # training clips: none | subject (each equally often, whatever its runs)
    divide: int = 1  # training subjects dealt to so many nodes, each drawing from its own
    clips_per_visit: int = 1  # training clips taken of a run that is opened; more: fewer opens
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # training clips; all off
    normalization: str = "znorm_minback"  # see fmrizoo.data.normalize
    threads: int = 2  # reader threads per rank
    stage: str = ""  # folder on the node itself (/dev/shm): runs are copied there and read there
    stage_keep: bool = False  # leave the copy there at the end

    def __post_init__(self) -> None:
        one_of("data.normalization", self.normalization, NORMALIZATIONS)
        require(self.clip_frames >= 1, f"data.clip_frames must be ≥ 1, got {self.clip_frames}")
        require(self.frame_stride >= 1, f"data.frame_stride must be ≥ 1, got {self.frame_stride}")
        require(self.clip_stride > 0, f"data.clip_stride must be > 0, got {self.clip_stride}")
        require(self.threads >= 1, f"data.threads must be ≥ 1, got {self.threads}")
        one_of("data.exclude", self.exclude, EXCLUDES)
        require("" not in self.leave_out, "data.leave_out holds an empty name")
        one_of("data.windows", self.windows, WINDOWS)
        one_of("data.balance", self.balance, BALANCES)
        require(
            self.clips_per_visit >= 1,
            f"data.clips_per_visit must be ≥ 1, got {self.clips_per_visit}",
        )
        require(self.divide >= 1, f"data.divide must be ≥ 1, got {self.divide}")
        weighted = any(one.weight is not None for one in self.stores.values())
        require(
            self.divide == 1 or (self.balance == "none" and not weighted),
            f"data.divide={self.divide} deals every clip to one node, so subjects or stores cannot "
            "be drawn in other shares than their clips: leave out data.balance and the weights of "
            "data.stores, or data.divide",
        )
        require(
            not (self.windows == "random" and self.augment.time_shift),
            f"data.augment.time_shift={self.augment.time_shift} moves fixed windows; "
            "data.windows=random already starts anywhere",
        )
        for key in ("noise", "frequency"):
            require(
                self.clip_frames > 1 or not getattr(self.augment, key),
                f"data.augment.{key} needs clips of several frames, got data.clip_frames=1",
            )
        self._check_stores()

    def _check_stores(self) -> None:
        require(
            not (self.store and self.stores),
            f"data.store={self.store} and data.stores ({', '.join(self.stores)}) both name data: "
            "give one of them (data.store= or data.stores={} takes the other back)",
        )
        for name, one in self.stores.items():
            require(
                name.isascii() and name.isalnum(),
                f"data.stores: {name!r} becomes part of subjects' names: use letters and digits",
            )
            require(bool(one.path), f"data.stores.{name} needs a path")
        weights = [one.weight for one in self.stores.values()]
        require(
            None not in weights or not any(weights),
            "data.stores: give every store a weight, or none (then each clip comes once an epoch): "
            + ", ".join(f"{name} has {one.weight}" for name, one in self.stores.items()),
        )


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
        one_of("task.source", self.source, ("events", "participants"))
        one_of("task.class_weights", self.class_weights, ("none", "balanced"))
        for name, kind in self.wanted().items():
            key = "task.kind" if name not in self.targets else f"task.targets.{name}"
            one_of(key, kind, ("classification", "regression", "ordinal"))
        kinds = list(self.wanted().values())
        require(
            0 <= self.label_smoothing < 1,
            f"task.label_smoothing is a share in [0, 1), got {self.label_smoothing}",
        )
        require(
            not self.label_smoothing or "classification" in kinds,
            f"task.label_smoothing={self.label_smoothing} is for classification, not {kinds[0]}",
        )
        require(
            self.class_weights == "none" or set(kinds) != {"regression"},
            f"task.class_weights={self.class_weights} needs a target with classes",
        )
        require(
            not self.levels or kinds.count("ordinal") == 1,
            f"task.levels={list(self.levels)} needs one target of kind ordinal",
        )
        one_of("task.level", self.level, ("event", "run", "subject"))
        require(math.isfinite(self.lag), f"task.lag is a number of seconds, got {self.lag}")
        require(
            not (self.source == "participants" and self.level == "event"),
            "task.level=event needs task.source=events; use level=subject for participants.tsv",
        )
        require(
            len(self.targets) < 2 or self.source == "participants" or self.level == "event",
            f"task.level={self.level} with several targets from events is ambiguous: use "
            "task.level=event",
        )

    def wanted(self) -> dict[str, str]:
        """Kind of each target by its name, in the order of a head's outputs."""
        return dict(self.targets) or {self.target: self.kind}


@dataclass
class MatchConfig:
    """A cohort whose two classes are alike in what must not decide; empty target: nobody is left
    out."""

    target: str = ""  # column of participants.tsv with two classes
    on: list[str] = field(default_factory=list)  # columns (numbers or classes) to be alike in
    caliper: float = 0.2  # a pair's logit propensities differ by at most so many s.d.

    def __post_init__(self) -> None:
        require(
            bool(self.target) == bool(self.on),
            f"split.match needs both target and on, got target={self.target!r}, on={list(self.on)}",
        )
        require(
            self.target not in self.on,
            f"split.match.on={list(self.on)} holds the target itself: the classes would be "
            "told apart by it",
        )
        require(
            0 < self.caliper < math.inf,
            f"split.match.caliper must be a number above 0, got {self.caliper}",
        )


@dataclass
class SplitConfig:
    """Which units train, validate and test. Written to a file once, then reused."""

    by: str = "subject"  # subject | session | run | family | site: never divided between the parts
    column: str = ""  # family, site: of participants.tsv, or `site,family`; empty: the name of `by`
    folds: int = 5  # every unit is in the test part of exactly one fold
    fold: int = 0  # the fold of this run
    validation: float = 0.2  # share of the non-test units held out for validation
    train_units: int = 0  # train on so many units only, the first of one order; 0: on all
    seed: int = 0  # of the shuffle; another one is another repetition of the k-fold
    stratify: list[str] = field(default_factory=list)  # columns that all parts have alike
    bins: int = 4  # quantile bins of a numeric column of split.stratify
    match: MatchConfig = field(default_factory=MatchConfig)
    inner: int = 0  # folds within training + validation that choose a baseline's penalty; 0: none
    file: str | None = None  # an existing split file to use as it is

    def __post_init__(self) -> None:
        one_of("split.by", self.by, ("subject", "session", "run", "family", "site"))
        require(
            not self.column or self.by in ("family", "site"),
            f"split.column={self.column!r} is for split.by=family or site, not {self.by}",
        )
        require(self.train_units >= 0, f"split.train_units must be ≥ 0, got {self.train_units}")
        require(self.folds >= 2, f"split.folds must be ≥ 2, got {self.folds}")
        require(
            0 <= self.fold < self.folds,
            f"split.fold must be in 0..{self.folds - 1}, got {self.fold}",
        )
        require(
            0 <= self.validation < 1, f"split.validation must be in [0, 1), got {self.validation}"
        )
        require(self.bins >= 2, f"split.bins must be ≥ 2, got {self.bins}")
        require(
            self.inner == 0 or self.inner >= 2, f"split.inner must be 0 or ≥ 2, got {self.inner}"
        )
        twice = sorted({name for name in self.stratify if self.stratify.count(name) > 1})
        require(not twice, f"split.stratify names {', '.join(twice)} twice")


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
        require(
            self.max_micro_batch >= 0,
            f"train.max_micro_batch must be ≥ 0, got {self.max_micro_batch}",
        )
        require(
            not (self.max_micro_batch and self.accumulate > 1),
            f"train.accumulate={self.accumulate} and train.max_micro_batch="
            f"{self.max_micro_batch} both set the accumulation: give one of them",
        )
        one_of("train.precision", self.precision, ("fp32", "bf16"))
        one_of("train.checkpointing", self.checkpointing, CHECKPOINTING)
        one_of("train.device", self.device, ("auto", "cpu", "cuda", "xpu"))
        require(self.zero_stage in (0, 1, 2, 3), f"train.zero_stage is 0–3, got {self.zero_stage}")
        for key in ("steps", "batch_size", "accumulate", "log_every", "keep"):
            value = getattr(self, key)
            require(value >= 1, f"train.{key} must be ≥ 1, got {value}")
        for key in ("warmup", "min_lr_ratio"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"train.{key} is a share in [0, 1], got {value}")
        for key in ("weight_decay", "clip_norm", "save_every", "validate_every", "patience"):
            value = getattr(self, key)
            require(value >= 0, f"train.{key} must be ≥ 0, got {value}")
        for key in ("lr", "eps"):
            value = getattr(self, key)
            require(value > 0, f"train.{key} must be > 0, got {value}")
        for key in ("patience", "keep_best"):
            require(
                not getattr(self, key) or self.validate_every > 0,
                f"train.{key}={getattr(self, key)} needs validations on the way: set "
                "train.validate_every",
            )
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"train.betas needs two numbers in [0, 1), got {list(self.betas)}",
        )


SWEEP_LOSSES = ("validation", "train")


@dataclass
class SweepConfig:
    """Which models `mup transfer` and `scaling sweep` train; everything else is the recipe's."""

    widths: list[int] = field(
        default_factory=list
    )  # backbone.embed_dim; heads grow in number with it. Empty: 1, 2, 4 and 8 times the base
    rates: list[float] = field(
        default_factory=list
    )  # transfer: train.lr; empty: 2^-2 … 2^2 times the recipe's. Goes on while the last is best
    samples: list[int] = field(
        default_factory=list
    )  # scaling: clips seen in training (steps × batch); every schedule ends at its own
    units: list[int] = field(
        default_factory=lambda: [0]
    )  # scaling: training units (split.train_units); 0: all
    variants: dict[str, list[str]] = field(
        default_factory=dict
    )  # scaling: name → overrides, such as of data; one law each
    seeds: int = 1  # trainings of every setting, train.seed and on
    loss: str = "validation"  # validation | train (mean over the last tenth of the steps)

    def __post_init__(self) -> None:
        one_of("sweep.loss", self.loss, SWEEP_LOSSES)
        require(self.seeds >= 1, f"sweep.seeds must be ≥ 1, got {self.seeds}")
        for key, least in (("widths", 1), ("samples", 1), ("units", 0)):
            values = getattr(self, key)
            require(
                all(value >= least for value in values),
                f"sweep.{key} needs numbers ≥ {least}, got {list(values)}",
            )
        for key in ("widths", "rates", "samples", "units"):
            values = getattr(self, key)
            require(
                len(set(values)) == len(values), f"sweep.{key} has a value twice: {list(values)}"
            )
        require(
            all(0 < rate < math.inf for rate in self.rates),
            f"sweep.rates needs positive numbers, got {list(self.rates)}",
        )
        require(bool(self.units), "sweep.units is empty: give 0 for all training units")
        for name in self.variants:
            require(
                bool(name) and all(c.isalnum() or c in "-_." for c in name) and name[0] != ".",
                f"sweep.variants: {name!r} becomes a folder: use letters, digits, - and _",
            )
