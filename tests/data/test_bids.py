"""Finding runs and what belongs to them: raw BIDS, fMRIPrep, a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmrizoo.config import PrepareConfig
from fmrizoo.data.bids import find_runs, parse_name
from fmrizoo.data.sample import resolve_source, sample_path
from fmrizoo.data.store import matches
from fmrizoo.errors import DataError
from fmrizoo.types import RunKey

NATIVE = PrepareConfig(space="native")


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if name.endswith(".json") else "")


def test_names_are_taken_apart() -> None:
    entities, suffix = parse_name(Path("sub-01_ses-a_task-x_acq-1_run-2_bold.nii.gz"))
    assert entities == {"sub": "01", "ses": "a", "task": "x", "acq": "1", "run": "2"}
    assert suffix == "bold"


def test_the_sample() -> None:
    runs = find_runs(sample_path(), NATIVE)
    assert len(runs) == 18
    first = runs[0]
    assert str(first.key) == "sub-001_task-objects_acq-1slice_run-01"
    assert first.tr == 2.5 and first.events is not None and "1slice_run-01" in first.events.name
    # A mask without a run entity applies to all runs of its acquisition.
    assert {r.mask.name for r in runs if r.mask} == {
        f"sub-001_task-objects_acq-{a}_desc-brain_mask.nii.gz" for a in ("1slice", "25mm")
    }


def test_sidecars_are_inherited_nearest_first(tmp_path: Path) -> None:
    touch(tmp_path, *(f"sub-{s}/func/sub-{s}_task-{t}_bold.nii.gz" for s in "12" for t in "ab"))
    (tmp_path / "task-a_bold.json").write_text('{"RepetitionTime": 1.0}')
    (tmp_path / "bold.json").write_text('{"RepetitionTime": 0.5}')
    (tmp_path / "sub-2/sub-2_task-a_bold.json").write_text('{"RepetitionTime": 3.0}')
    (tmp_path / "sub-1/func/sub-1_task-a_bold.json").write_text('{"EchoTime": 0.03}')
    touch(tmp_path, "task-b_events.tsv", "sub-1/func/sub-1_task-b_events.tsv")
    found = {(r.key.subject, r.key.task): r for r in find_runs(tmp_path, NATIVE)}
    assert {k: r.tr for k, r in found.items()} == {
        ("1", "a"): 1.0,
        ("1", "b"): 0.5,
        ("2", "a"): 3.0,
        ("2", "b"): 0.5,
    }
    assert found["1", "b"].events == tmp_path / "sub-1/func/sub-1_task-b_events.tsv"
    assert found["2", "b"].events == tmp_path / "task-b_events.tsv"
    assert found["1", "a"].events is None


def test_fmriprep(tmp_path: Path) -> None:
    root = tmp_path / "derivatives" / "fmriprep"
    stem = "sub-1/ses-a/func/sub-1_ses-a_task-rest_run-1"
    mni, t1 = "space-MNI152NLin2009cAsym_res-2", "space-T1w"
    for space in (mni, t1):
        touch(root, *(f"{stem}_{space}_desc-{d}.nii.gz" for d in ("preproc_bold", "brain_mask")))
    touch(root, f"{stem}_{mni}_boldref.nii.gz", f"{stem}_desc-confounds_timeseries.tsv")
    touch(root, "sub-1/anat/sub-1_space-MNI152NLin2009cAsym_res-2_desc-brain_mask.nii.gz")
    touch(tmp_path, f"{stem}_events.tsv", f"{stem}_bold.nii.gz")
    (root / f"{stem}_{mni}_desc-preproc_bold.json").write_text('{"RepetitionTime": 0.8}')
    (run,) = find_runs(root, PrepareConfig())
    assert str(run.key) == "sub-1_ses-a_task-rest_run-1_res-2"
    assert run.mask == root / f"{stem}_{mni}_desc-brain_mask.nii.gz"
    assert run.confounds == root / f"{stem}_desc-confounds_timeseries.tsv"
    assert run.events == tmp_path / f"{stem}_events.tsv"
    assert run.tr == 0.8
    with pytest.raises(DataError, match="MNI152NLin2009cAsym, T1w"):
        find_runs(root, PrepareConfig(space="MNI152NLin6Asym"))
    # In the raw folder itself the derivatives are not runs.
    assert [r.path.name for r in find_runs(tmp_path, NATIVE)] == [
        "sub-1_ses-a_task-rest_run-1_bold.nii.gz"
    ]


def test_raw_runs_are_in_no_standard_space() -> None:
    with pytest.raises(DataError, match=r"18 BOLD runs .* found native .*prepare\.space"):
        find_runs(sample_path(), PrepareConfig())


def test_selection(tmp_path: Path) -> None:
    touch(
        tmp_path, *(f"sub-0{s}/func/sub-0{s}_task-a_run-{r}_bold.nii" for s in "12" for r in "12")
    )
    chosen = find_runs(tmp_path, PrepareConfig(space="native", select={"sub": "2", "run": "01"}))
    assert [str(r.key) for r in chosen] == ["sub-02_task-a_run-2".replace("run-2", "run-1")]
    with pytest.raises(DataError, match="none of the 4 runs"):
        find_runs(tmp_path, PrepareConfig(space="native", select={"task": "b"}))
    with pytest.raises(DataError, match="not a BIDS entity"):
        find_runs(tmp_path, PrepareConfig(space="native", select={"tsk": "a"}))


@pytest.mark.parametrize(
    ("select", "fits"),
    [
        ({"run": "1|2"}, True),
        ({"run": "2 | 01"}, True),
        ({"run": "2|3"}, False),
        ({"run": "12"}, False),
        ({"run": ""}, False),
        ({"sub": "sub-9|sub-7"}, True),
        ({"sub": "07"}, True),
        ({"task": "rest|a", "run": "1"}, True),
        ({"task": "rest|a", "run": "2"}, False),
    ],
)
def test_one_of_several_values_is_enough(select: dict[str, str], fits: bool) -> None:
    assert matches(RunKey("7", task="a", run="01"), select) is fits


def test_nothing_there_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sub-\*.*_bold\.nii"):
        find_runs(tmp_path, NATIVE)


def test_two_files_for_one_run_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, *(f"sub-1/func/sub-1_task-a_bold.nii{e}" for e in ("", ".gz")))
    with pytest.raises(DataError, match="both run sub-1_task-a"):
        find_runs(tmp_path, NATIVE)


def test_a_broken_sidecar_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "sub-1/func/sub-1_task-a_bold.nii.gz")
    sidecar = tmp_path / "sub-1/func/sub-1_task-a_bold.json"
    for content in ("{", "[1]", json.dumps({"RepetitionTime": "fast"})):
        sidecar.write_text(content)
        with pytest.raises(DataError, match=r"sub-1_task-a_bold\.json"):
            find_runs(tmp_path, NATIVE)


def test_a_table_of_files(tmp_path: Path) -> None:
    touch(tmp_path, "data/one.nii.gz", "data/two.nii.gz", "m.nii.gz", "e.tsv")
    table = tmp_path / "runs.tsv"
    table.write_text(
        "path\tsubject\ttask\trun\ttr\tmask\tevents\n"
        "data/one.nii.gz\tsub-01\trest\t1\t0.8\tm.nii.gz\te.tsv\n"
        f"{tmp_path}/data/two.nii.gz\t01\trest\t2\tn/a\t\t\n"
    )
    one, two = find_runs(table, PrepareConfig())
    assert (str(one.key), one.tr) == ("sub-01_task-rest_run-1", 0.8)
    assert one.mask == tmp_path / "m.nii.gz" and one.events == tmp_path / "e.tsv"
    assert (str(two.key), two.tr, two.mask) == ("sub-01_task-rest_run-2", None, None)


@pytest.mark.parametrize(
    "text, said",
    [
        ("file\tsubject\na\tb\n", "lacks the column 'path'"),
        ("path\tsubject\nnone.nii\t1\n", r"line 2: path file .*none\.nii does not exist"),
        ("path\tsubject\nx.nii\t\n", "line 2: path and subject"),
        ("path\tsubject\ttr\nx.nii\t1\tfast\n", "tr='fast' is not a number"),
        ("path\tsubject\nx.nii\t../1\n", "is no label"),
        ("path\tsubject\n", "lists no run"),
    ],
)
def test_bad_tables(text: str, said: str, tmp_path: Path) -> None:
    touch(tmp_path, "x.nii")
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(DataError, match=said):
        find_runs(tmp_path / "t.tsv", NATIVE)


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    assert resolve_source("sample:haxby2001") == sample_path("haxby2001")
    with pytest.raises(DataError, match="Did you mean 'haxby2001'"):
        resolve_source("sample:haxby2002")
    with pytest.raises(DataError, match="does not exist"):
        resolve_source(tmp_path / "x")
    touch(tmp_path, "x.csv")
    with pytest.raises(DataError, match=r"no \.tsv"):
        find_runs(tmp_path / "x.csv", NATIVE)
