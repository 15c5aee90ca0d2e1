"""Embeddings as BIDS derivatives: names that BIDS allows, numbers that come back as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from fmrizoo.errors import DataError
from fmrizoo.evaluate.derivatives import label_of, name_faults, write_derivatives
from fmrizoo.evaluate.embeddings import EmbeddingRow, Embeddings

RUNS = ("sub-01_ses-a_task-rest_run-1", "sub-02_task-rest_acq-x_dir-AP")
CONTRACT = {"space": "MNI152NLin2009cAsym", "tr": 2.0}


def made(level: str = "clip", pool: str = "mean", shape: tuple[int, ...] = (3,)) -> Embeddings:
    rng = np.random.default_rng(0)
    if level == "subject":
        rows = [EmbeddingRow(f"sub-{s}", s, f"sub-{s}_task-rest", None, 4) for s in ("01", "02")]
    elif level == "run":
        rows = [EmbeddingRow(run, run[4:6], run, None, 4) for run in RUNS]
    else:
        rows = [
            EmbeddingRow(f"{run}#frame-{t:04d}", run[4:6], run, t) for run in RUNS for t in (0, 8)
        ]
    values = (1e3 * rng.normal(size=(len(rows), *shape))).astype(np.float32)
    about = {
        "level": level,
        "pool": pool,
        "stage": 1,
        "weights_sha256": "ab" * 32,
        "contract": CONTRACT,
        "backbone": "Swin4D",
    }
    return Embeddings(values, tuple(rows), about)


FIRST = "sub-01/ses-a/func/sub-01_ses-a_task-rest_run-1_space-MNI152NLin2009cAsym_desc-m_embedding"
SECOND = "sub-02/func/sub-02_task-rest_acq-x_dir-AP_space-MNI152NLin2009cAsym_desc-m_embedding"


def test_tables_of_clips_come_back_as_they_were(tmp_path: Path) -> None:
    found = made()
    written = write_derivatives(found, tmp_path, "m", sources=["doi:10.1234/a", "https://x.org/d"])
    assert written == [tmp_path / f"{FIRST}.tsv", tmp_path / f"{SECOND}.tsv"]
    assert name_faults(tmp_path) == []
    tables = [pandas.read_csv(path, sep="\t", dtype={"unit": str}) for path in written]
    together = pandas.concat(tables)
    assert together["unit"].tolist() == [row.unit for row in found.rows]
    assert together["start"].tolist() == [0, 8, 0, 8]
    values = together[["f0", "f1", "f2"]].to_numpy(np.float64).astype(np.float32)
    np.testing.assert_array_equal(values, found.values)  # to the last bit
    said = json.loads(written[0].with_suffix(".json").read_text())
    assert said["Shape"] == [2, 3] and said["Pooling"] == "mean" and said["Stage"] == 1
    assert said["WeightsSHA256"] == "ab" * 32 and said["Contract"] == CONTRACT
    assert said["Runs"] == [RUNS[0]] and said["Units"] == "arbitrary"
    whole = json.loads((tmp_path / "dataset_description.json").read_text())
    assert whole["DatasetType"] == "derivative"
    assert [one["Name"] for one in whole["GeneratedBy"]] == ["fmrizoo"]
    assert whole["SourceDatasets"] == [{"DOI": "doi:10.1234/a"}, {"URL": "https://x.org/d"}]


def test_arrays_and_runs(tmp_path: Path) -> None:
    found = made("run", "parcel", (5, 3))
    found.values[0, 1] = np.nan
    first, second = write_derivatives(found, tmp_path, "m")
    np.testing.assert_array_equal(np.load(first), found.values[:1])
    np.testing.assert_array_equal(np.load(second), found.values[1:])
    said = json.loads(second.with_suffix(".json").read_text())
    assert said["Axes"] == ["run", "parcel", "feature"] and said["Shape"] == [1, 5, 3]
    assert said["Rows"] == [{"unit": RUNS[1], "start": None, "n_clips": 4}]
    assert name_faults(tmp_path) == []


def test_subjects_share_one_table(tmp_path: Path) -> None:
    found = made("subject")
    found.values[1, 2] = np.nan
    (path,) = write_derivatives(found, tmp_path, "m")
    assert path == tmp_path / "desc-m_embedding.tsv" and name_faults(tmp_path) == []
    table = pandas.read_csv(path, sep="\t", na_values="n/a")
    assert list(table.columns) == ["participant_id", "n_clips", "f0", "f1", "f2"]
    assert table["participant_id"].tolist() == ["sub-01", "sub-02"]
    values = table[["f0", "f1", "f2"]].to_numpy(np.float64).astype(np.float32)
    np.testing.assert_array_equal(values, found.values)


def test_several_models_share_a_folder_but_no_label(tmp_path: Path) -> None:
    write_derivatives(made(), tmp_path, "m", sources=["10.1234/a"])
    write_derivatives(made(), tmp_path, "other")
    write_derivatives(made(pool="frame", shape=(2, 3)), tmp_path, "m")  # the same model, again
    assert not (tmp_path / f"{FIRST}.tsv").exists() and (tmp_path / f"{FIRST}.npy").exists()
    assert name_faults(tmp_path) == []
    assert "10.1234/a" in (tmp_path / "dataset_description.json").read_text()
    foreign = made()
    foreign.about["weights_sha256"] = "cd" * 32
    with pytest.raises(DataError, match="is of another model with the same label"):
        write_derivatives(foreign, tmp_path, "m")


def test_what_cannot_be_named_is_refused(tmp_path: Path) -> None:
    for label in ("swin4d-simmim", "a_b", ""):
        with pytest.raises(DataError, match="only letters and digits are allowed"):
            write_derivatives(made(), tmp_path, label)
    twins = ("sub-a:1_task-rest", "sub-a1_task-rest")
    rows = tuple(EmbeddingRow(run, "x", run, None) for run in twins)
    with pytest.raises(DataError, match="two runs would both be sub-a1/func/sub-a1_task-rest"):
        write_derivatives(Embeddings(np.ones((2, 3), np.float32), rows), tmp_path, "m")
    odd = (EmbeddingRow("sub-1_what-2", "1", "sub-1_what-2", None),)
    with pytest.raises(DataError, match="has the entity 'what', which no BIDS name can hold"):
        write_derivatives(Embeddings(np.ones((1, 3), np.float32), odd), tmp_path, "m")
    assert not list(tmp_path.iterdir())
    (tmp_path / "dataset_description.json").write_text('{"Name": "raw data"}')
    with pytest.raises(DataError, match="is a data set that fmrizoo did not make"):
        write_derivatives(made(), tmp_path, "m")
    with pytest.raises(DataError, match="has no letter or digit"):
        label_of("--")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sub-01/func/sub-01_run-1_task-rest_embedding.tsv", "are not in order"),
        ("sub-01/func/sub-01_task-re.st_embedding.tsv", "suffix"),
        ("sub-01/func/sub-01_task-re+st_embedding.tsv", "is no entity with a label"),
        ("sub-01/func/sub-01_what-1_embedding.tsv", "entity what is unknown"),
        ("sub-02/func/sub-01_task-rest_embedding.tsv", "lies in sub-02/func"),
        ("sub-01/sub-01_task-rest_embedding.tsv", "lies in sub-01, not in sub-01/func"),
        ("sub-01/func/sub-01_task-rest_task-rest_embedding.tsv", "are not in order"),
    ],
)
def test_the_check_of_names_finds_faults(tmp_path: Path, name: str, said: str) -> None:
    write_derivatives(made(), tmp_path, "m")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    faults = name_faults(tmp_path)
    assert any(said in fault for fault in faults), faults
    assert any("no sidecar" in fault for fault in faults)


def test_the_check_misses_no_description(tmp_path: Path) -> None:
    found: list[Any] = name_faults(tmp_path)
    assert found == ["dataset_description.json is missing"]
