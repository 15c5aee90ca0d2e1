"""Which clips a table holds, counted by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError, RecipeError


def config(**settings: Any) -> DataConfig:
    return DataConfig(**settings)


@pytest.mark.parametrize(
    "frames, stride, share, starts",
    [
        (20, 1, 1.0, [0, 20, 40, 60, 80, 100]),  # 121 frames: the last ends at 120
        (20, 1, 0.5, list(range(0, 102, 10))),
        (20, 3, 1.0, [0, 60]),  # spans 58 frames, starts 60 apart
        (121, 1, 1.0, [0]),
        (1, 1, 1.0, list(range(121))),
        (40, 1, 0.001, list(range(82))),  # at least one frame apart
        (20, 1, 2.0, [0, 40, 80]),
    ],
)
def test_windows(
    frames: int, stride: int, share: float, starts: list[int], sample_store: Store
) -> None:
    runs = sample_store.select({"acquisition": "25mm"})[:2]
    settings = config(clip_frames=frames, frame_stride=stride, clip_stride=share)
    table = ClipTable.windows(sample_store, runs, settings)
    assert table.start.tolist() == starts * 2
    assert table.run.tolist() == [0] * len(starts) + [1] * len(starts)
    assert table.clip_frames == frames  # overlap moves starts, never the length
    assert table.unit(len(table) - 1) == runs[1].name and table.labels is None
    assert tuple(table.grid) == (6, 10, 10, frames)


def test_a_short_run_is_named(sample_store: Store) -> None:
    with pytest.raises(DataError, match=r"run sub-001.* 121 frames, a clip spans 139"):
        ClipTable.windows(sample_store, sample_store.runs, config(clip_frames=47, frame_stride=3))


def test_grids_do_not_mix(sample_store: Store) -> None:
    with pytest.raises(DataError, match=r"cannot share a batch.*data\.select"):
        ClipTable.windows(sample_store, sample_store.runs, config())
    with pytest.raises(DataError, match="no runs"):
        ClipTable.windows(sample_store, [], config())


def test_events(sample_store: Store) -> None:
    runs = sample_store.select({"acquisition": "1slice"})
    table = ClipTable.labelled(sample_store, runs, config(clip_frames=9), TaskConfig(lag=5.0))
    assert len(table) == 72
    assert Counter(table.labels or ()) == {(name,): 9 for name in table.classes()}
    assert table.targets == ("trial_type",)
    assert len(table.classes()) == 8
    first = runs[0].events
    assert table.start[:8].tolist() == [int((e["onset"] + 5) / 2.5 + 0.5) for e in first]
    assert table.unit(2) == f"{runs[0].name}#event-03"
    assert len(set(table.units or ())) == 72


@pytest.mark.parametrize("level, units", [("run", 72), ("subject", 8)])
def test_levels_of_events(level: str, units: int, sample_store: Store) -> None:
    runs = sample_store.select({"acquisition": "1slice"})
    task = TaskConfig(level=level)
    table = ClipTable.labelled(sample_store, runs, config(clip_frames=9), task)
    assert len(set(table.units or ())) == units
    assert table.units is not None and table.labels is not None
    for unit, (label,) in zip(table.units, table.labels, strict=True):
        assert unit.endswith(f"#{label}")
    assert table.unit_labels() == dict(zip(table.units, table.labels, strict=True))


def test_event_clips_that_leave_the_run(sample_store: Store) -> None:
    runs = sample_store.select({"acquisition": "1slice"})
    with pytest.raises(DataError, match=r"of 72 event clips, 9 run past .*event-08.*task\.lag=5"):
        ClipTable.labelled(sample_store, runs, config(clip_frames=20), TaskConfig())
    with pytest.raises(DataError, match=r"9 start before"):
        ClipTable.labelled(sample_store, runs, config(clip_frames=3), TaskConfig(lag=-30))


def test_columns_and_labels(
    tree: Any, made: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    tree.add(
        events="onset\tduration\ttrial_type\tscore\n0\t1\ta\t1.5\n6\t1\tn/a\tn/a\n8\t1\tb\tx\n"
    )
    store = made(tree.root)
    three = config(clip_frames=3)
    table = ClipTable.labelled(store, store.runs, three, TaskConfig(lag=0))
    assert table.labels == (("a",), ("b",)) and table.start.tolist() == [0, 4]
    assert table.unit(1).endswith("#event-03")  # counted as in events.tsv
    assert "1 events have no 'trial_type' and are left out" in caplog.text
    with pytest.raises(DataError, match="Did you mean 'trial_type'"):
        ClipTable.labelled(store, store.runs, three, TaskConfig(target="trial_typ"))
    with pytest.raises(DataError, match=r"event 3 .*score='x' is not a number"):
        ClipTable.labelled(
            store, store.runs, three, TaskConfig(target="score", kind="regression", lag=0)
        )


def test_half_a_frame_rounds_up(tree: Any, made: Callable[..., Store]) -> None:
    tree.add(events="onset\tduration\ttrial_type\n1\t1\ta\n3\t1\tb\n5\t1\ta\n")
    store = made(tree.root)
    table = ClipTable.labelled(store, store.runs, config(clip_frames=2), TaskConfig(lag=0))
    assert table.start.tolist() == [1, 2, 3]  # TR 2 s


def test_dummy_scans_move_the_onsets(tree: Any, made: Callable[..., Store]) -> None:
    tree.add(events="onset\tduration\ttrial_type\n0\t1\ta\n10\t1\tb\n")
    store = made(tree.root, dummy_scans=2)
    assert [e["onset"] for e in store.runs[0].events] == [-4, 6]
    assert store.runs[0].n_frames == 10
    with pytest.raises(DataError, match="1 start before"):
        ClipTable.labelled(store, store.runs, config(clip_frames=2), TaskConfig(lag=0))


PEOPLE = TaskConfig(target="age", source="participants", kind="regression", level="subject")


def test_participants(
    tree: Any, made: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    for subject in ("01", "02", "03"):
        tree.add(subject)
    (tree.root / "participants.tsv").write_text(
        "participant_id\tage\tsex\nsub-01\t20.5\tF\nsub-02\tn/a\tM\nsub-03\t33\tM\n"
    )
    store = made(tree.root)
    table = ClipTable.labelled(store, store.runs, config(clip_frames=6), PEOPLE)
    assert table.labels == ((20.5,), (20.5,), (33.0,), (33.0,))
    assert table.units == ("sub-01", "sub-01", "sub-03", "sub-03")
    assert "1 subjects have no 'age'" in caplog.text and "out: 02" in caplog.text
    sex = TaskConfig(target="sex", source="participants", level="run")
    table = ClipTable.labelled(store, store.runs, config(clip_frames=12), sex)
    assert table.labels == (("F",), ("M",), ("M",))
    assert table.units == tuple(r.name for r in store.runs)
    with pytest.raises(DataError, match="no column 'ages'"):
        ages = TaskConfig(target="ages", source="participants", level="subject")
        ClipTable.labelled(store, store.runs, config(), ages)


def test_labels_that_nobody_has(tree: Any, made: Callable[..., Store]) -> None:
    tree.add()
    store = made(tree.root)
    with pytest.raises(DataError, match=r"no participants\.tsv"):
        ClipTable.labelled(store, store.runs, config(clip_frames=6), PEOPLE)
    with pytest.raises(DataError, match="has no events"):
        ClipTable.labelled(store, store.runs, config(clip_frames=6), TaskConfig())
    (tree.root / "participants.tsv").write_text("participant_id\tage\nsub-99\t3\n")
    other = made(tree.root, name="other")
    with pytest.raises(DataError, match="no clip has a label 'age'"):
        ClipTable.labelled(other, other.runs, config(clip_frames=6), PEOPLE)


def test_the_contract_of_a_table(sample_store: Store) -> None:
    runs = sample_store.select({"acquisition": "25mm"})
    table = ClipTable.windows(sample_store, runs, config())
    contract = table.contract("znorm_minback")
    assert contract.normalization == "znorm_minback" and contract.grid == (6, 10, 10)
    assert np.isclose(contract.tr, 2.5)


def people(tree: Any, made: Callable[..., Store], rows: str, subjects: int = 3) -> Store:
    """A store of ``subjects`` runs and a participants.tsv (``|`` for tabs)."""
    for s in range(1, subjects + 1):
        tree.add(f"{s:02d}")
    (tree.root / "participants.tsv").write_text(rows.replace("|", "\t"))
    return made(tree.root)


def both(**settings: Any) -> TaskConfig:
    targets = {"sex": "classification", "age": "regression"}
    return TaskConfig(targets=targets, source="participants", level="subject", **settings)


def test_several_targets_with_gaps(
    tree: Any, made: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    rows = "participant_id|age|sex\nsub-01|20.5|n/a\nsub-02||M\nsub-03|n/a|n/a\n"
    store = people(tree, made, rows)
    table = ClipTable.labelled(store, store.runs, config(clip_frames=6), both())
    assert table.targets == ("sex", "age")
    assert table.labels == ((None, 20.5), (None, 20.5), ("M", None), ("M", None))
    assert (table.classes(0), table.units) == (("M",), ("sub-01",) * 2 + ("sub-02",) * 2)
    assert "1 subjects have no 'sex' or 'age' in participants.tsv and are left out: 03" in (
        caplog.text
    )
    assert "2 of 4 clips have no sex" in caplog.text and "2 of 4 clips have no age" in caplog.text


def test_several_targets_of_events(tree: Any, made: Callable[..., Store]) -> None:
    tree.add(events="onset\tduration\ttrial_type\trt\n0\t1\ta\t0.5\n6\t1\tn/a\tn/a\n8\t1\tb\t\n")
    tree.add(run="2", events="onset\tduration\trt\n4\t1\t0.25\n")  # knows no trial_type
    store = made(tree.root)
    task = TaskConfig(targets={"rt": "regression", "trial_type": "classification"}, lag=0)
    table = ClipTable.labelled(store, store.runs, config(clip_frames=3), task)
    assert table.labels == ((0.5, "a"), (None, "b"), (0.25, None))
    assert [u.split("#")[1] for u in table.units or ()] == ["event-01", "event-03", "event-01"]


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-Infinity", "old"])
def test_ages_that_are_no_numbers_are_refused(
    text: str, tree: Any, made: Callable[..., Store]
) -> None:
    store = people(tree, made, f"participant_id|age\nsub-01|3\nsub-02|{text}\n", 2)
    with pytest.raises(DataError, match=rf"sub-02 in participants\.tsv of .*age='{text}' is not a"):
        ClipTable.labelled(store, store.runs, config(clip_frames=6), PEOPLE)


def test_nan_is_no_class(tree: Any, made: Callable[..., Store]) -> None:
    store = people(tree, made, "participant_id|sex\nsub-01|nan\n", 1)
    sex = TaskConfig(target="sex", source="participants", level="subject")
    with pytest.raises(DataError, match=r"sex='nan' is not a label: write n/a"):
        ClipTable.labelled(store, store.runs, config(clip_frames=6), sex)


def test_two_rows_of_one_subject_are_refused(tree: Any, made: Callable[..., Store]) -> None:
    rows = "participant_id|age\nsub-01|3\nsub-02|4\n01|3\n"
    store = people(tree, made, rows, 2)
    with pytest.raises(DataError, match=r"sub-01 in participants\.tsv of .* has several rows"):
        ClipTable.labelled(store, store.runs, config(clip_frames=6), PEOPLE)


def grade(**settings: Any) -> TaskConfig:
    return TaskConfig(
        target="grade", kind="ordinal", source="participants", level="subject", **settings
    )


def test_ordinal_labels_are_level_names(tree: Any, made: Callable[..., Store]) -> None:
    rows = "participant_id|grade\nsub-01|2\nsub-02|10\nsub-03|2.0\n"
    store, whole = people(tree, made, rows), config(clip_frames=12)
    table = ClipTable.labelled(store, store.runs, whole, grade())
    assert table.labels == (("2",), ("10",), ("2",))
    named = ClipTable.labelled(store, store.runs, whole, grade(levels=["2", "5", "10"]))
    assert named.labels == table.labels
    with pytest.raises(
        DataError, match=r"sub-02 .*grade='10' is none of task\.levels=\['1', '2'\]"
    ):
        ClipTable.labelled(store, store.runs, whole, grade(levels=["1", "2"]))
    with pytest.raises(RecipeError, match="names a level twice"):
        ClipTable.labelled(store, store.runs, whole, grade(levels=["1", "2", "1.0"]))


def test_ordinal_words_need_their_order(tree: Any, made: Callable[..., Store]) -> None:
    store = people(tree, made, "participant_id|grade\nsub-01|low\nsub-02|high\n", 2)
    whole = config(clip_frames=12)
    with pytest.raises(DataError, match=r"grade='low' is not a number.*task\.levels=\[LOW"):
        ClipTable.labelled(store, store.runs, whole, grade())
    table = ClipTable.labelled(store, store.runs, whole, grade(levels=["low", "high"]))
    assert table.labels == (("low",), ("high",))


def test_clips_of_a_unit_must_agree(sample_store: Store) -> None:
    runs = sample_store.select({"acquisition": "1slice"})
    table = ClipTable.labelled(sample_store, runs, config(clip_frames=9), TaskConfig())
    torn = replace(table, units=("one",) * len(table))
    with pytest.raises(DataError, match=r"clips of unit 'one' disagree on trial_type: \["):
        torn.unit_labels()
