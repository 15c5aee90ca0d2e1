"""The command line. Flags say where and how, dotted ``key=value`` arguments say what."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console, Group
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fmrizoo import __version__
from fmrizoo.errors import FmrizooError

if TYPE_CHECKING:
    from fmrizoo.config import Recipe
    from fmrizoo.evaluate.results import Result
    from fmrizoo.trainer.inputs import StepEvent

# Read when torch is first imported: threads that wait for work sleep. Spinning, they slow work on
# two threads down many times as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

INTERRUPTED = 75  # EX_TEMPFAIL: run the same command again to go on

app = typer.Typer(
    help="Foundation models for functional MRI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Markup and emoji codes off: paths, run names and reasons are printed as they are.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe values: dotted key=value.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]
RecipeName = Annotated[str, typer.Argument(help="Shipped recipe name or YAML file.")]
RecipeNames = Annotated[
    str, typer.Argument(help="Recipe name or YAML file; or a pattern: every shipped recipe of it.")
]
EveryFold = Annotated[
    bool, typer.Option("--every-fold", help="One run per fold of the split, below --out.")
]
Seeds = Annotated[int, typer.Option(min=1, help="Runs with as many consecutive seeds.")]


def main() -> None:
    """Entry point: errors made for users are one message and exit code 1."""
    try:
        app()
    except FmrizooError as error:
        err.print("error:", style="bold red", end=" ")
        err.print(str(error), highlight=False, soft_wrap=True)
        _end(1)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        _end(end.code)


def _end(code: int) -> NoReturn:
    device = sys.modules.get("fmrizoo.trainer.device")
    if device is not None:
        device.end_rank(code)
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"fmrizoo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
) -> None:
    handler = RichHandler(console=err, show_path=False, show_time=False, markup=False)
    logging.basicConfig(level="WARNING", format="%(message)s", handlers=[handler])
    logging.getLogger("fmrizoo").setLevel("WARNING" if quiet else "INFO")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar that ``update(done, total, note)`` drives; nothing where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None, note="")

        def update(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="BIDS or fMRIPrep folder, TSV of files, or sample:haxby2001.")
    ],
    store: Annotated[Path, typer.Argument(help="Folder of the store to write or add to.")],
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose prepare section is used.", show_default=False)
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Publish the good runs even if others are unusable.")
    ] = False,
) -> None:
    """NIfTI runs → one checksummed HDF5 file per subject."""
    from fmrizoo.data.prepare import ProgressEvent
    from fmrizoo.data.prepare import prepare as run
    from fmrizoo.zoo import load_recipe

    # Without a recipe the overrides alone make one: prepare.codec=gzip, …
    composed = load_recipe(recipe if recipe else {}, overrides or [])
    with _progress("prepare") as update:

        def note(event: ProgressEvent) -> None:
            update(event.done, event.total, f"{event.run} {event.state}")

        report = run(source, store, composed.prepare, skip_bad=skip_bad, on_progress=note)
    out.print(
        f"{store}: {len(report.prepared)} runs prepared, {len(report.kept)} kept, "
        f"{len(report.skipped)} skipped",
        soft_wrap=True,
    )
    if report.skipped:
        table = Table("run", "file", "reason", title="skipped")
        for row in report.skipped:
            table.add_row(row.run, row.file, row.reason)
        out.print(table)


@dataclass(frozen=True)
class _Job:
    """One run of a command that was asked for several folds or seeds."""

    recipe: Recipe
    folder: Path
    label: str


def _jobs(
    recipe: str, overrides: list[str] | None, folder: Path, every_fold: bool, seeds: int
) -> list[_Job]:
    """One run, or one for each recipe, seed and fold, in folders of their own below ``folder``."""
    from fmrizoo.errors import RecipeError
    from fmrizoo.zoo import list_recipes, load_recipe

    given = overrides or []
    if set("*?[") & set(recipe):
        names = list_recipes(recipe)
        if not names:
            raise RecipeError(f"no shipped recipe matches {recipe!r}: see `fmrizoo list recipes`")
        below = [(name, folder / name.rsplit("/", 1)[-1]) for name in names]
        return [
            replace(job, label=f"{name} {job.label}".strip())
            for name, place in below
            for job in _jobs(name, overrides, place, every_fold, seeds)
        ]
    first = load_recipe(recipe, given)
    jobs = []
    for seed in range(first.train.seed, first.train.seed + seeds):
        for fold in range(first.split.folds) if every_fold else [first.split.fold]:
            parts = [f"seed-{seed}"] * (seeds > 1) + [f"fold-{fold}"] * every_fold
            composed = load_recipe(recipe, [*given, f"split.fold={fold}", f"train.seed={seed}"])
            jobs.append(_Job(composed, folder.joinpath(*parts), " ".join(parts)))
    return jobs


def _told_once(jobs: list[_Job]) -> Iterator[_Job]:
    """The jobs one by one; what the first says about itself holds for the others."""
    for number, job in enumerate(jobs):
        if number == 1:
            logging.getLogger("fmrizoo").setLevel("WARNING")
        yield job


@app.command()
def pretrain(
    recipe: RecipeNames,
    overrides: Overrides = None,
    *,
    folder: Out,
    every_fold: EveryFold = False,
    seeds: Seeds = 1,
) -> None:
    """Train a backbone with an objective; the same command resumes."""
    from fmrizoo.pipeline import pretrain as run

    for job in _told_once(_jobs(recipe, overrides, folder, every_fold, seeds)):
        with _progress(f"pretrain {job.label}") as update:
            result = run(job.recipe, job.folder, on_step=_step_note(update))
        _stop_if_interrupted(result.interrupted, job.folder)
        shown = {"loss": result.metrics.get("loss"), "validation": result.validation}
        text = ", ".join(f"{k} {_short(v)}" for k, v in shown.items() if v)
        note = " (was finished before)" if result.already_finished else ""
        if _is_main():
            out.print(f"{job.folder}: step {result.step}, {text}{note}", soft_wrap=True)


def _step_note(update: Callable[[int, int, str], None]) -> Callable[[StepEvent], None]:
    def on_step(event: StepEvent) -> None:
        note = f"loss {event.loss:.4f} · {event.clips_per_second:.0f} clips/s"
        update(event.step, event.steps, note)

    return on_step


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k} {_short(v)}" for k, v in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _stop_if_interrupted(interrupted: bool, target: Path) -> None:
    if interrupted:
        err.print(
            f"interrupted: a checkpoint is in {target}; run the same command to go on",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED)


@app.command()
def finetune(
    recipe: RecipeNames,
    overrides: Overrides = None,
    *,
    folder: Out,
    every_fold: EveryFold = False,
    seeds: Seeds = 1,
    name: Annotated[
        str | None, typer.Option(help="Row name in tables.", show_default=False)
    ] = None,
) -> None:
    """Train a head on a pretrained (or random) encoder, then test once."""
    from fmrizoo.pipeline import finetune as run

    results = []
    for job in _told_once(_jobs(recipe, overrides, folder, every_fold, seeds)):
        with _progress(f"finetune {job.label}") as update:
            result = run(job.recipe, job.folder, name=name, on_step=_step_note(update))
        if result is None:
            _stop_if_interrupted(_is_main(), job.folder)
        else:
            results.append(result)
    _show(results)


def _is_main() -> bool:
    from fmrizoo.trainer.device import discover

    return discover().main


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Fine-tuned run folders.")],
    name: Annotated[
        str | None, typer.Option(help="Row name in tables.", show_default=False)
    ] = None,
) -> None:
    """Score fine-tuned runs on the test part of their split (again)."""
    from fmrizoo.evaluate.results import FILE, read_result
    from fmrizoo.pipeline import evaluate as run

    rows = []
    for folder in runs:
        file = folder / FILE
        rows.append(run(folder, name=name or (read_result(file).name if file.is_file() else None)))
    _show(rows)


@app.command()
def baselines(
    recipe: RecipeName, overrides: Overrides = None, *, folder: Out, every_fold: EveryFold = False
) -> None:
    """Chance, voxels, PCA whitening, ROI means and connectivity on a recipe's task and split."""
    from fmrizoo.pipeline import baselines as run

    results = []
    with _progress("baselines") as update:
        jobs = _jobs(recipe, overrides, folder, every_fold, seeds=1)
        for number, job in enumerate(jobs, start=1):
            results += [found.result for found in run(job.recipe, job.folder)]
            update(number, len(jobs), "")
    _show(results)


