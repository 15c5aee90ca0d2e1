"""Commands about scaling laws: scaling fit (scaling sweep has a file of its own)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fmrizoo.cli.shell import Out, app, out, progress

if TYPE_CHECKING:
    from fmrizoo.analysis.scaling.law import Form
    from fmrizoo.analysis.scaling.outcome import Outcome, Target

scaling = typer.Typer(help="Scaling laws of the loss.", no_args_is_help=True)
app.add_typer(scaling, name="scaling")


@scaling.callback()
def _group() -> None:
    """Scaling laws of the loss."""


@scaling.command()
def fit(
    points: Annotated[
        Path, typer.Argument(help="CSV: n, d, loss, [unique], [seed], [noise], [flops].")
    ],
    *,
    folder: Out,
    target: Annotated[
        str | None,
        typer.Option(help="N,D to predict the loss at (one number: one axis).", show_default=False),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Relative s.d. of a loss over seeds, 0.002 for 0.2 %.", show_default="measured"
        ),
    ] = None,
    law: Annotated[
        str | None,
        typer.Option(help="nd, repeated, n or d.", show_default="by the columns that vary"),
    ] = None,
    unit: Annotated[str, typer.Option(help="What column d counts, for the table.")] = "samples",
    draws: Annotated[int, typer.Option(min=50, help="Bootstrap replicates.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
) -> None:
    """Fit a scaling law to losses of trained models → table, scaling.json, scaling.svg."""
    from fmrizoo.analysis.scaling.outcome import analyse
    from fmrizoo.analysis.scaling.points import read_points

    form = _form(law)
    found = read_points(points, form)
    with progress("bootstrap") as update:
        outcome = analyse(
            found,
            form,
            target=None if target is None else _target(target, form),
            noise=noise,
            unit=unit,
            draws=draws,
            seed=seed,
            progress=lambda done, total: update(done, total, ""),
        )
    show_law(outcome)
    save_law(outcome, folder)


def save_law(outcome: Outcome, folder: Path) -> None:
    """``scaling.json`` and ``scaling.svg``."""
    import json

    from fmrizoo.analysis.scaling.outcome import to_json
    from fmrizoo.files import write_atomic

    content = json.dumps(to_json(outcome), indent=2, allow_nan=False) + "\n"
    write_atomic(folder / "scaling.json", content.encode())
    write_atomic(folder / "scaling.svg", _svg(outcome))
    out.print(
        f"wrote {folder / 'scaling.json'} and {folder / 'scaling.svg'}",
        soft_wrap=True,
        highlight=False,
    )


def _form(law: str | None) -> Form | None:
    from fmrizoo.analysis.scaling.law import FORMS
    from fmrizoo.errors import RecipeError

    for form in FORMS:
        if law == form:
            return form
    if law is not None:
        raise RecipeError(f"--law takes {', '.join(FORMS)}, got {law!r}")
    return None


def _target(text: str, form: Form | None) -> Target:
    import math

    from fmrizoo.analysis.scaling.outcome import Target
    from fmrizoo.errors import RecipeError

    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    usable = len(numbers) in (1, 2) and all(math.isfinite(v) and v > 0 for v in numbers)
    if not usable or (len(numbers) == 1 and form not in ("n", "d")):
        raise RecipeError(
            f"--target takes two positive numbers N,D (or one with --law n or d), got {text!r}"
        )
    if len(numbers) == 2:
        return Target(numbers[0], numbers[1])
    return Target(numbers[0], None) if form == "n" else Target(None, numbers[0])


def _svg(outcome: Outcome) -> bytes:
    import io

    from fmrizoo.analysis.scaling.picture import Ink, describe, draw
    from fmrizoo.report import figures

    ink = Ink(figures.VERMILLION, figures.BLUE, figures.GREEN, figures.MUTED, figures.RULE)
    content = io.BytesIO()
    with figures.style():
        figure = draw(
            outcome.fit,
            outcome.intervals,
            outcome.parabolas,
            unit=outcome.unit,
            ink=ink,
            width=figures.WIDTH,
        )
        about = {"Date": None, "Creator": None, "Title": describe(outcome.fit)}
        figure.savefig(content, format="svg", metadata=about)
    return content.getvalue()


def show_law(outcome: Outcome) -> None:
    """Estimates with intervals, reach, prediction and what was assumed."""
    from fmrizoo.analysis.scaling.law import FORMULAS
    from fmrizoo.analysis.scaling.outcome import extrapolation_lines

    fitted, found = outcome.fit, outcome.intervals
    out.print(FORMULAS[fitted.form], soft_wrap=True, highlight=False)
    table = Table("", "estimate", f"{100 * found.level:.0f} % interval")
    for name, value in fitted.law.constants().items():
        edges = found.of[name]
        table.add_row(name, f"{value:.4g}", f"{edges.low:.4g} to {edges.high:.4g}")
    out.print(table)
    lines = extrapolation_lines(outcome)
    if outcome.left_out is not None:
        left = outcome.left_out
        lines.append(f"exponent with one setting left out: {left.low:.4g} to {left.high:.4g}")
    lines.append(f"search: {fitted.says()}; residual s.d. {100 * fitted.residual_sd:.3g} %")
    lines.append(f"intervals: parametric bootstrap, {found.draws} draws")
    for line in [*lines, *(f"assumed: {a}" for a in outcome.assumed)]:
        out.print(line.replace("assumed: WARNING", "WARNING"), soft_wrap=True, highlight=False)
