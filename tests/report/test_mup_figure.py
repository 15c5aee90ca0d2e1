"""The coordinate picture: two rows, a column per check, red exactly where the check fails."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import to_hex

from fmrizoo.analysis.mup_check import CoordinateCheck, Point
from fmrizoo.report.figures import BLUE
from fmrizoo.report.mup_figure import RED, _draw, coordinate_figure, save_coordinate_figure

WIDTHS = (8, 16, 32)


def made_up(name: str, powers: dict[str, tuple[float, float]]) -> CoordinateCheck:
    """Modules whose activation and change grow with these powers of the width."""
    points = tuple(
        Point(module, width, step, 2 * width**a, 0.5 * step * width**c)
        for module, (a, c) in powers.items()
        for width in WIDTHS
        for step in (0, 1)
    )
    return CoordinateCheck(name, WIDTHS, 1, 1, points, {})


CHECKS = [
    made_up("sp", {"one": (0.0, 0.9), "two": (-0.5, 0.0), "three": (0.1, 0.1)}),
    made_up("mup", {"one": (0.0, 0.1), "two": (0.1, 0.0)}),
]


def test_lines_are_red_where_their_slope_is_out_of_tolerance() -> None:
    panels = _draw(CHECKS).axes
    assert len(panels) == 4
    counts = []
    for axes in panels:
        lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
        colors = [to_hex(line.get_color()).upper() for line in lines]
        counts.append((colors.count(BLUE), colors.count(RED)))
    assert counts == [(2, 1), (2, 0), (2, 1), (2, 0)]
    texts = [axes.texts[0].get_text() for axes in panels]
    assert texts[0] == "2 of 3 modules within tolerance\ntwo: slope −0.50"
    assert texts[2] == "2 of 3 modules within tolerance\none: slope +0.90"
    assert texts[3].startswith("2 of 2 modules")


def test_it_is_written_as_a_file_and_for_a_page(tmp_path: Path) -> None:
    path = tmp_path / "new" / "check.png"
    save_coordinate_figure(path, CHECKS)
    assert path.read_bytes().startswith(b"\x89PNG")
    image = coordinate_figure(CHECKS)
    assert image.uri.startswith("data:image/svg+xml")
    assert "sp: 1 of 3 modules within ±0.2, worst one +0.90" in image.alt


def test_a_module_that_is_never_finite_is_counted_and_not_drawn() -> None:
    broken = made_up("x", {"one": (0.0, 0.0)})
    points = (
        *broken.points,
        *(Point("bad", w, s, float("nan"), 0) for w in WIDTHS for s in (0, 1)),
    )
    figure = _draw([CoordinateCheck("x", WIDTHS, 1, 1, points, {})])
    assert figure.axes[0].texts[0].get_text() == (
        "1 of 2 modules within tolerance\nbad: slope +inf"
    )
