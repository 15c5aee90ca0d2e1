"""Sections of the page that only list what is there: curves, data, methods, versions, gaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fmrizoo.report import figures
from fmrizoo.report.collect import Evidence, Run
from fmrizoo.report.families import families
from fmrizoo.report.figures import Curve, Image
from fmrizoo.report.words import TaskReport, classes_word, grouped


def curves(evidence: Evidence, *, pretraining: bool = True) -> list[tuple[str, Image]]:
    """Loss figures with their headings.

    Args:
        evidence: All runs.
        pretraining: Draw pretraining runs too; not if another section does.
    """
    found = []
    pre = [Curve(r.label, (_xy(r, _loss),)) for r in evidence.pretrainings if _xy(r, _loss)[0]]
    held = [
        Curve(r.label, (_xy(r, _held_out),), dashed=True)
        for r in evidence.pretrainings
        if _xy(r, _held_out)[0]
    ]
    if pre and pretraining:
        image = figures.losses([*pre, *held], "pretraining loss", "Pretraining loss by step")
        found.append(("Pretraining", image))
    tuned: dict[str, list[Run]] = {}
    for run in evidence.runs:
        if run.curve and not run.pretraining:
            tuned.setdefault(evidence.name(run), []).append(run)
    for part, pick in (("training", _loss), ("validation", _held_out)):
        lines = [
            Curve(name, tuple(xy for r in runs if (xy := _xy(r, pick))[0]))
            for name, runs in tuned.items()
        ]
        if lines := [c for c in lines if c.runs]:
            image = figures.losses(lines, f"{part} loss", f"Fine-tuning, {part} loss by step")
            found.append((f"Fine-tuning, {part} runs", image))
    return found


def _loss(line: dict[str, Any]) -> Any:
    return line.get("loss")


def _held_out(line: dict[str, Any]) -> Any:
    held = line.get("validation")
    return held.get("loss") if isinstance(held, dict) else None


def _xy(run: Run, pick: Callable[[dict[str, Any]], Any]) -> tuple[list[float], list[float]]:
    points = [(line.get("step"), pick(line)) for line in run.curve]
    known = [(float(s), float(v)) for s, v in points if s is not None and v is not None]
    return [s for s, _ in known], [v for _, v in known]


_CONTRACT = {
    "space": "space",
    "orientation": "orientation",
    "grid": "grid (voxels)",
    "voxel_size": "voxel size (mm)",
    "tr": "repetition time (s)",
    "normalization": "normalisation",
    "statistics": "statistics over",
    "background": "outside the brain",
}


def data(evidence: Evidence) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """Contracts, the runs under each, and how clips are cut."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in evidence.runs:
        if run.contract:
            rows = tuple((k, _plain(run.contract.get(n))) for n, k in _CONTRACT.items())
            groups.setdefault(rows, []).append(run)
    found = []
    for rows, runs in groups.items():
        seen = {name for r in runs for name in r.model.get("seen_runs") or ()}
        tested = {n for r in runs for p in r.predictions for n in p.run.split(";")}
        cuts = dict.fromkeys(
            f"{d.get('clip_frames')} frames, every {d.get('frame_stride')}"
            for r in runs
            if (d := r.recipe.get("data"))
        )
        extra = (
            ("clips", "; ".join(cuts) or "not recorded"),
            ("runs trained on (over all folds)", str(len(seen)) if seen else "not recorded"),
            ("runs tested on (over all folds)", str(len(tested)) if tested else "none"),
            (
                "subjects tested",
                str(len({p.subject for r in runs for p in r.predictions}) or "none"),
            ),
        )
        folders = len({r.owner or r.folder for r in runs})
        label = f"Preprocessing behind {folders} run folder{'s' if folders > 1 else ''}"
        found.append((label, (*rows, *extra)))
    return found


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " × ".join(_plain(v) for v in value)
    if isinstance(value, float):
        return f"{value:g}"
    return "not recorded" if value is None else str(value)