def _show(results: list[Result]) -> None:
    """Mean ± s.d. over folds and seeds, one line a row name."""
    from fmrizoo.evaluate.metrics import PRIMARY
    from fmrizoo.evaluate.summary import rows

    if not results:
        return
    table = Table("", "metric", "mean ± s.d.", "seeds × folds", "test units", "chance")
    for row in rows(results):
        metric = PRIMARY[row.task.kind]
        if row.primary is None:
            table.add_row(row.name, metric, "not applicable", "", "", "")
            continue
        deviation = "" if row.primary.std is None else f" ± {row.primary.std:.3f}"
        table.add_row(
            row.name,
            metric,
            f"{row.primary.mean:.3f}{deviation}",
            f"{row.n_seeds} × {row.n_folds}",
            str(row.n_units),
            "" if row.chance is None else f"{row.chance:.3f}",
        )
    out.print(table)


@app.command()
def forecast(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder of a pretraining that forecasts.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Data settings: data.store=…, …", show_default=False),
    ] = None,
    *,
    frames: Annotated[int, typer.Option(help="How far to go.", show_default=False)],
    file: Annotated[
        Path, typer.Option("--out", "-o", help="NIfTI file to write.", show_default=False)
    ],
    run: Annotated[
        str | None,
        typer.Option(help="Run of the store to go on from.", show_default="the first held out"),
    ] = None,
    start: Annotated[int, typer.Option(help="First frame of the clip to go on from.")] = 0,
) -> None:
    """Roll a model forward after a clip → NIfTI in the unit of the data."""
    from fmrizoo.forecast import write_forecast

    done = write_forecast(
        run_folder, file, frames=frames, run=run, start=start, overrides=overrides or []
    )
    said = f"{done.path}: {done.frames} frames ({done.frames * done.seconds:g} s) of {done.run}"
    said += f" from frame {done.first}"
    if done.error is not None and done.persistence is not None:
        said += (
            f"; mean absolute error over the {done.recorded} that were recorded "
            f"{done.error:.4g}, of repeating the frame before them {done.persistence:.4g}"
        )
    out.print(said, soft_wrap=True, highlight=False)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, searched recursively.")],
    *,
    page: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "fmrizoo report",
) -> None:
    """One self-contained HTML page: curves, reconstructions, results with their baselines."""
    from fmrizoo.report.html import write_report

    summary = write_report(folders, page, title=title)
    out.print(f"report: {page.resolve()}", soft_wrap=True)
    for line in summary.lines:
        out.print(f"  {line}", soft_wrap=True, highlight=False)


