"""One axis for each task: the unified error of pretrained, from scratch and the best baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmrizoo.evaluate.statistics import unified_error
from fmrizoo.evaluate.summary import Row
from fmrizoo.report import figures
from fmrizoo.report.collect import Evidence
from fmrizoo.report.figures import Image
from fmrizoo.report.words import TaskReport, best, tables_of

MIN_TASKS = 3


def radar(tasks: Sequence[TaskReport], evidence: Evidence) -> Image | None:
    """Unified error of each task's best row of a kind; None for fewer than three tasks.

    A kind is shown where it has a row on every task of the figure; tasks on which no kind has a
    unified error are left out.
    """
    found = {
        task.task.target: {
            name: error
            for name, row in _kinds(task).items()
            if row is not None and (error := _error(row, evidence)) is not None
        }
        for task in tasks
    }
    found = {target: errors for target, errors in found.items() if errors}
    if len(found) < MIN_TASKS:
        return None
    kinds = dict.fromkeys(name for errors in found.values() for name in errors)
    lines = {
        name: [errors[name] for errors in found.values()]
        for name in kinds
        if all(name in errors for errors in found.values())
    }
    return _draw(list(found), lines) if lines else None


def _kinds(task: TaskReport) -> dict[str, Row | None]:
    return {
        "pretrained": best([r for r in task.models if r.init == "pretrained"]),
        "from scratch": best(
            [r for r in task.models if r.init == "random" and r.train_encoder == "all"]
        ),
        "best baseline": best(task.baselines),
    }


def _error(row: Row, evidence: Evidence) -> float | None:
    """Mean over folds and seeds, by units, of those that have one."""
    known = []
    for table in tables_of(row, evidence):
        target, scores = [p.target for p in table], np.array([p.scores for p in table])
        value = unified_error(row.task.kind, target, scores)
        if value is not None:
            known.append((value, len(table)))
    if not known:
        return None
    return float(np.average([v for v, _ in known], weights=[n for _, n in known]))


def _draw(targets: Sequence[str], lines: dict[str, list[float]]) -> Image:
    from matplotlib.figure import Figure

    angles = np.linspace(0, 2 * np.pi, len(targets), endpoint=False)
    looks = dict(
        zip(lines, ((figures.BLUE, "-", "o"), (figures.ORANGE, "--", "s"),
                    (figures.VERMILLION, ":", "D")), strict=False)
    )  # fmt: skip
    with figures.style():
        figure = Figure(figsize=(figures.WIDTH, 4.2), layout="constrained")
        axes = figure.add_subplot(projection="polar")
        axes.set_theta_offset(np.pi / 2)  # type: ignore[attr-defined]
        axes.set_theta_direction(-1)  # type: ignore[attr-defined]
        for name, values in lines.items():
            color, dash, marker = looks[name]
            around = [*values, values[0]]
            axes.plot([*angles, angles[0]], around, color=color, ls=dash, marker=marker, ms=5,
                      lw=1.8, label=name)  # fmt: skip
            axes.fill(angles, values, color=color, alpha=0.06)
        axes.set_xticks(angles, targets)
        axes.tick_params(axis="x", pad=10)
        top = max(0.25, 1.1 * max(v for own in lines.values() for v in own))
        axes.set_yticks(np.arange(1, 5) * 0.25 * max(1, round(top)))
        axes.set_ylim(0, top)
        axes.grid(color=figures.RULE, lw=0.6)
        axes.spines["polar"].set_color(figures.RULE)
        figure.legend(loc="outside right upper", fontsize=9)
        said = "; ".join(
            f"{name}: " + ", ".join(f"{t} {v:.2f}" for t, v in zip(targets, own, strict=True))
            for name, own in lines.items()
        )
        return figures.svg(
            figure, f"Unified error of each task, nearer to the centre is better: {said}"
        )
