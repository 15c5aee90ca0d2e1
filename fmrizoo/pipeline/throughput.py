"""Throughput at several numbers of ranks, measured here: the runs of ``fmrizoo bench scaling``.

Every round starts each number of ranks once, forwards in even rounds and backwards in odd ones, so
that a machine that gets slower (or busier) for a while does so for all sizes. Each start is a real
run of the trainer in processes of its own, in a run folder of its own, that saves nothing.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fmrizoo.cluster.scaling import MODES, Series
from fmrizoo.cluster.scaling_logs import LEAST, WARMUP, read_run, series_of_runs
from fmrizoo.config import Recipe, to_dict
from fmrizoo.errors import RecipeError, TrainingError
from fmrizoo.files import write_atomic
from fmrizoo.pipeline.inputs import open_data
from fmrizoo.trainer.device import World, discover
from fmrizoo.trainer.zero import micro_batch

BUSY = 0.25  # load average a core, before the first start, from which on it is said
WORDS = "bench.json"  # in a run folder: what its ranks are told
GRACE = 10.0  # seconds for ranks to end by themselves after another has failed
OnStart = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Bench:
    """What is to be measured.

    Attributes:
        recipe: Of a pretraining; its ``train.batch_size`` is that of every size (strong scaling),
            or that of the smallest (weak).
        ranks: Numbers of ranks, rising.
        steps: Measured steps of a start.
        warmup: Steps before them that do not count.
        rounds: Starts of each size.
        mode: ``strong`` or ``weak``.
        synthetic: Random clips made once in memory, in place of the recipe's store.
    """

    recipe: Recipe
    ranks: tuple[int, ...] = (1, 2, 4)
    steps: int = 10
    warmup: int = WARMUP
    rounds: int = 3
    mode: str = "strong"
    synthetic: bool = False

    def __post_init__(self) -> None:
        if self.recipe.objective is None or self.recipe.backbone is None:
            raise RecipeError(
                "bench scaling measures pretraining: take a recipe with an objective, such as "
                "pretrain/swin4d_simmim"
            )
        if self.mode not in MODES:
            raise RecipeError(f"--mode is strong or weak, got {self.mode!r}")
        if not self.ranks or min(self.ranks) < 1 or list(self.ranks) != sorted(set(self.ranks)):
            raise RecipeError(
                f"--ranks takes rising numbers ≥ 1, each once, such as 1,2,4; got "
                f"{','.join(map(str, self.ranks))}"
            )
        for key, least in (("steps", LEAST), ("warmup", 0), ("rounds", 1)):
            if getattr(self, key) < least:
                raise RecipeError(f"--{key} must be ≥ {least}, got {getattr(self, key)}")
        for ranks in self.ranks:
            try:
                micro_batch(self.at(ranks).train, World(0, ranks))
            except RecipeError as error:
                raise RecipeError(f"{ranks} ranks, {self.mode} scaling: {error}") from None

    def at(self, ranks: int) -> Recipe:
        """The recipe of one start on ``ranks`` ranks."""
        train = self.recipe.train
        batch = train.batch_size
        if self.mode == "weak":
            if batch % self.ranks[0]:
                raise RecipeError(
                    f"train.batch_size={batch} is that of the smallest size and cannot be divided "
                    f"over its {self.ranks[0]} ranks"
                )
            batch = batch // self.ranks[0] * ranks
        train = replace(
            train,
            steps=self.warmup + self.steps,
            batch_size=batch,
            log_every=1,
            save_every=0,
            patience=0,
            keep_best=False,
            validate_every=0,
            profile=False,
            cache_features=False,
        )
        # Where weights come from does not change the time of a step.
        return replace(self.recipe, train=train, init_from=None)


def bench_scaling(
    bench: Bench, out: Path, *, name: str = "", on_start: OnStart | None = None
) -> Series:
    """Measure every size in every round.

    Args:
        bench: What.
        out: Run folders go to ``runs/ranks-N/round-K`` below it; those of an earlier call with the
            same recipe are written anew.
        name: Of the series; empty: of backbone, objective and mode.
        on_start: Told (starts done, starts in all, what starts now).

    Raises:
        RecipeError: a launcher has started this process as one of several ranks, or a recipe that
            cannot be trained.
        TrainingError: a rank failed (its output is named).
        DataError, CorruptStoreError: unusable data.
    """
    if (size := discover().size) > 1:
        raise RecipeError(
            f"bench scaling starts its ranks itself, and a launcher has started {size} of it: "
            "start one; for a job of several nodes read its logs with --logs"
        )
    if not bench.synthetic:
        open_data(bench.recipe)  # refused before the first start
    threads = _threads(bench)
    notes = list(_notes(bench, threads))
    done, runs = 0, []
    for number in range(bench.rounds):
        for ranks in bench.ranks if number % 2 == 0 else bench.ranks[::-1]:
            if on_start:
                what = f"round {number + 1}, {ranks} rank{'s' * (ranks > 1)}"
                on_start(done, bench.rounds * len(bench.ranks), what)
            folder = out / "runs" / f"ranks-{ranks}" / f"round-{number + 1}"
            _start(bench, folder, ranks, threads)
            runs.append(read_run(folder, bench.warmup))
            done += 1
    if on_start:
        on_start(done, done, "")
    recipe = bench.recipe
    return series_of_runs(
        runs,
        name=name or f"{recipe.backbone.name} {recipe.objective.name}, this machine",
        mode=bench.mode,
        by="ranks",
        source=(
            f"{bench.rounds} rounds of {bench.steps} steps after {bench.warmup} of warm-up; rounds "
            "alternate between the sizes; median of the rounds' medians, range over rounds"
        ),
        notes=notes,
        paired=True,
    )


def _threads(bench: Bench) -> int:
    """Of each rank, the same at all sizes: else one rank would have more of the machine."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // max(bench.ranks))


