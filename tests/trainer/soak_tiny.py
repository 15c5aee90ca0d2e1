"""A long run of a tiny model through the real loader and trainer, and what its process holds."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path

import torch
from scipy.stats import theilslopes
from torch import nn

from fmrizoo.config import Recipe
from fmrizoo.data.synthetic.config import load_synth_config
from fmrizoo.data.synthetic.write import synthesise
from fmrizoo.pipeline.inputs import loader, open_data
from fmrizoo.pipeline.pretraining import mean_logs
from fmrizoo.trainer.device import World, seed_everything
from fmrizoo.trainer.inputs import StepEvent, TrainerInputs, TrainResult
from fmrizoo.trainer.loop import train
from fmrizoo.zoo import build_model, load_recipe

VALIDATE, SAVE = 100, 150  # steps between two
BLOCK = 400  # steps of one level of load
LOAD = (0, 1, 2, 1)  # neighbours, block after block
# Clips and reader threads of one validation after the other.
VALIDATIONS = ((2, 1), (16, 4), (5, 2))
WARM = 340  # steps until every kind of validation and two checkpoints have been seen
MB = 2**20

# --- what the process holds ----------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What a process holds at one moment.

    Attributes:
        step: When.
        rss: Resident bytes that belong to no file.
        heap: Bytes in use of malloc, however many pages they lie on (a freed block counts in
            ``rss`` as long as its page stays, and not here).
        blocks: Small Python objects' memory blocks.
        tensors: Tensors that Python sees.
        descriptors, threads: Of the process.
        shm: Pieces of /dev/shm that it has mapped or open (other processes' are not its leak).
        temporary, staged: Files in the folder for temporary files; staged.
        checkpoints: Folders of checkpoints, whole or not.
    """

    step: int
    rss: int
    heap: int
    blocks: int
    tensors: int
    descriptors: int
    threads: int
    shm: int
    temporary: int
    staged: int
    checkpoints: int


# What must not grow by more than this in 1000 steps, after the warm-up. A leak that matters is of
# one thing a step: 1000 objects, or a batch (16 kB and more) and so over 16 MB. Allocators move
# by pages: a megabyte in 1000 steps is 0.1 GB in the 100000 steps of a full pretraining.
GROWTH: dict[str, float] = {"rss": MB, "heap": MB // 4, "blocks": 500, "tensors": 20}
CONSTANT = ("descriptors", "threads", "shm", "temporary", "staged")


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def heap_in_use() -> int:
    """Bytes of malloc that are handed out, over all arenas, mapped blocks included (glibc)."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo2
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def held(step: int, out: Path, stage: Path, temporary: Path, keep: int) -> Held:
    """Look at this process, between two checkpoints; garbage is collected before."""
    _published(out / "checkpoints", keep)
    gc.collect()
    status = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in status)
    anonymous = sum(int(values[key].split()[0]) for key in ("RssAnon", "RssShmem"))
    objects = gc.get_objects()
    return Held(
        step=step,
        rss=1024 * anonymous,
        heap=heap_in_use(),
        blocks=sys.getallocatedblocks(),
        tensors=sum(issubclass(type(o), torch.Tensor) for o in objects),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=_threads(),
        shm=_shared(),
        temporary=sum(len(files) for _, _, files in os.walk(temporary)),
        staged=sum(len(files) for _, _, files in os.walk(stage)),
        checkpoints=len(list((out / "checkpoints").glob("step-*"))),
    )


def _threads() -> int:
    """Threads that stay: the watchdog's timer is two for a moment when it is wound up."""
    counts = []
    for _ in range(3):
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.02)
    return min(counts)


def _published(checkpoints: Path, keep: int) -> None:
    """Wait until no checkpoint is on its way: a thread writes them, with files open meanwhile."""
    for _ in range(1000):
        names = sorted(path.name for path in checkpoints.glob("step-*"))
        latest = checkpoints / "latest"
        named = latest.read_text().strip() if latest.is_file() else ""
        # Dropping old ones comes last.
        if len(names) <= keep and names[-1:] == [named] * bool(names):
            return
        time.sleep(0.01)


