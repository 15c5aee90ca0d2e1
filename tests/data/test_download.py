"""fmrizoo download against faked fetchers: the table, the phenotypes, and no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import nilearn.datasets
import numpy as np
import pandas
import pytest

from fmrizoo.config import PrepareConfig
from fmrizoo.data.download import SOURCES, download
from fmrizoo.data.prepare import prepare
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError


def bold(path: Path, seed: int) -> str:
    """A bright ball in a dark box, as nilearn's mask wants it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"), -1)
    ball = ((at - 10) ** 2).sum(-1) < 49
    data = np.where(ball[..., None], 1000, 20) + rng.normal(0, 5, (20, 20, 20, 6))
    img = nib.Nifti1Image(data.astype(np.float32), np.diag([3.0, 3.0, 3.0, 1.0]))
    img.set_sform(img.affine, 1)
    img.header.set_zooms((3, 3, 3, 2))
    nib.save(img, path)
    return str(path)


def development_fmri(n_subjects: int | None, data_dir: str) -> dict[str, Any]:
    """As nilearn's: fMRIPrep names, participants in the order of the files."""
    root = Path(data_dir) / "development_fmri"
    names = ["sub-pixar123", "sub-pixar001"][:n_subjects]
    tables = []
    for name in names:
        tables.append(root / f"{name}_task-pixar_desc-reducedConfounds_regressors.tsv")
        root.mkdir(parents=True, exist_ok=True)
        tables[-1].write_text("framewise_displacement\nn/a\n" + "0.25\n" * 5)
    return {
        "func": [bold(root / f"{n}_task-pixar_desc-preproc_bold.nii.gz", i)
                 for i, n in enumerate(names)],
        "confounds": [str(t) for t in tables],
        "phenotypic": pandas.DataFrame(
            {"participant_id": names, "Age": [27.1, 4.8][:n_subjects], "Gender": "F"}
        ),
        "t_r": 2,
    }  # fmt: skip


def adhd(n_subjects: int | None, data_dir: str) -> dict[str, Any]:
    """As nilearn's: phenotypes of all, in another order than the files."""
    root = Path(data_dir) / "adhd" / "data"
    ids = ["0010042", "0010064"]
    return {
        "func": [bold(root / i / f"{i}_rest_tshift_RPI_voreg_mni.nii.gz", 3) for i in ids],
        "confounds": [],
        "phenotypic": pandas.DataFrame(
            {"Subject": ["0010064", "0099999", "0010042"], "adhd": [1, 0, None]}
        ),
        "t_r": 2.0,
    }


def test_what_is_fetched_can_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nilearn.datasets, "fetch_development_fmri", development_fmri)
    done = download("development_fmri", tmp_path / "d", subjects=2)
    assert done.subjects == 2 and done.space == "MNI152NLin2009cAsym"
    lines = done.table.read_text().splitlines()
    assert lines[0] == "path\tsubject\ttask\ttr\tconfounds"
    assert lines[1].startswith("development_fmri/sub-pixar123_")  # the folder can be moved
    (tmp_path / "d").rename(tmp_path / "e")
    table = tmp_path / "e" / "runs.tsv"
    prepare(table, tmp_path / "s", PrepareConfig(space="native", mask="compute"))
    store = Store(tmp_path / "s")
    assert [r.name for r in store.runs] == ["sub-pixar001_task-pixar", "sub-pixar123_task-pixar"]
    assert store.contract.tr == 2 and store.runs[0].qc["fd_mean"] == 0.25
    people = store.participants
    assert people is not None
    assert people.set_index("participant_id")["Age"].to_dict() == {
        "sub-pixar123": "27.1",
        "sub-pixar001": "4.8",
    }


def test_phenotypes_follow_the_file_not_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nilearn.datasets, "fetch_adhd", adhd)
    download("adhd", tmp_path)
    text = (tmp_path / "participants.tsv").read_text()
    assert text == (
        "participant_id\tSubject\tadhd\nsub-0010042\t0010042\tn/a\nsub-0010064\t0010064\t1.0\n"
    )
    assert "\t2\tn/a" in (tmp_path / "runs.tsv").read_text()


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def offline(**_: Any) -> None:
        raise requests.exceptions.ConnectionError("Max retries exceeded with url: /x")

    monkeypatch.setattr(nilearn.datasets, "fetch_adhd", offline)
    with pytest.raises(DataError, match=r"adhd could not be downloaded.*is there a network"):
        download("adhd", tmp_path / "d")
    assert not (tmp_path / "d" / "runs.tsv").exists()


def test_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="Did you mean 'adhd'"):
        download("ahdd", tmp_path)
    with pytest.raises(DataError, match="--subjects must be ≥ 1"):
        download("adhd", tmp_path, subjects=0)

    def other(n_subjects: int | None, data_dir: str) -> dict[str, Any]:
        found = adhd(n_subjects, data_dir)
        found["phenotypic"] = found["phenotypic"][:1]
        return found

    monkeypatch.setattr(nilearn.datasets, "fetch_adhd", other)
    with pytest.raises(DataError, match="0 rows of phenotypes fit 0010042_rest"):
        download("adhd", tmp_path)


def test_the_fetchers_exist_and_take_what_we_give() -> None:
    import inspect

    for source in SOURCES.values():
        taken = inspect.signature(getattr(nilearn.datasets, source.fetcher)).parameters
        assert {"n_subjects", "data_dir"} <= set(taken)
