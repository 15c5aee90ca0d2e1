"""A model's outputs become one prediction per unit and target."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.batch import ClipFacts
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.store import Store
from fmrizoo.data.targets import fit_tasks
from fmrizoo.errors import DataError
from fmrizoo.evaluate.inference import predict_units, unit_predictions
from fmrizoo.evaluate.predictions import evaluate
from fmrizoo.types import Batch, TaskSpec

AGE = TaskConfig(target="age", source="participants", level="subject", kind="regression")
DATA = DataConfig(clip_frames=9)


def test_each_event_is_one_unit_in_order(haxby: Store) -> None:
    table = ClipTable.labelled(haxby, haxby.runs[:2], DATA, TaskConfig())
    tasks = fit_tasks(table, TaskConfig())
    classes = tasks[0].classes

    def perfect(batch: Batch) -> Tensor:
        assert batch.target is not None
        return torch.eye(len(classes))[batch.target]

    batches = Loader(table, DATA, 5, tasks=tasks).epoch()
    found = predict_units(perfect, batches, tasks)["trial_type"]
    assert [p.unit for p in found] == [table.unit(i) for i in range(16)]
    assert [(classes[int(p.target)],) for p in found] == list(table.labels or ())
    assert evaluate(found, "classification")["accuracy"] == 1.0


def test_clips_of_a_subject_are_averaged(traits: Store) -> None:
    table = ClipTable.labelled(traits, traits.runs, DATA, AGE)
    tasks = fit_tasks(table, AGE)
    batches = Loader(table, DATA, 7, tasks=tasks).epoch()
    found = predict_units(lambda batch: batch.start[:, None].double(), batches, tasks)["age"]
    participants = traits.participants
    assert participants is not None
    assert [p.target for p in found] == [float(a) for a in participants["age"]]
    # Clips start at 0, 9, 18, 27, 36.
    assert {(p.scores, p.n_clips) for p in found} == {((18.0,), 5)}


def facts(unit: str, *targets: float, start: int = 0) -> ClipFacts:
    return ClipFacts(subject=unit, run="r", start=start, tr=2.0, unit=unit, targets=targets)


NAN = float("nan")
THREE = (
    TaskSpec("classification", ("a", "b"), name="sex"),
    TaskSpec("regression", name="age"),
    TaskSpec("ordinal", ("0", "1", "2"), name="grade"),
)


def test_scores_of_several_targets_are_split_by_their_widths() -> None:
    clips = [facts("u", 1, 31.4, 2), facts("u", 1, 31.4, 2, start=9), facts("v", 0, NAN, 1)]
    scores = torch.tensor(
        [[1.0, 2, 30, -1, -2, -3], [3, 4, 34, -3, -2, -1], [5, 6, 99, -5, -6, -7]]
    )
    found = unit_predictions(scores, clips, THREE)
    assert list(found) == ["sex", "age", "grade"]
    assert [(p.unit, p.target, p.scores, p.n_clips) for p in found["sex"]] == [
        ("u", 1.0, (2.0, 3.0), 2),
        ("v", 0.0, (5.0, 6.0), 1),
    ]
    # 31.4 is no float32; v has no age and is left out of that table only.
    assert [(p.unit, p.target, p.scores) for p in found["age"]] == [("u", 31.4, (32.0,))]
    assert [p.scores for p in found["grade"]] == [(-2.0, -2.0, -2.0), (-5.0, -6.0, -7.0)]


def test_kept_scores_give_what_the_loader_gives(haxby: Store) -> None:
    table = ClipTable.labelled(haxby, haxby.runs[:1], DATA, TaskConfig())
    tasks = fit_tasks(table, TaskConfig())
    loader = Loader(table, DATA, 3, tasks=tasks)
    kept = torch.randn(len(table), 8, generator=torch.Generator().manual_seed(0))
    rows = iter(kept)
    read = predict_units(
        lambda batch: torch.stack([next(rows) for _ in batch.subject]), loader.epoch(), tasks
    )
    order = [clip for pairs in loader.epoch_plan() for clip, _ in pairs]
    assert unit_predictions(kept, [loader.dataset.facts(c) for c in order], tasks) == read


def test_what_does_not_fit_is_refused(haxby: Store) -> None:
    table = ClipTable.windows(haxby, haxby.runs[:1], DATA)
    tasks = (TaskSpec("classification", ("a", "b")),)
    with pytest.raises(DataError, match="has 0 targets to be compared with, not 1"):
        predict_units(lambda b: torch.zeros(len(b), 2), Loader(table, DATA, 4).epoch(), tasks)
    with pytest.raises(DataError, match=r"= \(1, 6\), got \(1, 5\)"):
        unit_predictions(torch.zeros(1, 5), [facts("u", 1, 2.0, 2)], THREE)
    with pytest.raises(DataError, match=r"clips of unit 'u' disagree: target 1\.0"):
        torn = [facts("u", 1, 2.0, 2), facts("u", 0, 2.0, 2)]
        unit_predictions(torch.zeros(2, 6), torn, THREE)
    with pytest.raises(DataError, match="no clip"):
        predict_units(lambda b: torch.zeros(len(b), 2), [], tasks)
