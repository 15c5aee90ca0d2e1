"""The command line: the chain as a user types it, and bad input through a real process."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

import fmrizoo
from fmrizoo.cli import app, main
from fmrizoo.data.sample import sample_path
from fmrizoo.data.store import Store
from fmrizoo.errors import FmrizooError
from fmrizoo.evaluate.derivatives import name_faults

Run = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """``cli("list", "backbones")`` in this process, in an empty folder; must succeed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path, code: int = 0) -> Result:
        done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done

    return run


def process(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m fmrizoo …`` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fmrizoo", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"},
        timeout=120,
    )


def refused(said: str, *arguments: str | Path, cwd: Path) -> str:
    """Exit code 1, nothing on stdout, ``error:`` and one message on stderr; returns it."""
    done = process(*arguments, cwd=cwd)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    logged, mark, message = done.stderr.partition("error: ")
    assert mark and all(line.startswith(("INFO", "WARNING", " ")) for line in logged.splitlines())
    assert said in message, message
    assert message.endswith("\n") and len(message) < 1000
    return message


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- the chain ----------------------------------------------------------------------------------


def test_the_whole_job_as_typed(
    cli: Run, sample_store: Path, tiny: list[str], tmp_path: Path
) -> None:
    store = f"data.store={sample_store}"
    said = cli("pretrain", "pretrain/haxby_slice", store, *tiny, "--out", "runs/pre").stdout
    assert "runs/pre: step 4, loss 0." in said and "validation loss" in said
    again = cli("pretrain", "pretrain/haxby_slice", store, *tiny, "--out", "runs/pre").stdout
    assert again == said.replace("\n", " (was finished before)\n")
    given = ["finetune/haxby_slice", store, *tiny, "init_from=runs/pre"]
    table = cli("finetune", *given, "--out", "runs/fine", "--name", "mine").stdout
    assert "mine" in table and "accuracy" in table and "1 × 1" in table
    first = json.loads(Path("runs/fine/results.json").read_text())
    assert cli("evaluate", "runs/fine").stdout == table
    second = json.loads(Path("runs/fine/results.json").read_text())
    assert first | {"seconds": 0} == second | {"seconds": 0}
    shown = cli("report", "runs", "--out", "page/report.html", "--title", "A [b] title").stdout
    assert f"report: {tmp_path / 'page/report.html'}" in shown
    assert len(shown.splitlines()) == 4
    assert "A [b] title" in Path("page/report.html").read_text()
    said = cli("embed", "runs/pre", "--out", "e.npz", "--pool", "brain", "--level", "run").stdout
    assert "e.npz: 9 runs × 16 features, means over " in said
    with np.load("e.npz") as arrays:
        assert arrays["values"].shape == (9, 16) and len(set(arrays["run"].tolist())) == 9
    said = cli("embed", "runs/fine", "--out", "f.npz", "--part", "test", "--pool", "frame").stdout
    assert "clips × 8 × 16 features" in said
    said = cli("embed", "runs/pre", "--bids", "bids", "--level", "run", "--source", "10.1/a").stdout
    assert "bids: 9 runs × 16 features" in said and not name_faults(Path("bids"))
    assert len(list(Path("bids").rglob("*_desc-swin4dSimmimMean_embedding.tsv"))) == 9
    for what, kind in (("runs/pre", "pretraining run"), ("runs/fine/split.json", "split")):
        assert kind in cli("inspect", what).stdout
        assert json.loads(cli("inspect", what, "--json").stdout)["kind"] == kind


