"""The quality page of a store: every run with its measures and three slices, the worst first."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo import __version__
from fmrizoo.config import QcConfig
from fmrizoo.data.legacy import UNKNOWN
from fmrizoo.data.qc import LIMITS, Measures, QcRow
from fmrizoo.data.spatial import reorient
from fmrizoo.data.store import Store
from fmrizoo.files import write_atomic

_SIZE = 126  # CSS pixels of the longest side of a slice


@dataclass(frozen=True)
class Slice:
    """One slice as a data URI, its size in CSS pixels, and what lies at its left and right."""

    uri: str
    width: int
    height: int
    left: str
    right: str
    name: str


@dataclass(frozen=True)
class Card:
    """One run as the page shows it."""

    name: str
    flags: tuple[str, ...]
    numbers: tuple[tuple[str, str, bool], ...]  # label, value, beyond its limit
    slices: tuple[Slice, ...]
    note: str


def write_page(
    store: Store, rows: Sequence[QcRow], path: Path, limits: QcConfig, *, pictures: int = 200
) -> None:
    """Write the page; nothing in it is loaded from anywhere else.

    Args:
        rows: Of :func:`fmrizoo.data.qc.assess`, in the order to be shown.
        pictures: So many runs get slices; the rest is listed without.

    Raises:
        DataError: ``path`` cannot be written.
        CorruptStoreError: a pictured run is damaged.
    """
    import jinja2

    env = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = files("fmrizoo.report").joinpath("qc.html.j2").read_text(encoding="utf-8")
    cards = [_card(store, row, limits, i < pictures) for i, row in enumerate(rows)]
    page = {
        "title": f"Quality of {store.path.name}",
        "date": datetime.now(UTC).strftime("%-d %B %Y"),
        "version": __version__,
        "flagged": sum(bool(row.flags) for row in rows),
        "runs": len(rows),
        "subjects": len({row.run.subject for row in rows}),
        "cards": cards,
        "without": max(0, len(rows) - pictures),
        "reasons": _reasons(rows, limits),
        "summary": _summary(rows),
    }
    write_atomic(path, env.from_string(text).render(page=page).encode())


def _reasons(rows: Sequence[QcRow], limits: QcConfig) -> list[tuple[str, str, str, str]]:
    """(check, limit, setting, runs beyond it) of every check."""
    found = []
    for limit in LIMITS:
        bound = getattr(limits, limit.setting)
        setting = f"prepare.qc.{limit.setting}"
        known = [row for row in rows if row.measures[limit.measure] is not None]
        beyond = sum(any(f"({setting})" in flag for flag in row.flags) for row in known)
        side = "at least" if limit.below else "at most"
        said = f"{side} {limit.scale * bound:.3g}{limit.unit}" if bound else "not checked"
        count = f"{beyond} of {len(known)}" if bound and known else "–"
        found.append((limit.words, said, setting, count))
    return found


# Label, measure, factor, format.
_NUMBERS = (
    ("tSNR", "tsnr", 1, "{:.3g}"),
    ("FD mean, mm", "fd_mean", 1, "{:.2f}"),
    ("FD max, mm", "fd_max", 1, "{:.2f}"),
    ("DVARS mean, %", "dvars", 1, "{:.2f}"),
    ("DVARS max, %", "dvars_max", 1, "{:.2f}"),
    ("leaps, % of frames", "spikes", 100, "{:.1f}"),
    ("dark voxels, %", "dropout", 100, "{:.1f}"),
    ("inside the grid, %", "inside", 100, "{:.1f}"),
    ("template, %", "cover", 100, "{:.1f}"),
    ("quantisation, %", "quantisation_error", 100, "{:.2f}"),
    ("frames", "frames", 1, "{:d}"),
    ("TR, s", "tr", 1, "{:.4g}"),
    ("minutes", "minutes", 1, "{:.1f}"),
)


def _shown(measures: Measures, measure: str, factor: int, form: str) -> str:
    value = measures[measure]
    return "–" if value is None else form.format(factor * value)


def _summary(rows: Sequence[QcRow]) -> list[tuple[str, str, str, str]]:
    """(measure, lowest, median, highest) over runs."""
    found = []
    for label, measure, factor, form in _NUMBERS:
        values = [row.measures[measure] for row in rows if row.measures[measure] is not None]
        if values:
            ordered = sorted(values)
            picked = (ordered[0], ordered[len(ordered) // 2], ordered[-1])
            low, middle, high = (form.format(factor * v) for v in picked)
            found.append((label, low, middle, high))
    return found


def _card(store: Store, row: QcRow, limits: QcConfig, pictured: bool) -> Card:
    beyond = {
        limit.measure
        for limit in LIMITS
        if any(f"(prepare.qc.{limit.setting})" in flag for flag in row.flags)
    }
    numbers = []
    for label, measure, factor, form in _NUMBERS:
        if measure in ("fd_max", "dvars_max"):  # beside the mean
            continue
        shown = _shown(row.measures, measure, factor, form)
        if measure in ("fd_mean", "dvars") and row.measures[measure] is not None:
            highest = {"fd_mean": "fd_max", "dvars": "dvars_max"}[measure]
            shown += f" / {_shown(row.measures, highest, factor, form)}"
            label = label.replace("mean", "mean / max")
        numbers.append((label, shown, measure in beyond))
    numbers.append(("axes of the source", row.measures["source_axes"] or "–", False))
    note = "Prepared without measures: taken from the stored values now." if row.from_store else ""
    return Card(
        row.run.name,
        tuple(flag.rsplit(" (prepare.qc.", 1)[0] for flag in row.flags),
        tuple(numbers),
        _slices(store, row) if pictured else (),
        note,
    )


def _slices(store: Store, row: QcRow) -> tuple[Slice, ...]:
    """Axial, coronal and sagittal slice through the middle of the brain."""
    reader = store.open(row.run)
    # Data without a mean signal show their spread.
    values = reader.decoder.mean if row.measures["tsnr"] is not None else reader.decoder.std
    low, high = np.percentile(values, [1, 99])
    shades = np.clip((values - low) / max(float(high - low), 1e-12), 0, 1)
    volume = np.zeros(reader.grid, np.uint8)
    volume.reshape(-1)[reader.index] = np.rint(30 + 225 * shades).astype(np.uint8)
    known = row.run.contract.orientation != UNKNOWN
    affine = np.asarray(row.run.affine)
    volume, affine = reorient(volume, affine, "RAS")
    size = np.sqrt((affine[:3, :3] ** 2).sum(0))
    extent = size * volume.shape
    scale = _SIZE / extent.max()
    middle = [int(np.median(where)) for where in np.nonzero(volume)]
    found = []
    for name, axis, (across, up), ends in (
        ("axial", 2, (0, 1), ("L", "R")),
        ("coronal", 1, (0, 2), ("L", "R")),
        ("sagittal", 0, (1, 2), ("P", "A")),
    ):
        flat = np.take(volume, middle[axis], axis).T[::-1]
        width, height = (max(2, round(float(scale * extent[i]))) for i in (across, up))
        left, right = ends if known else ("?", "?")
        found.append(Slice(_png(flat), width, height, left, right, name))
    return tuple(found)


def _png(shades: NDArray[np.uint8]) -> str:
    from PIL import Image

    content = io.BytesIO()
    image: Any = Image.fromarray(np.ascontiguousarray(shades))
    image.save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