def methods(evidence: Evidence, tasks: Sequence[TaskReport]) -> list[str]:
    """Paragraphs for a methods section."""
    said = []
    for family in families(evidence.pretrainings):
        run = family.first
        times = f" ({len(family.runs)} times: {', '.join(family.parts)})" if family.runs[1:] else ""
        r, train = run.recipe, run.recipe.get("train") or {}
        size = run.model.get("parameters")
        said.append(
            f"Pretraining {family.label}{times}: backbone {_name(r.get('backbone'))}, objective "
            f"{_name(r.get('objective'))}"
            + (f", {grouped(size)} parameters" if size else "")
            + f"; {train.get('steps', '?')} steps of {train.get('batch_size', '?')} clips with "
            f"AdamW, peak learning rate {train.get('lr', '?')}, linear warm-up and cosine decay, "
            f"{train.get('precision', '?')}. It saw no labels."
        )
    for report in tasks:
        level = report.task.level
        said.append(
            f"Task {report.task.target!r} ({report.task.kind}"
            + (
                f", {len(report.task.classes)} {classes_word(report.task)}"
                if report.task.classes
                else ""
            )
            + f"): outputs of the clips of one {level} are averaged (logits for classes, "
            f"log-probabilities for levels), and "
            f"every {level} counts once. "
            "Metrics are computed per fold, weighted by test units within a seed, then averaged "
            "over seeds."
        )
    if any(t.baselines for t in tasks):
        said.append(
            "Baselines are linear (logistic regression or ridge) on label-free features of the "
            "same clips, or on what is known without them. Penalties were chosen by validation "
            "loss (C = 1 without validation units), or by split.inner; features, scaling and "
            "weights come from the training runs alone. Their test runs were read once, after "
            "every fit."
        )
        asked = {key for r in evidence.runs for key in _of_heads(r)}
        if asked:
            what = " and ".join(sorted(asked))
            said.append(f"The heads were trained with {what}; the baselines were not.")
    return said


def _of_heads(run: Run) -> list[str]:
    """Settings of a run's task that only heads follow."""
    task = run.recipe.get("task") if run.result and run.result.kind == "finetune" else None
    task = task if isinstance(task, dict) else {}
    weights = ["class weights"] if task.get("class_weights", "none") != "none" else []
    return weights + (["label smoothing"] if task.get("label_smoothing") else [])


def _name(section: Any) -> str:
    return str(section.get("name", "?")) if isinstance(section, dict) else "?"


def environment(evidence: Evidence) -> list[tuple[str, str]]:
    """One line per setting; runs made in different environments show all values."""
    merged: dict[str, dict[str, None]] = {}
    for run in evidence.runs:
        flat = dict(run.environment)
        flat.pop("argv", None)
        flat |= {f"{k} version": v for k, v in (flat.pop("versions", None) or {}).items()}
        for key, value in flat.items():
            merged.setdefault(str(key), {})[_plain_any(value)] = None
    return [(key, "; ".join(values)) for key, values in merged.items()]


def _plain_any(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    return _plain(value)


def missing(evidence: Evidence, tasks: Sequence[TaskReport], pictures: int) -> list[str]:
    """What a reader could expect and does not find, and every file that was left out."""
    said = list(evidence.problems)
    if not evidence.pretrainings:
        said.append(
            "No pretraining run was found (metrics.jsonl beside a recipe with an objective)."
        )
    elif not pictures:
        said.append("No pretraining run holds a reconstruction.npz, so there is no picture of one.")
    if not tasks:
        said.append("No results.json was found, so there is no results table.")
    for report in tasks:
        if not report.baselines:
            said.append(f"Task {report.task.target!r} has no baselines to compare with.")
        if not report.models:
            said.append(f"Task {report.task.target!r} has no fine-tuned model.")
    if not any(r.contract for r in evidence.runs):
        said.append("No model/config.json with a preprocessing contract was found.")
    if not any(r.environment for r in evidence.runs):
        said.append("No env.json was found, so versions and machine are unknown.")
    return said
