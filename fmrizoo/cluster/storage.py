"""Bytes, files, bandwidth and opens that a data set costs in each layout, by arithmetic.

Model: every subject has one run of ``frames`` frames; a clip is ``clip_frames`` neighbouring frames
at a random start; each node reads ``rate`` clips a second; nothing is cached. Dense layouts hold
the whole grid, ours the brain voxels. Ratios that arithmetic cannot give were measured once: what
gzip leaves of raw fp16 on synthetic BOLD in the MNI mask (2 mm, tSNR 54), and read calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from fmrizoo.errors import RecipeError

GZIP = 0.275  # of dense fp16, with chunks of any shape (deflate never sees the frame before)
PT_FILE = 1300  # bytes that torch.save adds to a frame
PT_CALLS = 12  # read calls of torch.load for one frame
AUTO_BYTES, AUTO_CALLS = 2.1, 788 / 20  # h5py's own chunks (31, 12, 12, 12): × bytes, calls a frame
CROP = (75, 93, 81)  # voxels that SwiFT's frames keep of 96 × 96 × 96
PAGE = 4096  # rows of our store are whole pages
PER_VOXEL = 8  # bytes: offset and scale, read once a visit
MAP = 50_000  # bytes of the mask as runs, and of the metadata
VISIT_CALLS = 22  # read calls to open a run of our store (benchmarks/visits.py)


@dataclass(frozen=True)
class DataSet:
    """What is to be stored and read.

    Attributes:
        subjects, frames: How many; frames of one subject.
        grid: Voxels x, y, z.
        brain: Share of the grid's voxels that are brain.
        clip_frames: Frames of a clip.
        clips_per_visit: Clips that are read of a run once it is open.
        rate: Clips a second that one node trains on.
    """

    subjects: int
    frames: int
    grid: tuple[int, int, int] = (96, 96, 96)
    brain: float = 0.287
    clip_frames: int = 20
    clips_per_visit: int = 4
    rate: float = 27.44

    def __post_init__(self) -> None:
        for key in ("subjects", "frames", "clip_frames", "clips_per_visit", "rate"):
            if getattr(self, key) <= 0:
                raise RecipeError(f"{key} must be > 0, got {getattr(self, key)}")
        if not 0 < self.brain <= 1 or min(self.grid) < 1:
            raise RecipeError(
                f"brain is a share in (0, 1] of a grid of positive numbers, got {self.brain} of "
                f"{list(self.grid)}"
            )
        if self.clip_frames > self.frames:
            raise RecipeError(f"a clip of {self.clip_frames} frames is longer than {self.frames}")

    @property
    def voxels(self) -> int:
        """Of the grid."""
        return prod(self.grid)


@dataclass(frozen=True)
class Cost:
    """What one layout costs.

    Attributes:
        layout: Its name.
        files: In all.
        subject_bytes: Stored for one subject.
        clip_bytes: Read for one clip.
        clip_calls, clip_opens: Read calls and file opens for one clip.
    """

    layout: str
    files: int
    subject_bytes: float
    clip_bytes: float
    clip_calls: float
    clip_opens: float


def costs(data: DataSet) -> list[Cost]:
    """Every layout, ours last."""
    frames, clip = data.frames, data.clip_frames
    raw = 2.0 * data.voxels
    cropped = 2.0 * min(prod(CROP), data.voxels)
    packed = GZIP * raw
    row = -(-round(data.brain * data.voxels) // PAGE) * PAGE
    once = PER_VOXEL * round(data.brain * data.voxels) + MAP
    per_frame = data.subjects * frames

    def pt(name: str, frame: float) -> Cost:
        frame += PT_FILE
        return Cost(name, per_frame, frames * frame, clip * frame, clip * PT_CALLS, clip)

    return [
        pt(".pt per frame, fp16", raw),
        pt(".pt per frame, SwiFT's crop", cropped),
        Cost("NIfTI .nii.gz, whole", data.subjects, frames * packed, frames * packed, 1, 1),
        Cost("HDF5 gzip, own chunks", data.subjects, frames * packed, clip * packed * AUTO_BYTES,
             clip * AUTO_CALLS, 1),
        Cost("HDF5 gzip, 20 frames a chunk", data.subjects, frames * packed,
             packed * (clip + 19), (clip + 19) / 20, 1),
        Cost("HDF5 gzip, 1 frame a chunk", data.subjects, frames * packed, clip * packed, clip, 1),
        Cost("dense fp16, contiguous", data.subjects, frames * raw, clip * raw, 1, 1),
        Cost("fmrizoo int8", data.subjects, frames * row + once,
             clip * row + once / data.clips_per_visit, 1 + VISIT_CALLS / data.clips_per_visit,
             1 / data.clips_per_visit),
    ]  # fmt: skip


@dataclass(frozen=True)
class Demand:
    """What ``nodes`` nodes ask of the file system together, and of their own memory.

    Attributes:
        nodes: How many.
        bandwidth: Bytes a second.
        opens: Files a second.
        staged: Bytes on each node if it holds a copy of everything (``data.stage``).
        divided: Bytes on each node if the subjects were divided between them.
    """

    nodes: int
    bandwidth: float
    opens: float
    staged: float
    divided: float


def demand(data: DataSet, cost: Cost, nodes: int) -> Demand:
    """See :class:`Demand`.

    Raises:
        RecipeError: no node.
    """
    if nodes < 1:
        raise RecipeError(f"--nodes needs numbers ≥ 1, got {nodes}")
    clips, whole = data.rate * nodes, data.subjects * cost.subject_bytes
    return Demand(nodes, clips * cost.clip_bytes, clips * cost.clip_opens, whole, whole / nodes)


def table(data: DataSet, nodes: Sequence[int]) -> list[tuple[Cost, list[Demand]]]:
    """Every layout at every number of nodes."""
    return [(cost, [demand(data, cost, count) for count in nodes]) for cost in costs(data)]
