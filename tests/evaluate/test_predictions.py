"""Aggregation of clips, the predictions table, its round trip and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fmrizoo.errors import DataError
from fmrizoo.evaluate.predictions import (
    Prediction,
    aggregate,
    evaluate,
    read_predictions,
    write_predictions,
)
from fmrizoo.types import TaskSpec

CLASSES = TaskSpec("classification", ("face", "house", "scrambled pix"))


def clip(unit: str, scores: tuple[float, ...], target: float = 0.0, n: int = 1) -> Prediction:
    return Prediction(unit, "001", f"run-{unit}", target, scores, n)


def test_aggregate_averages_logits_in_order() -> None:
    out = aggregate([clip("b", (4.0, 0.0)), clip("a", (1.0, 2.0)), clip("b", (0.0, 1.0))])
    assert [p.unit for p in out] == ["b", "a"]
    assert out[0].scores == (2.0, 0.5)
    assert (out[0].n_clips, out[1].n_clips) == (2, 1)


def test_aggregate_of_parts_equals_aggregate_of_all() -> None:
    rng = np.random.default_rng(0)
    clips = [clip("u", tuple(rng.normal(size=3))) for _ in range(7)]
    whole = aggregate(clips)[0]
    parts = aggregate([*aggregate(clips[:2]), *aggregate(clips[2:])])[0]
    assert parts.scores == pytest.approx(whole.scores, abs=1e-12)
    assert parts.n_clips == 7


def test_aggregate_differs_from_the_mean_of_probabilities() -> None:
    # One strong vote for class 1 outweighs two weak ones for class 0: true of logits only.
    out = aggregate([clip("u", (0.0, 9.0)), clip("u", (1.0, 0.0)), clip("u", (1.0, 0.0))])
    assert np.argmax(out[0].scores) == 1


def test_aggregate_joins_runs_and_refuses_contradictions() -> None:
    one = Prediction("001", "001", "run-1", 1.0, (0.0, 1.0))
    two = Prediction("001", "001", "run-2", 1.0, (0.0, 1.0))
    assert aggregate([one, two, one])[0].run == "run-1;run-2"
    with pytest.raises(DataError, match="disagree"):
        aggregate([one, Prediction("001", "001", "run-2", 0.0, (0.0, 1.0))])


def test_evaluate_counts_units_and_refuses_duplicates() -> None:
    rows = [clip("a", (1.0, 0.0)), clip("b", (1.0, 0.0), target=1.0)]
    found = evaluate(rows, "classification")
    assert (found.n, found["accuracy"]) == (2, 0.5)
    with pytest.raises(DataError, match="twice"):
        evaluate([rows[0], rows[0]], "classification")


def test_round_trip_keeps_every_digit(tmp_path: Path) -> None:
    rows = [
        Prediction("sub-001_run-01#event-00", "001", "sub-001_run-01", 2.0, (0.1, -1e-17, 1 / 3)),
        Prediction("tab\tin name", "002", "r", 0.0, (np.float32(0.1).item(), 5.0, 6.0), 4),
    ]
    write_predictions(tmp_path / "p.tsv", rows, CLASSES)
    assert read_predictions(tmp_path / "p.tsv") == (rows, CLASSES.classes)
    header, first, *_ = (tmp_path / "p.tsv").read_text().splitlines()
    assert header.split("\t")[3:5] == ["target", "predicted"]
    assert first.split("\t")[3:5] == ["scrambled pix", "scrambled pix"]
    assert [p.name for p in tmp_path.iterdir()] == ["p.tsv"]


def test_round_trip_of_regression(tmp_path: Path) -> None:
    rows = [Prediction("001", "001", "a;b", 31.5, (1 / 7,), 12)]
    write_predictions(tmp_path / "p.tsv", rows, TaskSpec("regression", std=2.0))
    assert read_predictions(tmp_path / "p.tsv") == (rows, ())


def test_round_trip_of_levels(tmp_path: Path) -> None:
    task = TaskSpec("ordinal", ("low", "mid", "high"), name="grade")
    rows = [
        Prediction("001", "001", "a;b", 2.0, tuple(np.log([0.4, 0.3, 0.3]).tolist()), 12),
        Prediction("002", "002", "c", 0.0, tuple(np.log([0.7, 0.2, 0.1]).tolist())),
    ]
    write_predictions(tmp_path / "p.tsv", rows, task)
    assert read_predictions(tmp_path / "p.tsv") == (rows, task.classes)
    lines = (tmp_path / "p.tsv").read_text().splitlines()
    header, first, second = (line.split("\t") for line in lines)
    assert header[6:] == ["score_low", "score_mid", "score_high"]
    # The median, not the likeliest level.
    assert (first[3:5], second[3:5]) == (["high", "mid"], ["low", "low"])
    assert evaluate(rows, "ordinal")["mae"] == 0.5
    with pytest.raises(DataError, match="2 scores, expected 3"):
        write_predictions(tmp_path / "p.tsv", [clip("a", (0.0, 1.0))], task)


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    with pytest.raises(DataError, match="cannot be read"):
        read_predictions(path)
    path.write_text("a\tb\n1\t2\n")
    with pytest.raises(DataError, match="not a predictions table"):
        read_predictions(path)
    write_predictions(path, [clip("a", (0.0, 1.0, 2.0))], CLASSES)
    good = path.read_text()
    path.write_text(good.replace("face\tscrambled pix", "cat\tface"))
    with pytest.raises(DataError, match=r"line 2.*'cat'"):
        read_predictions(path)
    path.write_text(good.rsplit("\t", 1)[0] + "\n")
    with pytest.raises(DataError, match="line 2: 8 columns, expected 9"):
        read_predictions(path)
    with pytest.raises(DataError, match="2 scores, expected 3"):
        write_predictions(path, [clip("a", (0.0, 1.0))], CLASSES)


def test_a_failed_write_leaves_the_old_table(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.mkdir()
    with pytest.raises(DataError, match="cannot write"):
        write_predictions(path, [clip("a", (0.0, 1.0, 2.0))], CLASSES)
    assert [p.name for p in tmp_path.iterdir()] == ["p.tsv"]
