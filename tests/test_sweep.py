"""Sweeps: many small trainings that are planned, resumed and compared; `mup transfer` on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fmrizoo.cli import app
from fmrizoo.config import Recipe
from fmrizoo.data.splits import make_split
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.mup.widths import at_width, widths_of
from fmrizoo.pipeline.sweep import FILE, Job, Outcome, part_of, prepared, run_jobs
from fmrizoo.pipeline.transfer import transfer
from fmrizoo.trainer.folder import read_metrics
from fmrizoo.zoo import load_recipe

TINY = [
    "backbone.embed_dim=8",
    "backbone.num_heads=[1,2]",
    "backbone.depths=[1,1]",
    "parametrization.base={embed_dim: 8, num_heads: [1, 2]}",
    "train.steps=4",
    "train.batch_size=4",
    "data.clip_stride=1.0",
    "sweep.widths=[8,16]",
    "sweep.rates=[0.002,0.008]",
    "sweep.seeds=1",
]


def tiny(store: Path, *more: str) -> Recipe:
    return load_recipe("mup/haxby_transfer", [f"data.store={store}", *TINY, *more])


def job(store: Path, name: str = "a", *more: str) -> Job:
    return Job(name, prepared(tiny(store, *more)))


# --- recipes at other widths ----------------------------------------------------------------------


def test_a_recipe_at_another_width_has_as_many_times_the_heads() -> None:
    recipe = load_recipe("mup/haxby_transfer")
    assert widths_of(recipe) == [16, 32, 64, 128]
    wide, plain = at_width(recipe, 64), at_width(recipe, 64, "sp")
    assert wide.backbone == plain.backbone
    assert (wide.backbone.embed_dim, wide.backbone.num_heads) == (64, [8, 16])
    assert wide.parametrization.base == {"embed_dim": 16, "num_heads": [2, 4]}
    assert (wide.parametrization.name, plain.parametrization.name) == ("mup", "sp")


def test_a_wider_recipe_with_the_heads_of_its_base_keeps_their_number() -> None:
    base = "parametrization.base={embed_dim: 96, num_heads: [6, 12, 24, 48]}"
    given = ["parametrization.name=mup", base]
    recipe = load_recipe("pretrain/sizes/swin4d_202M", given)
    for width in (96, 192, 384):
        scaled = at_width(recipe, width)
        assert (scaled.backbone.embed_dim, scaled.backbone.num_heads) == (width, [6, 12, 24, 48])


def test_a_base_depth_stays_what_it_is_at_every_width() -> None:
    base = "parametrization.base={embed_dim: 16, num_heads: [2, 4], depths: [1, 1]}"
    recipe = load_recipe("mup/haxby_transfer", ["parametrization.depth=completep", base])
    assert at_width(recipe, 64).parametrization.base["depths"] == [1, 1]


def test_without_a_base_the_recipes_own_width_is_it() -> None:
    recipe = load_recipe("pretrain/haxby_slice")
    assert widths_of(recipe) == [48, 96, 192, 384]
    assert at_width(recipe, 96).parametrization.base == {"embed_dim": 48, "num_heads": [4, 8]}
    with pytest.raises(RecipeError, match="72 is no multiple of the base width 48"):
        widths_of(replace(recipe, sweep=replace(recipe.sweep, widths=[96, 72])))


def test_what_follows_the_width_is_refused_under_sp_as_well() -> None:
    recipe = load_recipe("pretrain/haxby_neuromamba_simmim")
    for name in ("mup", "sp"):
        with pytest.raises(RecipeError, match="d_state"):
            at_width(recipe, 128, name)


def test_smaller_training_parts_are_part_of_larger_ones(sample_store: Path) -> None:
    store = Store(sample_store)
    config = load_recipe("pretrain/haxby_slice").split
    runs = store.select({"acquisition": "1slice"})
    whole = make_split(store, runs, config)
    cut = [make_split(store, runs, replace(config, train_units=k)) for k in (1, 2, 5)]
    assert [len(split.train) for split in cut] == [1, 2, 5] and len(whole.train) == 5
    assert set(cut[0].train) < set(cut[1].train) < set(cut[2].train)
    assert {(tuple(s.validation), tuple(s.test)) for s in (*cut, whole)} == {
        (tuple(whole.validation), tuple(whole.test))
    }
    with pytest.raises(DataError, match=r"train_units=6, but .* has 5 run\(s\)"):
        make_split(store, runs, replace(config, train_units=6))


# --- the engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.patience=1", "train.patience=1 ends or picks"),
        ("train.keep_best=true", "train.keep_best=True ends or picks"),
    ],
)
def test_what_ends_a_schedule_early_is_refused(override: str, said: str) -> None:
    recipe = load_recipe("pretrain/haxby_slice", [override, "train.validate_every=2"])
    with pytest.raises(RecipeError, match=said):
        prepared(recipe)
    with pytest.raises(RecipeError, match="needs an objective"):
        prepared(load_recipe("finetune/haxby_slice"))


def test_parts_make_up_the_whole_and_overlap_in_nothing() -> None:
    jobs = [Job(str(k), Recipe()) for k in range(7)]
    parts = [part_of(jobs, (k, 3)) for k in (1, 2, 3)]
    assert sorted(j.name for part in parts for j in part) == [j.name for j in jobs]
    with pytest.raises(RecipeError, match=r"part 4/3 is none of 1/3 to 3/3"):
        part_of(jobs, (4, 3))


def test_an_outcome_is_what_the_run_logged_and_is_not_trained_again(
    sample_store: Path, tmp_path: Path
) -> None:
    jobs = [job(sample_store), job(sample_store, "b", "train.lr=1e30", "train.clip_norm=0")]
    seen: list[tuple[int, int, str]] = []
    swept = run_jobs(jobs, tmp_path, on_done=lambda *said: seen.append(said))
    assert seen == [(1, 2, "a"), (2, 2, "b")] and not swept.interrupted
    rows = read_metrics(tmp_path / "a/metrics.jsonl")
    good, bad = swept.outcomes["a"], swept.outcomes["b"]
    assert good.train == rows[-1]["loss"] and good.steps == 4 == len(rows)
    assert good.validation == rows[-1]["validation"]["loss"]
    assert (bad.train, bad.validation) == (inf, inf) and "not finite" in bad.diverged
    # The numbers stay; what takes room goes.
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", FILE} <= left and not {"checkpoints", "model"} & left
    stamp = (tmp_path / "a/metrics.jsonl").stat().st_mtime_ns
    again = run_jobs(jobs, tmp_path, workers=2)
    assert again == swept and (tmp_path / "a/metrics.jsonl").stat().st_mtime_ns == stamp


def test_an_outcome_of_another_recipe_or_a_torn_one_is_refused(
    sample_store: Path, tmp_path: Path
) -> None:
    run_jobs([job(sample_store)], tmp_path, keep_models=True)
    assert (tmp_path / "a/model").is_dir()
    with pytest.raises(RecipeError, match="started under another recipe"):
        run_jobs([job(sample_store, "a", "train.lr=0.5")], tmp_path)
    (tmp_path / "a" / FILE).write_text('{"schema": "fmrizoo.outcome/1"}')
    with pytest.raises(RecipeError, match=r"outcome.json cannot be read .* delete"):
        run_jobs([job(sample_store)], tmp_path)


def test_two_jobs_of_one_name_are_refused(sample_store: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one name"):
        run_jobs([job(sample_store), job(sample_store)], tmp_path)


@pytest.mark.slow
def test_processes_side_by_side_find_what_one_finds(sample_store: Path, tmp_path: Path) -> None:
    jobs = [job(sample_store, name, f"train.seed={k}") for k, name in enumerate("ab")]
    alone, both = (run_jobs(jobs, tmp_path / str(n), workers=n) for n in (1, 2))
    for name in "ab":
        assert replace(alone.outcomes[name], seconds=0) == replace(both.outcomes[name], seconds=0)


def test_a_launchers_ranks_take_one_job_at_a_time(
    sample_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    jobs = [job(sample_store, name) for name in "ab"]
    with pytest.raises(RecipeError, match=r"--jobs 2 cannot be combined with a launcher's 2 ranks"):
        run_jobs(jobs, tmp_path, workers=2)


def test_an_outcome_without_validation_is_asked_for_in_vain() -> None:
    with pytest.raises(RecipeError, match=r"sweep\.loss=validation needs validation runs"):
        Outcome(1.0, None, 4, 1.0).loss("validation")
    assert Outcome(1.0, None, 4, 1.0).loss("train") == 1.0


# --- mup transfer ---------------------------------------------------------------------------------


def test_a_transfer_goes_on_beyond_the_edge_where_the_best_rate_is(
    sample_store: Path, tmp_path: Path
) -> None:
    result = transfer(tiny(sample_store), tmp_path, ["mup"])
    (found,) = result.transfers
    assert found.widths == (8, 16)
    for width in found.widths:
        curve = found.curve(width)
        assert found.optimum(width).rate in curve and len(curve) >= 3
        # Four steps are few: higher rates are better, until they are not.
        assert not found.optimum(width).edge
    assert result.trained == len(found.trials) and found.optimum(8).rate in found.curve(16)


def test_parts_of_a_transfer_train_its_first_rates_and_the_last_call_the_rest(
    sample_store: Path, tmp_path: Path
) -> None:
    recipe = tiny(sample_store)
    first = transfer(recipe, tmp_path, ["sp"], part=(1, 2))
    second = transfer(recipe, tmp_path, ["sp"], part=(2, 2))
    assert first.transfers == () and first.trained == second.trained == 2
    before = set(tmp_path.rglob(FILE))
    whole = transfer(recipe, tmp_path, ["sp"])
    assert len(before) == 4 and before <= set(tmp_path.rglob(FILE)) and whole.transfers


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("sweep.widths=[8]", "two widths or more"),
        ("sweep.rates=[0.1]", "two rates or more"),
        ("data.store=nowhere", "nowhere"),
        ("backbone.img_size=[8,8,1,8]", "img_size"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    sample_store: Path, tmp_path: Path, more: str, said: str
) -> None:
    with pytest.raises((RecipeError, DataError), match=said):
        transfer(tiny(sample_store, more), tmp_path)
    assert not list(tmp_path.rglob(FILE))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("widths", "[0]", "sweep.widths needs numbers ≥ 1"),
        ("widths", "[8,8]", "sweep.widths has a value twice"),
        ("rates", "[0.1,-1]", "sweep.rates needs positive numbers"),
        ("units", "[]", "sweep.units is empty"),
        ("seeds", "0", "sweep.seeds must be ≥ 1"),
        ("loss", "test", "sweep.loss='test' is not known"),
        ("variants", "{../x: []}", "becomes a folder"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(key: str, value: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("mup/haxby_transfer", [f"sweep.{key}={value}"])


def test_the_command_prints_a_table_and_writes_files(sample_store: Path, tmp_path: Path) -> None:
    given = ["mup/haxby_transfer", f"data.store={sample_store}", *TINY, "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["mup", "transfer", *given], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for words in ("best rate", "regret", "octaves per doubling", "minutes of training"):
        assert words in done.output
    names = {path.name for path in tmp_path.glob("transfer.*")}
    assert names == {"transfer.json", "transfer.csv", "transfer.svg", "transfer.png"}
    plain = json.loads((tmp_path / "transfer.json").read_text())
    assert [each["name"] for each in plain["transfers"]] == ["sp", "mup"]


@pytest.mark.parametrize("bad", ["3/2", "1", "a/b", "0/2"])
def test_a_part_that_does_not_exist_is_refused(tmp_path: Path, bad: str) -> None:
    given = ["mup", "transfer", "mup/haxby_transfer", "--out", str(tmp_path), "--part", bad]
    done = CliRunner().invoke(app, given)
    assert isinstance(done.exception, RecipeError) and bad in str(done.exception)


@pytest.mark.slow
def test_a_terminated_sweep_goes_on_to_the_numbers_it_would_have_had(
    sample_store: Path, tmp_path: Path
) -> None:
    words = [*TINY, "train.steps=30", "train.batch_size=8", "sweep.rates=[0.004,0.008]"]
    command = [
        *(sys.executable, "-m", "fmrizoo", "mup", "transfer", "mup/haxby_transfer"),
        *(f"data.store={sample_store}", *words, "--only", "mup", "--jobs", "2"),
        *("--out", str(tmp_path / "run")),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "run"
    wait_for(
        lambda: (
            any(len(read_metrics(p)) > 3 for p in folder.rglob("metrics.jsonl"))
            or process.poll() is not None
        )
    )
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and "run the same command to go on" in said, said
    assert list((tmp_path / "run").rglob("checkpoints/step-*")) or list(
        (tmp_path / "run").rglob(FILE)
    )
    recipe = load_recipe("mup/haxby_transfer", [f"data.store={sample_store}", *words])
    resumed = transfer(recipe, tmp_path / "run", ["mup"])
    whole = transfer(recipe, tmp_path / "whole", ["mup"])
    assert resumed.transfers == whole.transfers


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(sample_store: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "fmrizoo", "mup", "transfer", "mup/haxby_transfer"),
        *(f"data.store={sample_store}", *TINY, "train.steps=4000"),
        *("--only", "mup", "--jobs", "2", "--out", str(tmp_path)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(tmp_path.rglob("metrics.jsonl"))) == 2 or process.poll() is not None)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Both save where they stand and write nothing more.
    wait_for(lambda: len(list(tmp_path.rglob("checkpoints/step-*/manifest.json"))) == 2)
    rows = [len(read_metrics(path)) for path in sorted(tmp_path.rglob("metrics.jsonl"))]
    assert all(0 < count < 4000 for count in rows)
    time.sleep(3)
    assert rows == [len(read_metrics(path)) for path in sorted(tmp_path.rglob("metrics.jsonl"))]


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    """Until ``happened()``; the time is the patience of a busy machine, nothing is measured."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)