analyze = typer.Typer(help="What models do to data and what they cost.", no_args_is_help=True)
app.add_typer(analyze, name="analyze")


@analyze.command()
def autocorrelation(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    clips: Annotated[
        int, typer.Option(min=1, help="At most so many clips of the held-out runs.")
    ] = 32,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest stretch for models that take any length.",
            show_default="the shortest run",
        ),
    ] = None,
) -> None:
    """Autocorrelation over time of data and embeddings → analysis.json in each run folder."""
    from fmrizoo.analysis.dynamics import analyze_run

    for run in runs:
        found = analyze_run(run, clips=clips, frames=frames)
        out.print(f"{run}: {found.says}", soft_wrap=True, highlight=False)


@analyze.command()
def memory(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipes (names or files), and key=value for all of them.")
    ],
    folder: Out,
    frames: Annotated[str, typer.Option(help="Lengths of the clip.")] = "20,40,80",
    checkpointing: Annotated[
        str, typer.Option(help="none, block, window-chunk.")
    ] = "none,window-chunk",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Peak activation memory of one training step against the clip's length → memory.json."""
    from fmrizoo import screens
    from fmrizoo.analysis.memory import MemoryRow, measure_memory, write_memory

    names = [r for r in recipes if "=" not in r]
    given = [r for r in recipes if "=" in r]
    modes = [word.strip() for word in checkpointing.split(",")]
    with _progress("memory") as update:

        def note(done: int, total: int, row: MemoryRow) -> None:
            update(done, total, f"{row.backbone} {row.checkpointing} {row.frames} frames")

        rows = measure_memory(names, _numbers(frames), modes, given, device=device, on_row=note)
    write_memory(folder, rows)
    out.print(screens.memory(rows))