def _shared() -> int:
    """Names in /dev/shm that this process has mapped or open, removed ones included."""
    mapped = [line.split(None, 5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    opened = []
    for entry in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor that listed the folder
            opened.append(os.readlink(f"/proc/self/fd/{entry}"))
    return len({name for name in (*mapped, *opened) if name.startswith("/dev/shm/")})


def settled(samples: list[Held]) -> list[Held]:
    """Those after the warm-up, in which caches fill and arenas find their size."""
    warm = max(WARM, samples[-1].step // 3)
    return [sample for sample in samples if sample.step > warm]


def slopes(samples: list[Held]) -> dict[str, float]:
    """Growth in 1000 steps, by what grows: the median of all slopes between two looks."""
    kept = settled(samples)
    steps = [float(sample.step) for sample in kept]
    found = {}
    for name in (f.name for f in fields(Held) if f.name != "step"):
        values = [float(getattr(sample, name)) for sample in kept]
        found[name] = 1000 * float(theilslopes(values, steps)[0])
    return found


def leaks(samples: list[Held], keep: int) -> list[str]:
    """What the samples say of leaks, a sentence each; none is what a run must have."""
    found = []
    for name, slope in slopes(samples).items():
        if name in GROWTH and slope > GROWTH[name]:
            found.append(f"{name} grows by {slope:.0f} in 1000 steps")
    for name in CONSTANT:
        seen = sorted({getattr(sample, name) for sample in settled(samples)})
        if len(seen) > 1:
            found.append(f"{name} is not constant: {seen}")
    if (most := max(sample.checkpoints for sample in samples)) > keep:
        found.append(f"{most} checkpoints instead of {keep}")
    return found


# --- the load ------------------------------------------------------------------------------------

_BUSY = "import time\nwhile True:\n    sum(range(200000))\n    time.sleep(0.002)\n"


class Neighbours:
    """Other processes that compute; as many as asked for."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []

    def be(self, many: int) -> None:
        while len(self._running) > many:
            one = self._running.pop()
            one.kill()
            one.wait()
        while len(self._running) < many:
            self._running.append(subprocess.Popen([sys.executable, "-S", "-c", _BUSY]))


@contextmanager
def neighbours() -> Iterator[Neighbours]:
    made = Neighbours()
    try:
        yield made
    finally:
        made.be(0)


# --- the run -------------------------------------------------------------------------------------


@dataclass
class Plan:
    """One run folder.

    Attributes:
        store: Where the clips are.
        folder: Run folder and staging area lie in it.
        steps: Of the whole run.
        every: Steps between two looks at the process.
        stops: Steps at whose end a SIGTERM comes; the run is then called again.
        inject: Called after every step: a leak on purpose.
    """

    store: Path
    folder: Path
    steps: int
    every: int = 20
    stops: tuple[int, ...] = ()
    inject: Callable[[StepEvent], None] = lambda event: None


@dataclass
class Seen:
    """What a run did."""

    looks: array[int] = field(default_factory=lambda: array("q"))  # Held after Held, as numbers
    starts: list[int | None] = field(default_factory=list)  # resumed_from, of every call
    after: list[tuple[int, int]] = field(default_factory=list)  # descriptors, threads; every call
    seconds: float = 0.0
    keep: int = 0
    step: int = 0

    @property
    def samples(self) -> list[Held]:
        width = len(fields(Held))
        return [Held(*self.looks[i : i + width]) for i in range(0, len(self.looks), width)]


def make_store(folder: Path) -> Path:
    """Six people of 40 frames on a grid of 8×8×8."""
    small = ["subjects=6", "frames=40", "prepare.grid=[8,8,8]", "prepare.voxel_size=[24,24,24]"]
    synthesise(folder, load_synth_config(None, small), store=True)
    return folder


def recipe_of(plan: Plan, threads: int) -> Recipe:
    stage = plan.folder / "stage"
    stage.mkdir(parents=True, exist_ok=True)
    values = {
        "data.store": plan.store,
        "data.stage": stage,
        "data.clip_frames": 4,
        "data.threads": threads,
        "data.windows": "random",
        "backbone.img_size": "[8,8,8,4]",
        "backbone.patch_size": "[4,4,4,2]",
        "backbone.window_size": "[2,2,2,2]",
        "backbone.depths": "[1]",
        "backbone.num_heads": "[2]",
        "backbone.embed_dim": 8,
        "train.device": "cpu",
        "train.steps": plan.steps,
        "train.batch_size": 4,
        "train.max_micro_batch": 2,
        "train.save_every": SAVE,
        "train.validate_every": VALIDATE,
        "train.keep_best": "true",
        "train.lr": 1e-3,
    }
    return load_recipe("pretrain/swin4d_simmim", [f"{k}={v}" for k, v in values.items()])


def soak(plan: Plan) -> Seen:
    """Run to the end, over all stops."""
    seen = Seen()
    with neighbours() as load:
        for stop in (*plan.stops, None):
            # Another number of threads at every start: the order of the clips is the same.
            result = _start(plan, seen, load, stop, threads=1 + (len(seen.starts) + 1) % 3)
            assert result.interrupted == (stop is not None)
            seen.starts.append(result.resumed_from)
            seen.step = result.step
            seen.seconds += result.seconds
            del result
            temporary = Path(os.environ["TMPDIR"])
            now = held(0, plan.folder / "run", plan.folder / "stage", temporary, seen.keep)
            seen.after.append((now.descriptors, now.threads))
    return seen


def _start(plan: Plan, seen: Seen, load: Neighbours, stop: int | None, threads: int) -> TrainResult:
    """One call of the trainer."""
    recipe, out = recipe_of(plan, threads), plan.folder / "run"
    seen.keep = recipe.train.keep
    data = open_data(recipe)
    table, held_out = data.windows("train", recipe), data.windows("validation", recipe)
    assert table is not None and held_out is not None
    seed_everything(recipe.train.seed)
    last = [seen.step]

    def validate(model: nn.Module, device: torch.device) -> dict[str, float]:
        # By the step, not by the count of calls: a run that resumes has the same ones.
        clips, readers = VALIDATIONS[last[0] // VALIDATE % len(VALIDATIONS)]
        other = replace(
            recipe,
            data=replace(recipe.data, threads=readers),
            train=replace(recipe.train, max_micro_batch=clips),
        )
        return mean_logs(held_out, other)(model, device)

    def on_step(event: StepEvent) -> None:
        last[0] = event.step
        plan.inject(event)
        if event.step % BLOCK == 0:
            load.be(LOAD[event.step // BLOCK % len(LOAD)])
        if event.step % plan.every == 0:
            temporary = Path(os.environ["TMPDIR"])
            if not seen.looks:
                gc.freeze()  # what importing made: else every look takes a second
            now = held(event.step, out, plan.folder / "stage", temporary, seen.keep)
            # Not a list of objects: looking must leave nothing behind that the next look counts.
            seen.looks.extend(astuple(now))
        if event.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    return train(
        TrainerInputs(
            model=build_model(recipe),
            recipe=recipe,
            out=out,
            loader_for=lambda world, micro: loader(table, recipe, micro, world=world),
            world=World(),
            validate=validate,
            on_step=on_step,
            contract=table.contract(recipe.data.normalization),
        )
    )
