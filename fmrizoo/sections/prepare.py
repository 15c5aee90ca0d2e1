"""The section ``prepare``: how NIfTI runs become a store."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from fmrizoo.sections.checks import one_of, require


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
