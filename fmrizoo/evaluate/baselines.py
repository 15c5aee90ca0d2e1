"""What a model has to beat: chance, and linear models on label-free features of the same clips.

Order of events in :func:`run_baselines`: features and models are finished from the training and
validation runs, then the test runs are read, once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.splits import Split
from fmrizoo.data.store import Store
from fmrizoo.data.targets import check_labels, fit_tasks
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.clip_features import LabelledClips, Maker, read_clips
from fmrizoo.evaluate.linear import Fitted, fit
from fmrizoo.evaluate.predictions import Prediction, aggregate, evaluate, write_predictions
from fmrizoo.evaluate.results import Parameters, Result, TaskInfo, write_result
from fmrizoo.evaluate.rows import PREDICTIONS, target_folders
from fmrizoo.types import TaskSpec

log = logging.getLogger(__name__)

TITLES = {
    "voxels": "Voxels",
    "components": "PCA whitening",
    "parcels": "ROI means",
    "connectivity": "Connectivity",
}
MODELS = {"classification": "logistic", "regression": "ridge", "ordinal": "ridge"}
NOTES = {
    "voxels": "mean of each brain voxel over the clip",
    "components": "label-free principal components of all training frames, scaled to unit variance",
    "parcels": "means of cubic parcels of the brain, cut without looking at the data",
    "connectivity": "correlations between parcels",
}


@dataclass(frozen=True)
class BaselineResult:
    """One baseline on one fold and target: its result, its test predictions (none for chance)."""

    result: Result
    predictions: tuple[Prediction, ...] = ()

    @property
    def slug(self) -> str:
        """The name as a folder name."""
        words = "".join(c if c.isalnum() else " " for c in self.result.name).split()
        return "-".join(words).lower()


def run_baselines(
    store: Store, split: Split, data: DataConfig, task: TaskConfig, *, seed: int = 0
) -> list[BaselineResult]:
    """All baselines on one split, target by target, in the schema of fine-tuning results.

    - *Chance*: the better of the majority class and a draw from the training frequencies.
    - *Voxels*: every brain voxel's mean over the clip.
    - *PCA whitening*: the same, rotated and scaled by principal components of all frames of the
      training runs (at most 120, no labels).
    - *ROI means*: means of cubic parcels of the brain (at most 100, no labels).
    - *Connectivity*: Fisher z of the parcels' correlations, within the clip for events, over the
      whole run for a subject's traits.

    Each feeds a logistic regression (ridge for values and levels); see
    :func:`fmrizoo.evaluate.linear.fit`, also for the strength of its penalty. Several targets are
    fitted one by one, each on the units that have it; ``task.class_weights`` and
    ``task.label_smoothing`` are a head's and change no baseline.

    For events, voxels are z-scored over their run first, whatever ``data.normalization`` says: it
    is the usual form for decoding and needs no label. For traits a voxel's mean over the run is
    the signal, so ``data.normalization`` is kept.

    Raises:
        DataError: no training or test clip, or a class that the training runs lack.
    """
    started = time.perf_counter()
    if task.source == "events":
        data = replace(data, normalization="voxel")
    # Labels alone: voxels of test runs are read when every model is finished.
    parts = {
        part: read_clips(store, runs, data, task) for part, runs in split.parts().items() if runs
    }
    tasks = fit_tasks(parts["train"], task)
    for part in parts.keys() - {"train"}:
        check_labels(parts[part], tasks, part)
    maker = Maker.fit(store, split.train, data, task, seed=seed)
    train = maker.make(parts["train"], tasks)
    validation = maker.make(parts["validation"], tasks) if "validation" in parts else None
    models = [_fit(spec, k, train, validation, seed) for k, spec in enumerate(tasks)]
    test = maker.make(parts["test"], tasks)
    seconds = time.perf_counter() - started
    found: list[BaselineResult] = []
    for k, spec in enumerate(tasks):
        own, held_out = test.target(k), validation.target(k) if validation else None
        info = TaskInfo(spec.name, spec.kind, spec.classes, task.level)
        writer = _Writer(info, split, seed, _chance(spec, train.target(k), own), seconds)
        found.append(writer.chance(len(own.unit_targets())))
        found += [writer.fitted(name, m, held_out, own) for name, m in models[k].items()]
        found += [writer.absent(name, why) for name, why in maker.absent.items()]
    return found


def _fit(
    spec: TaskSpec, k: int, train: LabelledClips, validation: LabelledClips | None, seed: int
) -> dict[str, Fitted]:
    """A model of the ``k``-th target by feature."""
    own, held_out, models = train.target(k), validation.target(k) if validation else None, {}
    for name in own.features:
        models[name] = fit(
            spec.kind,
            own.part(name),
            held_out.part(name) if held_out else None,
            # Whitening already set the scale of the components; scaling again would undo it.
            standardize=name != "components",
            levels=len(spec.classes) if spec.kind == "ordinal" else 0,
            seed=seed,
        )
        log.info("baseline %s of %s: C = %g", name, spec.name, models[name].c)
    return models


def write_baselines(folder: Path, found: Sequence[BaselineResult]) -> list[Path]:
    """``results.json`` and ``predictions.tsv`` per baseline; their folders.

    In ``folder/<slug>``, with several targets in ``folder/<target>/<slug>``.
    """
    targets = list(dict.fromkeys(baseline.result.task.target for baseline in found))
    tops, paths = target_folders(folder, targets, below=""), []
    for baseline in found:
        task = baseline.result.task
        path = tops[task.target] / baseline.slug
        if baseline.predictions:
            spec = TaskSpec(task.kind, task.classes, name=task.target)
            write_predictions(path / PREDICTIONS, baseline.predictions, spec)
        write_result(path, baseline.result)
        paths.append(path)
    return paths


def predict(model: Fitted, name: str, clips: LabelledClips) -> list[Prediction]:
    """Unit-level predictions from the feature called ``name``."""
    scores, rows = model.scores(clips.features[name]), clips.rows[name]
    each = [
        Prediction(c.unit, c.subject, c.run, float(clips.targets[i, 0]), tuple(s.tolist()))
        for i, s in zip(rows, scores, strict=True)
        for c in [clips.clips[i]]
    ]
    return aggregate(each)


def _chance(spec: TaskSpec, train: LabelledClips, test: LabelledClips) -> metrics.Metrics:
    targets = train.unit_targets(), test.unit_targets()
    return metrics.chance(spec.kind, *targets, classes=len(spec.classes))


@dataclass(frozen=True)
class _Writer:
    """Puts what all baselines of one call share into each result."""

    task: TaskInfo
    split: Split
    seed: int
    guess: metrics.Metrics
    seconds: float

    def _result(self, name: str, n: int, values: metrics.Values, note: str) -> Result:
        return Result(
            kind="baseline",
            name=name,
            fold=self.split.config.fold,
            seed=self.seed,
            task=self.task,
            n_test=n,
            chance=self.guess[metrics.PRIMARY[self.task.kind]],
            metrics=values,
            seconds=self.seconds,
            split_sha=self.split.sha,
            note=note,
        )

    def chance(self, n: int) -> BaselineResult:
        note = "the better of the most frequent training class and a draw from their frequencies"
        if self.task.kind == "regression":
            note = "always the mean of the training units"
        elif self.task.kind == "ordinal":
            note = "guessing from the training levels; the error is that of always their median"
        return BaselineResult(self._result("Chance", n, self.guess.values, note))

    def name(self, feature: str) -> str:
        return f"{TITLES[feature]} + {MODELS[self.task.kind]}"

    def fitted(
        self, name: str, model: Fitted, validation: LabelledClips | None, test: LabelledClips
    ) -> BaselineResult:
        rows = predict(model, name, test)
        scored = evaluate(rows, self.task.kind)
        result = self._result(self.name(name), scored.n, scored.values, NOTES[name])
        if validation:
            held_out = evaluate(predict(model, name, validation), self.task.kind)
            result = replace(result, validation=held_out.values)
        outputs = 1 if self.task.kind == "ordinal" else model.bias.size
        size = Parameters((len(model.weights) + 1) * outputs, 0)
        return BaselineResult(replace(result, parameters=size), tuple(rows))

    def absent(self, name: str, why: str) -> BaselineResult:
        gaps: metrics.Values = dict.fromkeys(metrics.names(self.task.kind))
        return BaselineResult(self._result(self.name(name), 0, gaps, f"not applicable: {why}"))
