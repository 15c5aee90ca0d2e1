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
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.clip_features import LabelledClips, Maker, read_clips, task_spec
from fmrizoo.evaluate.linear import Fitted, fit
from fmrizoo.evaluate.predictions import Prediction, aggregate, evaluate, write_predictions
from fmrizoo.evaluate.results import Parameters, Result, TaskInfo, write_result
from fmrizoo.types import TaskSpec

log = logging.getLogger(__name__)

PREDICTIONS = "predictions.tsv"
TITLES = {
    "voxels": "Voxels",
    "components": "PCA whitening",
    "parcels": "ROI means",
    "connectivity": "Connectivity",
}
MODELS = {"classification": "logistic", "regression": "ridge"}
NOTES = {
    "voxels": "mean of each brain voxel over the clip",
    "components": "label-free principal components of all training frames, scaled to unit variance",
    "parcels": "means of cubic parcels of the brain, cut without looking at the data",
    "connectivity": "correlations between parcels",
}


@dataclass(frozen=True)
class BaselineResult:
    """One baseline on one fold: its result, and its test predictions (none for chance)."""

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
    """All baselines on one split, in the schema of fine-tuning results.

    - *Chance*: the better of the majority class and a draw from the training frequencies.
    - *Voxels*: every brain voxel's mean over the clip.
    - *PCA whitening*: the same, rotated and scaled by principal components of all frames of the
      training runs (at most 120, no labels).
    - *ROI means*: means of cubic parcels of the brain (at most 100, no labels).
    - *Connectivity*: Fisher z of the parcels' correlations, within the clip for events, over the
      whole run for a subject's traits.

    Each feeds a logistic regression (ridge for regression); see :func:`fmrizoo.evaluate.linear.fit`
    for the strength of its penalty. For events, voxels are z-scored over their run first, whatever
    ``data.normalization`` says: it is the usual form for decoding and needs no label. For traits a
    voxel's mean over the run is the signal, so ``data.normalization`` is kept.

    Raises:
        DataError: no training or test clip, or a class that the training runs lack.
    """
    started = time.perf_counter()
    if task.source == "events":
        data = replace(data, normalization="voxel")
    clips = read_clips(store, split.train, data, task)
    spec = task_spec(task.kind, [c.label for c in clips])
    maker = Maker.fit(store, split.train, data, task, seed=seed)
    train, validation = maker.make(clips, spec), None
    if split.validation:
        validation = maker.make(read_clips(store, split.validation, data, task), spec)
    models = {}
    for name in train.features:
        held_out = validation.part(name) if validation else None
        # Whitening already set the scale of the components; scaling again would undo it.
        models[name] = fit(
            task.kind, train.part(name), held_out, standardize=name != "components", seed=seed
        )
        log.info("baseline %s: C = %g", name, models[name].c)
    test = maker.make(read_clips(store, split.test, data, task), spec)
    info = TaskInfo(task.target, task.kind, spec.classes, task.level)
    seconds = time.perf_counter() - started
    writer = _Writer(info, split, seed, _chance(spec, train, test), seconds)
    found = [writer.chance(len(test.unit_targets()))]
    found += [writer.fitted(name, m, validation, test) for name, m in models.items()]
    return found + [writer.absent(name, why) for name, why in maker.absent.items()]


def write_baselines(folder: Path, found: Sequence[BaselineResult]) -> list[Path]:
    """``folder/<slug>/results.json`` and ``predictions.tsv`` per baseline; their folders."""
    paths = []
    for baseline in found:
        path, task = folder / baseline.slug, baseline.result.task
        if baseline.predictions:
            spec = TaskSpec(task.kind, task.classes)
            write_predictions(path / PREDICTIONS, baseline.predictions, spec)
        write_result(path, baseline.result)
        paths.append(path)
    return paths


def predict(model: Fitted, name: str, clips: LabelledClips) -> list[Prediction]:
    """Unit-level predictions from the feature called ``name``."""
    scores, rows = model.scores(clips.features[name]), clips.rows[name]
    each = [
        Prediction(c.unit, c.subject, c.run, float(clips.targets[i]), tuple(s.tolist()))
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
        size = Parameters(model.weights.size + model.bias.size, 0)
        return BaselineResult(replace(result, parameters=size), tuple(rows))

    def absent(self, name: str, why: str) -> BaselineResult:
        gaps: metrics.Values = dict.fromkeys(metrics.names(self.task.kind))
        return BaselineResult(self._result(self.name(name), 0, gaps, f"not applicable: {why}"))
