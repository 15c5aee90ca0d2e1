"""The section ``data``: which store is read and how clips are cut from its runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fmrizoo.sections.checks import one_of, require
from fmrizoo.sections.prepare import QcConfig

NORMALIZATIONS = ("znorm_minback", "znorm_zeroback", "minmax", "robust", "voxel", "none")
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
