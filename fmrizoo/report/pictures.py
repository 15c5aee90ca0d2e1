"""Pictures of one filled-in clip: slices (recorded, shown, filled in, error) and time courses.

Of a clip whose steps were each predicted from those before: recorded, predicted, error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo.report.figures import INK, RULE, VERMILLION, WIDTH, Image, png, style, svg
from fmrizoo.report.reconstruction import Picture

Array = NDArray[Any]
HIDDEN = "#cbd2d9"  # what the model was not shown; no colour of either map
_SIDES = {
    "R": "the subject's right",
    "L": "the subject's left",
    "A": "front",
    "P": "back",
    "S": "top",
    "I": "bottom",
}
_PLANES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True)
class View:
    """One slice at one frame, in the plane across ``axis``."""

    axis: int
    slice: int
    frame: int

    def cut(self, volume: Array) -> Array:
        """``(x, y, z[, t])`` → rows bottom up, columns left to right."""
        at_time = volume[..., self.frame] if volume.ndim == 4 else volume
        cut: Array = np.take(at_time, self.slice, axis=self.axis).T
        return cut


def views_of(picture: Picture, rows: int = 4) -> list[View]:
    """Slices at even distances through the hidden brain; for a single slice, frames instead."""
    axis, sizes = across(picture), picture.brain.shape
    per_frame = picture.hidden.sum((0, 1, 2))
    others = tuple(a for a in range(4) if a not in (axis, 3))
    if sizes[axis] == 1:
        frames = np.flatnonzero(per_frame)
        return [View(axis, 0, int(f)) for f in _even(frames, rows)]
    frame = int(per_frame.argmax())
    area = picture.hidden.sum(others)[:, frame]
    slices = np.flatnonzero(area * 3 >= area.max())
    return [View(axis, int(s), frame) for s in _even(slices, rows)][::-1]


def across(picture: Picture) -> int:
    """Across z, unless the data are one slice in another plane."""
    sizes = picture.brain.shape
    return 2 if sizes[2] == 1 or min(sizes) > 1 else int(np.argmin(sizes))


def _even(values: Array, n: int) -> Array:
    """At most ``n`` of ``values`` at even distances, ends left out where there is a choice."""
    if len(values) <= n:
        return values
    places = np.round((np.arange(n) + 0.5) * len(values) / n - 0.5).astype(int)
    return np.asarray(values[places])


@dataclass(frozen=True)
class Colors:
    """Maps and limits: one for the signal, one, about 0, for the error."""

    signal: str
    low: float
    high: float
    error: float


def colors_of(picture: Picture) -> Colors:
    inside = picture.truth[picture.brain]
    low, high = (float(v) for v in np.percentile(inside, [1, 99]))
    error = float(np.percentile(np.abs((picture.predicted - picture.truth)[picture.hidden]), 99))
    # Voxel-wise z-scores go up and down about 0 (in a clip: about a mean of its own); in other
    # scalings the anatomy is nearly all that differs.
    centred = inside.mean(-1).std() < 0.9 * inside.std() and low < 0 < high
    if centred:
        high = max(-low, high)
        low = -high
    return Colors("RdBu_r" if centred else "gray", low, high, max(error, 1e-9))


def slices(picture: Picture) -> Image:
    """Rows of slices or frames; columns recorded, (shown to the model,) filled in, error."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    views, colors = views_of(picture), colors_of(picture)
    horizontal, vertical = (a for a in range(3) if a != views[0].axis)
    box = box_of(picture, views[0].axis)
    height, width = box[1] - box[0], box[3] - box[2]
    aspect = picture.voxel_size[vertical] / picture.voxel_size[horizontal]
    titles = ["recorded", "shown to the model", "filled in", "error (filled in − recorded)"]
    if picture.step:
        titles = ["recorded", "predicted", "error (predicted − recorded)"]
    columns = len(titles)
    panel = (WIDTH - 0.9) / 4
    tall = min(panel * height * aspect / width, 2.2)
    with style():
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
        figure = Figure(figsize=(WIDTH, 0.85 + (tall + 0.08) * len(views)), layout=layout)
        grid = figure.subplots(len(views), columns, squeeze=False)
        shown: list[Any] = []
        for axes, view in zip(grid, views, strict=True):
            shown = draw_row(axes, picture, view, colors, aspect)
            for a in axes:
                a.set_xlim(box[2] - 0.5, box[3] - 0.5)
                a.set_ylim(box[0] - 0.5, box[1] - 0.5)
            axes[0].set_ylabel(name_of(view, picture), fontsize=8.5)
        for a, title in zip(grid[0], titles, strict=True):
            a.set_title(title, fontsize=9, fontweight="normal", loc="center")
        bars: dict[str, Any] = {
            "orientation": "horizontal",
            "aspect": 30,
            "shrink": 0.8,
            "pad": 0.02,
        }
        signal = figure.colorbar(shown[0], ax=grid[:, :-1], **bars)
        signal.set_label("normalised BOLD", fontsize=8.5)
        error = figure.colorbar(shown[-1], ax=grid[:, -1], **(bars | {"aspect": 10}))
        error.set_label("error, same unit", fontsize=8.5)
        for bar in (signal, error):
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=8)
        return png(figure, f"Slices by column: {', '.join(titles)}")