def _numbers(text: str) -> list[int]:
    from fmrizoo.errors import RecipeError

    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise RecipeError(f"--frames takes positive numbers with commas between, got {text!r}")
    return found


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Store, run folder, model folder or split file.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare every checksum.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a store, run folder, checkpoint or model holds."""
    from fmrizoo.inspection import describe

    found = describe(path, verify=verify)
    if as_json:
        out.print_json(json.dumps(found))
        return
    out.print(_outline(found))
    if found.get("faults"):
        raise typer.Exit(1)


def _outline(values: dict[str, Any]) -> Table:
    """Keys beside their values; nested mappings as tables of their own, lists on one line."""
    table = Table.grid(padding=(0, 2))
    for key, value in values.items():
        shown: Any = Text(_plain(value))
        if isinstance(value, dict) and value:
            shown = _outline(value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            shown = Group(*(Text(_plain(item)) for item in value))
        table.add_row(Text(key.replace("_", " "), style="bold"), shown)
    return table


def _plain(value: Any) -> str:
    """A value as a person would write it; long lists are cut short and counted."""
    if value is None or value in ([], {}):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        rest = f" … {len(value)} in all" if len(value) > 8 else ""
        return ", ".join(_plain(v) for v in value[:8]) + rest
    return str(value)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="backbones, objectives, heads or recipes.")],
    pattern: Annotated[str, typer.Argument(help="Shell pattern.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="heads: what each trains of this backbone (or of a recipe's).", show_default=False
        ),
    ] = None,
) -> None:
    """What is in the zoo; for backbones also their sizes and what a clip costs."""
    from fmrizoo import screens, zoo
    from fmrizoo.errors import RecipeError
    from fmrizoo.registry import BACKBONES, HEADS, OBJECTIVES, suggest

    if backbone is not None:
        if kind != "heads":
            raise RecipeError(f"--backbone goes with `list heads`, not `list {kind}`")
        _list_heads(backbone, pattern, as_json)
        return

    tables = {"backbones": BACKBONES, "objectives": OBJECTIVES, "heads": HEADS}
    if kind == "recipes":
        names = zoo.list_recipes(pattern)
        rows: list[dict[str, Any]] = [{"name": n, "about": zoo.recipe_summary(n)} for n in names]
    elif kind in tables:
        entries = [tables[kind][name] for name in tables[kind].list(pattern)]
        rows = [{"name": e.name, "about": e.summary} for e in entries]
    else:
        raise RecipeError(f"unknown kind {kind!r}.{suggest(kind, [*tables, 'recipes'])}")
    if kind == "backbones":
        rows = [row | {"sizes": _sizes(row["name"])} for row in rows]
    if as_json:
        out.print_json(json.dumps(rows))
    elif kind == "backbones":
        out.print(screens.backbones(rows))
    else:
        table = Table("name", "")
        for row in rows:
            table.add_row(row["name"], row["about"])
        out.print(table)


def _list_heads(backbone: str, pattern: str, as_json: bool) -> None:
    from dataclasses import asdict

    from fmrizoo import screens
    from fmrizoo.analysis.heads import backbone_section, heads_of

    title, section = backbone_section(backbone)
    rows = heads_of(section, pattern)
    if as_json:
        out.print_json(json.dumps([asdict(row) for row in rows]))
    else:
        out.print(screens.heads(title, rows))


def _sizes(backbone: str) -> list[dict[str, Any]] | None:
    """Its default and preset sizes; None where a package is missing to build it."""
    from dataclasses import asdict

    from fmrizoo.analysis.sizes import sizes_of
    from fmrizoo.errors import MissingExtraError

    try:
        return [asdict(size) for size in sizes_of(backbone)]
    except MissingExtraError:
        return None


@app.command()
def recipe(
    name: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a recipe, fully resolved."""
    from fmrizoo.config import to_dict, to_yaml
    from fmrizoo.zoo import load_recipe

    composed = load_recipe(name, overrides or [])
    if as_json:
        out.print_json(json.dumps(to_dict(composed)))
    else:
        out.print(to_yaml(composed), highlight=False, soft_wrap=True)
