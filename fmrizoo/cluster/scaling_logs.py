"""Throughput out of run folders: ``metrics.jsonl``, ``env.json`` and ``recipe.yaml`` of each."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from fmrizoo.cluster.scaling import Point, Series, series_of
from fmrizoo.errors import DataError
from fmrizoo.trainer.folder import deciding_keys, read_metrics

log = logging.getLogger(__name__)

WARMUP = 3  # first steps of a run that are left out: kernels, caches and pools are filled there
BLOCKS = 5  # parts of one long log, whose medians say how far its throughput moves
LEAST = 2  # steps that a median needs
# Settings that leave the work of a step as it is.
_FREE = re.compile(
    r"init_from|split\..*|task\..*|train\.(steps|batch_size|accumulate|max_micro_batch|lr|warmup|"
    r"min_lr_ratio|weight_decay|betas|eps|clip_norm|seed|monitor|patience|keep_best|validate_every)"
)


@dataclass(frozen=True)
class RunLog:
    """What a run folder says about its speed, after warm-up.

    Attributes:
        folder: The run.
        nodes, ranks: Ranks over all nodes.
        batch: Clips of a step over all ranks.
        device: ``cpu``, ``cuda`` or ``xpu``.
        threads, cores: Of a CPU rank and its node, if known.
        rates: Clips a second of every step.
        stall: Share of the time spent waiting for data; None: not recorded.
        settings: Those of the recipe that decide the work of a step.
        torch: Its version.
    """

    folder: Path
    nodes: int
    ranks: int
    batch: int
    device: str
    threads: int | None
    cores: int | None
    rates: tuple[float, ...]
    stall: float | None
    settings: Mapping[str, Any]
    torch: str

    @property
    def rate(self) -> float:
        """Median over steps."""
        return median(self.rates)

    def blocks(self) -> list[float]:
        """Medians of consecutive parts of the log, at least :data:`LEAST` steps each."""
        parts = max(1, min(BLOCKS, len(self.rates) // LEAST))
        edges = [round(k * len(self.rates) / parts) for k in range(parts + 1)]
        return [median(self.rates[a:b]) for a, b in pairwise(edges)]


def read_run(folder: Path, warmup: int = WARMUP, ranks_per_node: int | None = None) -> RunLog:
    """Read one run folder.

    Args:
        folder: With metrics.jsonl, env.json and recipe.yaml.
        warmup: First rows of the metrics that are left out.
        ranks_per_node: For folders of versions that did not record the nodes.

    Raises:
        DataError: a file is missing or is not what it should be, too few steps, nodes unknown.
        CheckpointError: a line of the metrics is not one.
    """
    recipe = _mapping(folder / "recipe.yaml")
    env = _mapping(folder / "env.json")
    rates, stall = _speed(folder / "metrics.jsonl", warmup)
    ranks = _count(env, "world_size", folder)
    device = str(env.get("device", "")).split(":")[0]
    on_cpu = device == "cpu"
    (settings,) = deciding_keys(recipe)
    return RunLog(
        folder=folder,
        nodes=_nodes(env, folder, ranks, ranks_per_node),
        ranks=ranks,
        batch=_count(recipe.get("train"), "batch_size", folder),
        device=device,
        threads=env.get("threads") if on_cpu else None,
        cores=env.get("cores") if on_cpu else None,
        rates=rates,
        stall=stall,
        settings={k: v for k, v in settings.items() if not _FREE.fullmatch(k)},
        torch=str((env.get("versions") or {}).get("torch")),
    )


def _speed(path: Path, warmup: int) -> tuple[tuple[float, ...], float | None]:
    """Clips a second of every step after warm-up, and the share of their time without data."""
    rows = read_metrics(path)
    kept = rows[warmup:]
    if len(kept) < LEAST:
        raise DataError(
            f"{path} holds {len(rows)} step{'s' * (len(rows) != 1)}, and {warmup} of warm-up are "
            f"left out: at least {warmup + LEAST} are needed (train.log_every=1, more steps, or a "
            "smaller --warmup)"
        )
    for row in kept:
        if not _is_number(row.get("clips_per_second")) or row["clips_per_second"] <= 0:
            raise DataError(f"{path}, step {row['step']}: clips_per_second is not a number > 0")
    rates = tuple(float(row["clips_per_second"]) for row in kept)
    stalls = [row.get("stall") for row in kept]
    if not all(_is_number(stall) for stall in stalls):
        return rates, None
    seconds = [1 / rate for rate in rates]
    waited = sum(float(s or 0) * t for s, t in zip(stalls, seconds, strict=True))
    return rates, waited / sum(seconds)


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path} is missing: a run folder holds it")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a table of settings")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(values: Any, key: str, folder: Path) -> int:
    value = values.get(key) if isinstance(values, dict) else None
    if not isinstance(value, int) or value < 1:
        raise DataError(f"{folder}: {key} should be a whole number ≥ 1, got {value!r}")
    return value


def _nodes(env: Mapping[str, Any], folder: Path, ranks: int, per_node: int | None) -> int:
    if per_node is not None:
        if per_node < 1 or ranks % min(per_node, ranks):
            raise DataError(f"{folder} has {ranks} ranks, which are no nodes of {per_node} each")
        return max(1, ranks // per_node)
    if "nodes" in env:
        return _count(env, "nodes", folder)
    if ranks == 1:
        return 1
    raise DataError(
        f"{folder}/env.json has {ranks} ranks and does not say on how many nodes (an older "
        "version wrote it): give --ranks-per-node"
    )


# --- several runs ---------------------------------------------------------------------------------


def find_runs(pattern: str) -> list[Path]:
    """Run folders that a glob pattern matches, in name order.

    Raises:
        DataError: none.
    """
    matched = [Path(path) for path in sorted(glob(pattern))]
    found = [path for path in matched if (path / "metrics.jsonl").is_file()]
    if not found:
        what = f"none of its {len(matched)} matches holds" if matched else "nothing matches; needs"
        raise DataError(f"--logs {pattern!r}: {what} a metrics.jsonl (a run folder)")
    for path in matched:
        if path not in found:
            log.warning("%s is no run folder (no metrics.jsonl): left out", path)
    return found


def read_logs(
    pattern: str,
    *,
    mode: str = "strong",
    warmup: int = WARMUP,
    ranks_per_node: int | None = None,
    by: str | None = None,
    name: str = "",
) -> Series:
    """One series of the run folders that ``pattern`` matches.

    Several runs of one size are rounds of it. A single one is cut into :data:`BLOCKS` parts, whose
    medians give the range.

    Raises:
        DataError: see :func:`read_run`, or runs that cannot be compared.
    """
    runs = [read_run(folder, warmup, ranks_per_node) for folder in find_runs(pattern)]
    sizes = len({(run.nodes, run.ranks) for run in runs})
    label = name or f"{runs[0].settings.get('backbone.name', 'runs')} on {runs[0].device}"
    steps = min(len(run.rates) for run in runs)
    source = (
        f"{len(runs)} logs of {sizes} sizes ({pattern}), {steps} steps or more each after {warmup} "
        "of warm-up; ranges: "
        + ("over runs" if len(runs) > sizes else f"over medians of up to {BLOCKS} parts of a log")
    )
    return series_of_runs(runs, name=label, mode=mode, by=by, source=source)


def series_of_runs(
    runs: Sequence[RunLog],
    *,
    name: str,
    mode: str,
    by: str | None = None,
    source: str = "",
    notes: Sequence[str] = (),
    paired: bool = False,
) -> Series:
    """Runs that may be compared, as a series.

    Args:
        runs: Those of one size are its rounds, in this order.
        paired: Round k of every size ran beside round k of the others.

    Raises:
        DataError: two of them differ in the work of a step (both are named).
    """
    ordered = sorted(runs, key=lambda run: (run.nodes, run.ranks))
    _comparable(ordered, mode)
    versions = sorted({run.torch for run in runs})
    said = [f"Runs of different PyTorch versions: {', '.join(versions)}."] * (len(versions) > 1)
    points = [
        _point(list(group), paired)
        for _, group in groupby(ordered, key=lambda run: (run.nodes, run.ranks))
    ]
    return series_of(name, points, mode=mode, by=by, source=source, notes=[*notes, *said])


def _point(runs: Sequence[RunLog], paired: bool) -> Point:
    values = [run.rate for run in runs] if len(runs) > 1 or paired else runs[0].blocks()
    rate = median(values) if len(runs) > 1 else runs[0].rate
    some = len(values) > 1
    stalls = [run.stall for run in runs if run.stall is not None]
    first = runs[0]
    return Point(
        first.nodes,
        rate,
        ranks=first.ranks,
        rounds=tuple(values) if paired else (),
        low=min(*values, rate) if some else None,
        high=max(*values, rate) if some else None,
        batch=first.batch,
        stall=sum(stalls) / len(stalls) if len(stalls) == len(runs) else None,
        threads=first.threads,
        cores=first.cores,
    )


def _comparable(runs: Sequence[RunLog], mode: str) -> None:
    first = runs[0]
    for run in runs[1:]:
        pair = f"{first.folder} and {run.folder} cannot be compared"
        keys = sorted(first.settings.keys() | run.settings.keys())
        differ = [k for k in keys if first.settings.get(k) != run.settings.get(k)]
        if differ:
            a, b = (str(of.settings.get(differ[0])) for of in (first, run))
            more = f" (and {len(differ) - 1} more settings)" if len(differ) > 1 else ""
            raise DataError(f"{pair}: {differ[0]} is {a} in one and {b} in the other{more}")
        if first.device != run.device:
            raise DataError(f"{pair}: one ran on {first.device}, the other on {run.device}")
        if mode == "strong" and first.batch != run.batch:
            same = first.batch * run.ranks == run.batch * first.ranks
            hint = "equal per rank: --mode weak" if same else "strong scaling divides one batch"
            raise DataError(
                f"{pair}: train.batch_size is {first.batch} in one and {run.batch} in the other "
                f"({hint})"
            )
        if mode == "weak" and first.batch * run.ranks != run.batch * first.ranks:
            a, b = (f"{of.batch} clips on {of.ranks} ranks" for of in (first, run))
            raise DataError(f"{pair}: --mode weak needs one batch per rank, got {a} and {b}")