def draw_row(axes: Any, picture: Picture, view: View, colors: Colors, aspect: float) -> list[Any]:
    brain = view.cut(picture.brain)
    hidden = view.cut(picture.hidden)
    truth, filled = view.cut(picture.truth), view.cut(picture.filled)
    signal = (colors.signal, colors.low, colors.high)
    panels = [
        (truth, brain, signal, None),
        (truth, brain & ~hidden, signal, HIDDEN),
        (filled, brain, signal, None),
        (filled - truth, hidden, ("PuOr_r", -colors.error, colors.error), "#eef1f4"),
    ]
    if picture.step:
        del panels[1]
    images = []
    for a, (values, seen, (cmap, low, high), cover) in zip(axes, panels, strict=True):
        covered = brain & ~seen
        if cover is not None and covered.any():
            grey = np.zeros((*brain.shape, 4))
            grey[covered] = _rgba(cover)
            a.imshow(grey, origin="lower", aspect=aspect, interpolation="nearest")
        image = a.imshow(
            np.ma.masked_where(~seen, values),
            cmap=cmap,
            vmin=low,
            vmax=high,
            origin="lower",
            aspect=aspect,
            interpolation="nearest",
        )
        images.append(image)
        bare(a, brain)
    return images


def bare(axes: Any, brain: Array) -> None:
    """A slice with the brain's edge and nothing around it."""
    _outline(axes, brain)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _rgba(color: str) -> tuple[float, float, float, float]:
    from matplotlib.colors import to_rgba

    return to_rgba(color)


def _outline(axes: Any, brain: Array) -> None:
    """The brain's edge along voxel borders (a contour would cut corners of coarse voxels)."""
    from matplotlib.collections import LineCollection

    padded = np.pad(brain, 1)
    lines = []
    for y, x in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        lines.append([(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)])
    for y, x in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        lines.append([(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)])
    axes.add_collection(LineCollection(lines, colors=INK, linewidths=0.7, capstyle="projecting"))


def box_of(picture: Picture, axis: int) -> tuple[int, int, int, int]:
    """Rows and columns (from, to) around the brain over all slices across ``axis``."""
    flat = np.asarray(picture.brain.any(axis)).T
    rows, columns = np.flatnonzero(flat.any(1)), np.flatnonzero(flat.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def name_of(view: View, picture: Picture) -> str:
    if picture.brain.shape[view.axis] == 1:
        return f"{view.frame * picture.tr:.1f} s"
    return f"{_PLANES[view.axis]} {view.slice + 1}"


def sides(picture: Picture, orientation: str) -> str:
    """Which side of the subject is where in the panels, in words.

    Args:
        picture: The clip.
        orientation: Axis codes of the array, ``RAS`` = right, anterior and superior grow.
    """
    horizontal, vertical = (a for a in range(3) if a != across(picture))
    right, up = _SIDES[orientation[horizontal]], _SIDES[orientation[vertical]]
    return f"Right in the picture is {right}, up is {up}."


def courses(picture: Picture) -> Image:
    """Three voxels over the clip: a well, a typically and a badly filled-in one.

    They are the voxels at the 10th, 50th and 90th percentile of the mean error on hidden frames,
    among those hidden in at least one frame: not picked by eye.
    """
    from matplotlib.figure import Figure

    chosen = _ranked(picture)
    seconds = np.arange(picture.truth.shape[-1]) * picture.tr
    with style():
        figure = Figure(figsize=(WIDTH, 0.55 + 1.15 * len(chosen)), layout="constrained")
        grid = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, voxel) in zip(grid, chosen, strict=True):
            hidden = picture.masked[voxel]
            for frame in () if picture.step else np.flatnonzero(hidden):
                span = ((frame - 0.5) * picture.tr, (frame + 0.5) * picture.tr)
                axes.axvspan(*span, color=RULE, alpha=0.55, lw=0)
            truth, predicted = picture.truth[voxel], picture.predicted[voxel]
            axes.plot(seconds, truth, color=INK, lw=1.3, marker=".", ms=4, label="recorded")
            axes.plot(
                seconds[hidden],
                predicted[hidden],
                color=VERMILLION,
                ls="",
                marker="D",
                ms=4,
                label="one step ahead" if picture.step else "filled in",
            )
            axes.set_title(f"{name}: voxel {', '.join(map(str, voxel))}", fontsize=8.5)
            axes.margins(x=0.02)
        grid[-1].set_xlabel("seconds into the clip")
        figure.supylabel("normalised BOLD", fontsize=9)
        _legend(grid[0], picture)
        what = "predicted" if picture.step else "filled-in"
        grey = "" if picture.step else ", hidden frames grey"
        return svg(figure, f"Recorded and {what} time courses of three voxels{grey}")


def _legend(axes: Any, picture: Picture) -> None:
    from matplotlib.patches import Patch

    handles, labels = axes.get_legend_handles_labels()
    if not picture.step:
        handles.append(Patch(color=RULE, alpha=0.55))
        labels.append("hidden from the model")
    axes.legend(
        handles,
        labels,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=3,
        fontsize=8.5,
        borderaxespad=0.0,
    )


def _ranked(picture: Picture) -> list[tuple[str, tuple[int, int, int]]]:
    count = picture.hidden.sum(-1)
    error = np.where(picture.hidden, np.abs(picture.predicted - picture.truth), 0.0).sum(-1)
    where = np.argwhere(count > 0)
    mean = (error[count > 0] / count[count > 0]).argsort()
    done = "predicted" if picture.step else "filled in"
    places = {f"well {done}": 0.1, "typical": 0.5, f"badly {done}": 0.9}
    picked = {name: int(mean[round(q * (len(mean) - 1))]) for name, q in places.items()}
    found: list[tuple[str, tuple[int, int, int]]] = []
    for name, index in picked.items():
        x, y, z = where[index].tolist()
        if all(voxel != (x, y, z) for _, voxel in found):
            found.append((name, (x, y, z)))
    return found
