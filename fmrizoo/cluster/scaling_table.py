"""Throughput tables as CSV: read from elsewhere (or from an earlier call), written for others."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from fmrizoo.cluster.scaling import Point, Row, Series, baselines_of, rows_of, series_of
from fmrizoo.errors import DataError

SHIPPED = {"aurora": "aurora.csv"}  # tables of publications, by the name --table takes
_RATES = ("samples_per_second", "clips_per_second")
_COUNTS = ("nodes", "ranks_per_node", "batch", "threads", "cores")
_NUMBERS = (*_RATES, "low", "high", "stall")
_WORDS = ("system", "mode")
_KNOWN = (*_WORDS, *_COUNTS, *_NUMBERS)
# What is computed from the others: written, and not read again.
_DERIVED = ("unit", "rounds", "seconds_per_step", "oversubscribed", "speedup")
_DERIVED_OF = ("ideal_vs_", "efficiency_vs_")


def read_table(path: Path, mode: str = "strong", by: str | None = None) -> list[Series]:
    """Every system of a CSV file, in the file's order.

    Columns: ``nodes`` and ``samples_per_second`` (or ``clips_per_second``); optional ``system``,
    ``mode``, ``ranks_per_node``, ``low`` and ``high`` (a range), ``batch`` (clips of a step),
    ``stall`` (share of 1), ``threads`` and ``cores`` of CPU ranks. Lines that begin with ``#`` are
    comments. A ``scaling.csv`` of ``fmrizoo bench scaling`` can be read again.

    Args:
        path: The file, or the name of a shipped table (:data:`SHIPPED`).
        mode: Of systems without the column.
        by: As in :func:`fmrizoo.cluster.scaling.series_of`.

    Raises:
        DataError: no such file, another column, or a value that cannot be (line named).
    """
    name = str(path)
    if not path.exists() and name in SHIPPED:
        with as_file(files("fmrizoo.cluster").joinpath(SHIPPED[name])) as shipped:
            return _read(shipped, name, mode, by)
    return _read(path, name, mode, by)


def _read(path: Path, name: str, mode: str, by: str | None) -> list[Series]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        shipped = f" (shipped tables: {', '.join(SHIPPED)})" if not path.exists() else ""
        raise DataError(f"cannot read {path}: {error.strerror or error}{shipped}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text: save it as CSV") from None
    numbered = [(n, text) for n, text in enumerate(lines, 1) if text.strip() and text[0] != "#"]
    reader = csv.reader(text + "\n" for _, text in numbered)
    try:
        table = [(numbered[reader.line_num - 1][0], cells) for cells in reader]
    except csv.Error as error:
        raise DataError(f"{path} is no CSV: {error}") from None
    if not table:
        raise DataError(f"{path} is empty: it needs the columns nodes,{_RATES[0]}")
    head = [cell.strip().lower() for cell in table[0][1]]
    _check_head(path, head)
    systems: dict[tuple[str, str], list[Point]] = {}
    for number, cells in table[1:]:
        if len(cells) != len(head):
            raise DataError(f"{path}, line {number}: {len(cells)} cells under {len(head)} columns")
        row = {key: cell.strip() for key, cell in zip(head, cells, strict=True) if cell.strip()}
        key = (row.get("system", path.stem), row.get("mode", mode))
        systems.setdefault(key, []).append(_point(row, f"{path}, line {number}"))
    if not systems:
        raise DataError(f"{path} has columns and no row")
    source = f"table {name}"
    return [
        series_of(system, points, mode=of_mode, by=by, source=source)
        for (system, of_mode), points in systems.items()
    ]


def _check_head(path: Path, head: Sequence[str]) -> None:
    unknown = [c for c in head if c not in _KNOWN + _DERIVED and not c.startswith(_DERIVED_OF)]
    if unknown:
        raise DataError(f"{path}: unknown column {unknown[0]!r}; there are {', '.join(_KNOWN)}")
    if twice := [c for c in head if head.count(c) > 1]:
        raise DataError(f"{path}: column {twice[0]!r} is there twice")
    if "nodes" not in head or sum(rate in head for rate in _RATES) != 1:
        raise DataError(
            f"{path} needs the columns nodes and {_RATES[0]} (or {_RATES[1]}, not both), "
            f"got {', '.join(head)}"
        )


def _point(row: Mapping[str, str], where: str) -> Point:
    counts = {key: _count(row, key, where) for key in _COUNTS}
    numbers = {key: _number(row, key, where) for key in _NUMBERS}
    rates = [v for v in (numbers[rate] for rate in _RATES) if v is not None]
    nodes, stall = counts["nodes"], numbers["stall"]
    if nodes is None or not rates:
        missing = "nodes" if nodes is None else "samples_per_second"
        raise DataError(f"{where}: {missing} is empty")
    if stall is not None and not 0 <= stall <= 1:
        raise DataError(f"{where}: stall is a share in [0, 1], got {stall:g}")
    per_node = counts["ranks_per_node"]
    try:
        return Point(
            nodes,
            rates[0],
            ranks=None if per_node is None else per_node * nodes,
            low=numbers["low"],
            high=numbers["high"],
            batch=counts["batch"],
            stall=stall,
            threads=counts["threads"],
            cores=counts["cores"],
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _count(row: Mapping[str, str], key: str, where: str) -> int | None:
    if key not in row:
        return None
    if not (row[key].isascii() and row[key].isdigit() and int(row[key]) >= 1):
        raise DataError(f"{where}: {key} is a whole number ≥ 1, got {row[key]!r}")
    return int(row[key])


def _number(row: Mapping[str, str], key: str, where: str) -> float | None:
    if key not in row:
        return None
    try:
        return float(row[key])
    except ValueError:
        raise DataError(f"{where}: {key} is a number, got {row[key]!r}") from None


def to_csv(found: Sequence[Series], baselines: Sequence[int] = ()) -> str:
    """All series, unrounded, one line a row; empty cells: not known, or below the baseline."""
    bases = {id(one): baselines_of(one, baselines) for one in found}
    every = sorted({base for some in bases.values() for base in some})
    head = [*_WORDS, "unit", *_COUNTS, _RATES[1], "low", "high", "stall", *_DERIVED[1:]]
    for base in every:
        head += [f"ideal_vs_{base}", f"efficiency_vs_{base}"]
        head += [f"efficiency_vs_{base}_low", f"efficiency_vs_{base}_high"]
    out = io.StringIO()
    writer = csv.DictWriter(out, head, lineterminator="\n", restval="")
    writer.writeheader()
    for one in found:
        for row in rows_of(one, bases[id(one)]):
            writer.writerow({k: v for k, v in _cells(one, row).items() if v is not None})
    return out.getvalue()


def _cells(series: Series, row: Row) -> dict[str, Any]:
    point: Point = row.point
    per_node = point.per_node
    cells: dict[str, Any] = {
        "system": series.name,
        "mode": series.mode,
        "unit": series.unit,
        "nodes": point.nodes,
        "ranks_per_node": int(per_node) if per_node and per_node == int(per_node) else None,
        "clips_per_second": point.rate,
        "low": point.low,
        "high": point.high,
        "rounds": len(point.rounds) or None,
        "batch": point.batch,
        "seconds_per_step": point.seconds,
        "stall": point.stall,
        "threads": point.threads,
        "cores": point.cores,
        "oversubscribed": point.crowded,
        "speedup": row.speedup,
    }
    for base, found in row.efficiency.items():
        if found is not None:
            cells[f"ideal_vs_{base}"] = found.ideal
            cells[f"efficiency_vs_{base}"] = found.value
            cells[f"efficiency_vs_{base}_low"] = found.low
            cells[f"efficiency_vs_{base}_high"] = found.high
    return cells
