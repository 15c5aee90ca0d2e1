"""A model's outputs become one prediction per unit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError
from fmrizoo.evaluate.inference import predict_units
from fmrizoo.evaluate.predictions import evaluate
from fmrizoo.types import Batch

AGE = TaskConfig(target="age", source="participants", level="subject", kind="regression")


def test_each_event_is_one_unit_in_order(haxby: Store) -> None:
    data = DataConfig(clip_frames=9)
    table = ClipTable.labelled(haxby, haxby.runs[:2], data, TaskConfig())
    classes = {name: i for i, name in enumerate(table.classes())}

    def perfect(batch: Batch) -> Tensor:
        assert batch.target is not None
        return torch.eye(len(classes))[batch.target]

    found = predict_units(perfect, Loader(table, data, 5, targets=classes).epoch())
    assert [p.unit for p in found] == [table.unit(i) for i in range(16)]
    assert [list(classes)[int(p.target)] for p in found] == list(table.labels or ())
    assert evaluate(found, "classification")["accuracy"] == 1.0


def test_clips_of_a_subject_are_averaged(traits: Store) -> None:
    data = DataConfig(clip_frames=9)
    table = ClipTable.labelled(traits, traits.runs, data, AGE)
    found = predict_units(
        lambda batch: batch.start[:, None].double(), Loader(table, data, 7).epoch()
    )
    participants = traits.participants
    assert participants is not None
    assert [p.target for p in found] == [float(a) for a in participants["age"]]
    # Clips start at 0, 9, 18, 27, 36.
    assert {(p.scores, p.n_clips) for p in found} == {((18.0,), 5)}


def test_clips_without_labels_are_refused(haxby: Store) -> None:
    data = DataConfig(clip_frames=9)
    table = ClipTable.windows(haxby, haxby.runs[:1], data)
    with pytest.raises(DataError, match="no label"):
        predict_units(lambda batch: torch.zeros(len(batch), 2), Loader(table, data, 4).epoch())