def test_profile_of_a_pretraining_and_of_a_head(
    cli: Run, sample_store: Path, tiny: list[str]
) -> None:
    """A table and a trace for each; profiling a run that goes on is no other recipe."""
    given = [f"data.store={sample_store}", *tiny]
    said = cli("pretrain", "pretrain/haxby_slice", *given, "--out", "pre", "--profile").stdout
    assert "backward" in said and "Mean of " in said and "trace: pre/trace.json.gz" in said
    assert Path("pre/trace.json.gz").is_file()
    for line in Path("pre/metrics.jsonl").read_text().splitlines():
        assert 0 <= json.loads(line)["stall"] <= 1
    tune = ["finetune", "finetune/haxby_slice", *given, "init_from=pre", "--out", "fine"]
    assert "trace:" not in cli(*tune).stdout
    done = cli(*tune, "--profile")
    assert "no profile, as no step was left to take" in done.stderr
    tune[-1] = "other"
    assert "optimizer" in cli(*tune, "--profile").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("embed", "gone", "--out", "e.npz"), "gone holds no exported model"),
        (("embed", "gone", "--out", "e.csv"), "name it .npz, not e.csv"),
        (("embed", "gone"), "nothing to write: give a file (.npz) or a folder"),
        (("list", "recipes", "--backbone", "swin4d"), "--backbone goes with `list heads`"),
        (("list", "heads", "--backbone", "swan"), "'swan' is neither a backbone nor a recipe"),
    ],
)
def test_commands_that_make_no_sense(cli: Run, arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(FmrizooError, match=re.escape(said)):
        cli(*arguments)


def test_folds_and_seeds_make_a_tree_and_one_row(
    cli: Run, sample_store: Path, tiny: list[str]
) -> None:
    store = f"data.store={sample_store}"
    more = [*tiny, "train.steps=1", "backbone.depths=[1,1]", "split.folds=2"]
    cli("pretrain", "pretrain/haxby_slice", store, *more, "--out", "pre", "--every-fold")
    assert sorted(p.name for p in Path("pre").iterdir()) == ["fold-0", "fold-1"]
    given = ["finetune/haxby_slice", store, *more, "init_from=pre", "--out", "fine"]
    table = cli("finetune", *given, "--every-fold", "--seeds", "2").stdout
    assert "2 × 2" in table and " 72 " in table
    found = sorted(str(p.parent) for p in Path("fine").rglob("results.json"))
    assert found == [f"fine/seed-{s}/fold-{f}" for s in (0, 1) for f in (0, 1)]
    for path in found:
        recipe = yaml.safe_load((Path(path) / "recipe.yaml").read_text())
        assert f"seed-{recipe['train']['seed']}/fold-{recipe['split']['fold']}" in path


def test_baselines_are_written_and_shown(cli: Run, sample_store: Path) -> None:
    given = [f"data.store={sample_store}", "data.clip_frames=4", "split.validation=0"]
    table = cli("baselines", "finetune/haxby_slice", *given, "--out", "base").stdout
    for name in ("Chance", "Voxels + logistic", "PCA whitening + logistic", "ROI means + logistic"):
        assert name in table
    assert "not applicable" in table, "4 frames are too few for connectivity"
    assert "95 %" in table and "…" in table
    assert len(list(Path("base").glob("*/results.json"))) == 7


def test_prepare_keeps_what_is_there_and_shows_what_it_skips(cli: Run, tmp_path: Path) -> None:
    shutil.copytree(sample_path() / "sub-001", tmp_path / "bids/sub-001")
    masks = "derivatives/masks"
    shutil.copytree(sample_path() / masks, tmp_path / "bids" / masks)
    for path in (tmp_path / "bids").rglob("*run-0[3-9]*"):
        path.unlink()
    (bad,) = (tmp_path / "bids").rglob("*acq-1slice_run-02_bold.nii.gz")
    bad.write_bytes(gzip.compress(b"[red]not[/] :x: an image"))
    given = ("prepare", "bids", "store", "prepare.space=native")
    done = cli(*given, "prepare.select.run=1")
    assert "store: 2 runs prepared, 0 kept, 0 skipped" in done.stdout
    done = cli("prepare", "bids", "other", "prepare.space=native", "--skip-bad")
    assert "other: 3 runs prepared, 0 kept, 1 skipped" in done.stdout
    assert "acq-1slice_run-02" in done.stdout and "NIfTI" in done.stdout
    again = cli("prepare", "bids", "other", "prepare.space=native", "--skip-bad")
    assert "other: 0 runs prepared, 3 kept, 1 skipped" in again.stdout
    with_recipe = cli("prepare", "bids", "third", "--recipe", "pretrain/haxby_slice",
                      "prepare.select.run=1", "prepare.codec=gzip")  # fmt: skip
    assert "2 runs prepared" in with_recipe.stdout
    assert Store(tmp_path / "third").runs[0].kind == "float16"


def test_lists(cli: Run) -> None:
    assert "swin4d" in cli("list", "backbones").stdout
    for kind, known in (
        ("backbones", fmrizoo.list_backbones()),
        ("objectives", fmrizoo.list_objectives()),
        ("heads", fmrizoo.list_heads()),
        ("recipes", fmrizoo.list_recipes()),
    ):
        rows = json.loads(cli("list", kind, "--json").stdout)
        assert [row["name"] for row in rows] == known and all(row["about"] for row in rows)
    some = json.loads(cli("list", "recipes", "finetune/*", "--json").stdout)
    assert [row["name"] for row in some] == fmrizoo.list_recipes("finetune/*")


def test_a_printed_recipe_is_the_recipe(cli: Run, tmp_path: Path) -> None:
    given = ["swin4d_simmim", "train.steps=7", "data.store=/a [b] :x:c"]
    expected = fmrizoo.load_recipe(given[0], given[1:])
    (tmp_path / "printed.yaml").write_text(cli("recipe", *given).stdout)
    assert fmrizoo.load_recipe("printed.yaml") == expected
    assert fmrizoo.load_recipe(json.loads(cli("recipe", *given, "--json").stdout)) == expected


def test_version_and_help(cli: Run) -> None:
    assert cli("--version").stdout == f"fmrizoo {fmrizoo.__version__}\n"
    text = cli("--help").stdout
    for command in ("prepare", "pretrain", "finetune", "evaluate", "report", "inspect", "list"):
        assert command in text
    cli("pretrain", "pretrain/haxby_slice", code=2)  # no --out


# --- bad input, through a real process ----------------------------------------------------------

SLICE = ("pretrain", "pretrain/haxby_slice")
TUNE = ("finetune", "finetune/haxby_slice")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("pretrain", "swin4d_simmin"),
            "unknown recipe 'swin4d_simmin'. Did you mean 'pretrain/sw",
        ),
        ((*SLICE, "train.step=3"), "unknown key 'train.step'. Did you mean 'steps'?"),
        ((*SLICE, "data.store=gone [x] :x:y"), "gone [x] :x:y is not a store"),
        (
            (*SLICE, "data.select.acquisition=25mm"),
            "the store's clips are 6×10×10×8 but the backbone is built for 40×20×1×8",
        ),
        (
            (*SLICE, "data.clip_frames=200", "backbone.img_size=[40,20,1,200]"),
            "has 121 frames, a clip spans 200",
        ),
        ((*TUNE, "task.kind=regression"), "trial_type='scissors' is not a number"),
        (
            (*TUNE, "task.target=trial_typ"),
            "no column 'trial_typ' (or nothing in it). Did",
        ),
    ],
)
def test_bad_recipes_and_data(
    arguments: tuple[str, ...], said: str, sample_store: Path, tiny: list[str], tmp_path: Path
) -> None:
    command, recipe, *rest = arguments
    given = [f"data.store={sample_store}", *tiny, *rest, "--out", "run"]
    message = refused(said, command, recipe, *given, cwd=tmp_path)
    assert message.count("\n") == 1, "one sentence, on one line"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*SLICE, "data.select={}"), "cannot share a batch: pick one kind with data.select"),
        ((*SLICE, "train.device=xpu"), "train.device=xpu but this PyTorch"),
        ((*SLICE, "train.batch_size=5", "train.accumulate=2"), "train.batch_size=5 cannot be div"),
        ((*SLICE, "split.folds=20"), "split.folds=20 needs at least as many units"),
        ((*SLICE, "split.file=gone.json"), "no split file gone.json"),
        ((*SLICE, "data.store="), "data.store: "),
        (("pretrain", "finetune/haxby_slice"), "a pretraining recipe needs an objective"),
        (("finetune", "pretrain/haxby_slice"), "a fine-tuning recipe needs a head"),
        ((*TUNE, "init_from=gone"), "gone holds no exported model"),
        (("baselines", "finetune/haxby_slice", "task.target=x"), "have no column 'x'"),
    ],
)
def test_more_bad_recipes(
    arguments: tuple[str, ...],
    said: str,
    sample_store: Path,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, through the entry point that the ``fmrizoo`` script calls."""
    command, recipe, *rest = arguments
    given = [command, recipe, f"data.store={sample_store}", *tiny, *rest, "--out", "run"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fmrizoo", *given])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and said in printed.err
    assert listing(tmp_path) == []


def test_a_file_that_is_no_nifti_leaves_no_store(tmp_path: Path) -> None:
    func = tmp_path / "bids/sub-01/func"
    func.mkdir(parents=True)
    (func / "sub-01_task-rest_bold.nii.gz").write_text("hello")
    message = refused(
        "sub-01_task-rest_bold.nii.gz is not a NIfTI file",
        "prepare", "bids", "store", "prepare.space=native", cwd=tmp_path,
    )  # fmt: skip
    assert "sub-01_task-rest: " in message
    assert not list((tmp_path / "store").rglob("*.h5"))
    assert not (tmp_path / "store/index.json").exists()


def test_a_flipped_bit_in_the_store(
    cli: Run, sample_store: Path, tiny: list[str], tmp_path: Path
) -> None:
    shutil.copytree(sample_store, tmp_path / "store")
    (file,) = (tmp_path / "store").glob("*.h5")
    run = "sub-001_task-objects_acq-1slice_run-01"
    with h5py.File(file) as opened:
        offset = opened[run]["bold"].id.get_offset()
        frames, row = opened[run]["bold"].shape
    file.chmod(0o644)
    with file.open("r+b") as raw:
        for frame in range(frames):
            raw.seek(offset + frame * row + 5)
            (byte,) = raw.read(1)
            raw.seek(offset + frame * row + 5)
            raw.write(bytes([byte ^ 1]))
    message = refused(run, *SLICE, "data.store=store", *tiny, "--out", "run", cwd=tmp_path)
    assert "frame" in message and str(file.name) in message and message.count("\n") == 1
    assert not (tmp_path / "run/model").exists()
    assert not [name for name in listing(tmp_path) if name.endswith((".part", ".tmp", ".partial"))]
    assert run in cli("inspect", "store", "--verify", code=1).stdout


def test_a_folder_that_cannot_be_written(
    sample_store: Path, tiny: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    given = [f"data.store={sample_store}", *tiny, "--out", "file/run"]
    refused("cannot write file/run/split.json", *SLICE, *given, cwd=tmp_path)
    assert listing(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "in the way"


def test_usage_errors_are_told_apart(tmp_path: Path) -> None:
    done = process("pretrian", cwd=tmp_path)
    assert done.returncode == 2 and "No such command" in done.stderr
    assert "Traceback" not in done.stderr
