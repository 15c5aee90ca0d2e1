"""What a model has to beat: chance, and linear models on label-free features of the same clips.

Order of events in :func:`run_baselines`: features and models are finished from the training and
validation runs, then the test runs are read, once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.batch import ClipFacts
from fmrizoo.data.splits import Split, units_of
from fmrizoo.data.store import Store
from fmrizoo.data.targets import check_labels, fit_tasks
from fmrizoo.errors import DataError
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.clip_features import LabelledClips, Maker, first_of_runs, read_clips
from fmrizoo.evaluate.confounds import EVENTS, Confounds
from fmrizoo.evaluate.linear import Fitted, Inner, fit
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
    "tangent": "Tangent connectivity",
    "confounds": "Confounds only",
}
MODELS = {"classification": "logistic", "regression": "ridge", "ordinal": "ridge"}
NOTES = {
    "voxels": "mean of each brain voxel over the clip",
    "components": "label-free principal components of all training frames, scaled to unit variance",
    "parcels": "means of cubic parcels of the brain, cut without looking at the data",
    "connectivity": "correlations between parcels",
    "tangent": "shrunk covariances of parcels in the tangent space of their training mean",
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
    store: Store,
    split: Split,
    data: DataConfig,
    task: TaskConfig,
    *,
    seed: int = 0,
    inner: int = 0,
) -> list[BaselineResult]:
    """All baselines on one split, target by target, in the schema of fine-tuning results.

    - *Chance*: the better of the majority class and a draw from the training frequencies.
    - *Voxels*: every brain voxel's mean over the clip.
    - *PCA whitening*: the same, rotated and scaled by principal components of all frames of the
      training runs (at most 120, no labels).
    - *ROI means*: means of cubic parcels of the brain (at most 100, no labels).
    - *Connectivity*: Fisher z of the parcels' correlations, within the clip for events, over the
      whole run for a subject's traits.
    - *Tangent connectivity*: shrunk covariances of the same series in their tangent space
      (:class:`fmrizoo.evaluate.features.Tangent`), at the mean of the training runs.
    - *Confounds only*: age, sex, site and mean framewise displacement, as far as they are known
      (:mod:`fmrizoo.evaluate.confounds`); for traits only, and never the target itself.

    Each feeds a logistic regression (ridge for values and levels); see
    :func:`fmrizoo.evaluate.linear.fit`, also for the strength of its penalty. Several targets are
    fitted one by one, each on the units that have it; ``task.class_weights`` and
    ``task.label_smoothing`` are a head's and change no baseline.

    For events, voxels are z-scored over their run first, whatever ``data.normalization`` says: it
    is the usual form for decoding and needs no label. For traits a voxel's mean over the run is
    the signal, so ``data.normalization`` is kept.

    Args:
        store, split, data, task: As for a model.
        seed: Of the solvers and the inner folds.
        inner: 0: the validation part chooses the penalty. k: a k-fold over the split's units within
            training and validation does (``split.inner``).

    Raises:
        DataError: no training or test clip, a class that the training runs lack, or fewer units
            than inner folds.
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
    unit = units_of(store, [store[n].key for p in split.parts().values() for n in p], split.config)
    known = {unit(store[n].key) for n in (*split.train, *split.validation)}
    if inner > len(known):
        raise DataError(
            f"split.inner={inner} needs at least as many units, but training and validation have "
            f"{len(known)} {split.config.by}(s): lower split.inner"
        )
    maker = Maker.fit(store, split.train, data, task, seed=seed)
    train = maker.make(parts["train"], tasks, learn=True)
    validation = maker.make(parts["validation"], tasks) if "validation" in parts else None
    each = []
    for k, spec in enumerate(tasks):
        confounds: Confounds | str = EVENTS
        if task.source == "participants":
            runs = [c.run for c in train.target(k).clips]
            confounds = Confounds.fit(store, runs, spec.name)
        own = _with(train.target(k), confounds)
        held_out = _with(validation.target(k), confounds) if validation else None
        models = _fit(spec, own, held_out, seed, inner, lambda c: unit(store[c.run].key))
        each.append((spec, confounds, own, held_out, models))
    test = maker.make(parts["test"], tasks)
    seconds = time.perf_counter() - started
    found: list[BaselineResult] = []
    for k, (spec, confounds, own, held_out, models) in enumerate(each):
        tested = _with(test.target(k), confounds)
        info = TaskInfo(spec.name, spec.kind, spec.classes, task.level)
        notes, absent = dict(NOTES), dict(maker.absent)
        if isinstance(confounds, str):
            absent["confounds"] = confounds
        else:
            notes["confounds"] = f"{confounds.names}; nothing of the brain"
        guess = _chance(spec, own, tested)
        writer = _Writer(info, split, seed, guess, seconds, notes)
        found.append(writer.chance(len(tested.unit_targets())))
        found += [writer.fitted(name, m, held_out, tested) for name, m in models.items()]
        found += [writer.absent(name, why) for name, why in absent.items()]
    return found


def _with(clips: LabelledClips, confounds: Confounds | str) -> LabelledClips:
    """The confounds of each run beside the other features; motion differs from run to run."""
    if isinstance(confounds, str):
        return clips
    rows = first_of_runs(clips.clips)
    runs = [clips.clips[i].run for i in rows.tolist()]
    return clips.with_feature("confounds", confounds(runs), rows)


def _fit(
    spec: TaskSpec,
    train: LabelledClips,
    validation: LabelledClips | None,
    seed: int,
    inner: int,
    unit: Callable[[ClipFacts], str],
) -> dict[str, Fitted]:
    """A model of one target by feature."""
    models = {}
    parts = [train] if validation is None else [train, validation]
    for name in train.features:
        groups = [unit(part.clips[i]) for part in parts for i in part.rows[name].tolist()]
        models[name] = fit(
            spec.kind,
            train.part(name),
            validation.part(name) if validation else None,
            # Whitening already set the scale of the components; scaling again would undo it.
            standardize=name != "components",
            levels=len(spec.classes) if spec.kind == "ordinal" else 0,
            seed=seed,
            inner=Inner(inner, groups) if inner else None,
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
    notes: Mapping[str, str]

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
        result = self._result(self.name(name), scored.n, scored.values, self.notes[name])
        if validation:
            held_out = evaluate(predict(model, name, validation), self.task.kind)
            result = replace(result, validation=held_out.values)
        outputs = 1 if self.task.kind == "ordinal" else model.bias.size
        size = Parameters((len(model.weights) + 1) * outputs, 0)
        return BaselineResult(replace(result, parameters=size), tuple(rows))

    def absent(self, name: str, why: str) -> BaselineResult:
        gaps: metrics.Values = dict.fromkeys(metrics.names(self.task.kind))
        return BaselineResult(self._result(self.name(name), 0, gaps, f"not applicable: {why}"))