def _notes(bench: Bench, threads: int) -> Iterator[str]:
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    yield (
        "Data: random clips held in memory, so that reading does not limit (--synthetic)."
        if bench.synthetic
        else "Data: the recipe's store, read by the loader."
    )
    yield f"One machine of {cores} cores; every rank has {threads} thread{'s' * (threads > 1)}."
    if load > BUSY * cores:
        yield (
            f"The machine was busy before the first start (load average {load:.1f} on {cores} "
            "cores): others took part of it, and the numbers are too low."
        )


# --- the starter's side ---------------------------------------------------------------------------


def _start(bench: Bench, folder: Path, ranks: int, threads: int) -> None:
    """Run ``ranks`` processes until all have ended; the first that fails ends the others."""
    words = {
        "recipe": to_dict(bench.at(ranks)),
        "out": str(folder),
        "synthetic": bench.synthetic,
        "parent": os.getpid(),
    }
    write_atomic(folder / WORDS, json.dumps(words, indent=2).encode())
    command = [sys.executable, "-m", "fmrizoo.pipeline.throughput", str(folder / WORDS)]
    # An elastic agent of a launcher far above is not the one to meet at.
    env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    env |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": str(threads)}
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, path in enumerate(logs):
            own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with path.open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        command, env=own, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                )
        _wait(processes, logs)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    failed_at: float | None = None
    while True:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return
        if any(codes) and failed_at is None:
            failed_at = time.monotonic()
        late = failed_at is not None and time.monotonic() - failed_at > GRACE
        if any(codes) and (late or None not in codes):
            break
        time.sleep(0.05)
    # The first that says why: ranks that lost another only say that.
    told = [(rank, code, _last(logs[rank])) for rank, code in enumerate(codes) if code]
    rank, code, last = min(told, key=lambda t: not t[2].startswith("error: "))
    raise TrainingError(
        f"rank {rank} of {len(processes)} ended with code {code}: "
        f"{last.removeprefix('error: ') or 'it said nothing'} (its output: {logs[rank]})"
    )


def _last(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith("error: ")] or [v for v in lines if v.strip()]
    return said[-1] if said else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- a rank's side --------------------------------------------------------------------------------


def take_steps(recipe: Recipe, out: Path, *, synthetic: bool) -> None:
    """All steps of one start on this rank; only the run folder's small files are written.

    Raises:
        TrainingError: a signal came before the last step, or what the trainer raises.
    """
    from fmrizoo.data.clips import ClipTable
    from fmrizoo.pipeline.inputs import fit_grid, loader, run_training
    from fmrizoo.pipeline.random_clips import RandomClips, grid_of
    from fmrizoo.trainer.device import seed_everything
    from fmrizoo.trainer.inputs import BatchStream, TrainerInputs
    from fmrizoo.zoo import build_model

    world = discover()
    data = None if synthetic else open_data(recipe)
    table = None
    if data is not None:
        table = ClipTable.windows(data.store, data.part("train"), recipe.data)
    seed_everything(recipe.train.seed)
    model: Any = build_model(recipe)
    if table is not None:
        fit_grid(model.backbone, table)
    grid = grid_of(recipe, model.backbone)

    def stream(of: World, micro: int) -> BatchStream:
        if table is None:
            return RandomClips(grid, micro, seed=recipe.train.seed * 1000 + of.rank)
        return loader(table, recipe, micro, world=of)

    done = run_training(
        TrainerInputs(
            model=model,
            recipe=recipe,
            out=out,
            loader_for=stream,
            world=world,
            measured_only=True,
        )
    )
    if done.interrupted:
        raise TrainingError(f"a signal stopped the ranks after step {done.step}")


def main(words: dict[str, Any]) -> int:
    """One rank: exit code."""
    import logging

    from fmrizoo.errors import FmrizooError
    from fmrizoo.pipeline.pool import stop_without
    from fmrizoo.zoo import load_recipe

    stop_without(words["parent"])
    logging.basicConfig(level="INFO", format="%(message)s")
    try:
        take_steps(
            load_recipe(words["recipe"]), Path(words["out"]), synthetic=bool(words["synthetic"])
        )
    except FmrizooError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    from fmrizoo.trainer.device import end_rank

    ended = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    end_rank(ended)
    sys.exit(ended)
