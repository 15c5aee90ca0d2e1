"""Real ranks of a tiny training: what is started, what its logs say, and logs of elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from fmrizoo.cli import app
from fmrizoo.cluster.scaling import rows_of
from fmrizoo.cluster.scaling_logs import read_logs, read_run
from fmrizoo.errors import CheckpointError, DataError, FmrizooError, RecipeError, TrainingError
from fmrizoo.pipeline.random_clips import RandomClips
from fmrizoo.pipeline.throughput import Bench, bench_scaling
from fmrizoo.trainer.folder import read_metrics
from fmrizoo.types import Grid
from fmrizoo.zoo import load_recipe

SETTINGS = ["backbone.embed_dim=8", "backbone.num_heads=[1,2]", "train.batch_size=4"]


@dataclass
class Measured:
    folder: Path
    said: str
    logs: str


@pytest.fixture(scope="module")
def measured(sample_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """One call: the sample's store, 1 and 2 ranks, one round."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    words = ["bench", "scaling", "pretrain/haxby_slice", f"data.store={sample_store}", *SETTINGS]
    words += ["--ranks", "1,2", "--steps", "4", "--warmup", "1", "--rounds", "1"]
    done = CliRunner().invoke(app, [*words, "--out", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return Measured(folder, done.output, str(folder / "runs/*/*"))


def copied(measured: Measured, to: Path) -> Path:
    """The run folders of both sizes, to be broken."""
    for ranks in (1, 2):
        shutil.copytree(measured.folder / f"runs/ranks-{ranks}/round-1", to / f"r{ranks}")
    return to


def change(path: Path, edit: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(
        path.read_text()
    )  # fmt: skip
    edit(values)
    text = json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values)
    path.write_text(text)


def test_every_rank_trains_and_nothing_is_saved(measured: Measured) -> None:
    for ranks in (1, 2):
        run = measured.folder / f"runs/ranks-{ranks}/round-1"
        env = json.loads((run / "env.json").read_text())
        assert (env["world_size"], env["nodes"], env["threads"]) == (ranks, 1, _threads())
        assert env["cores"] == len(os.sched_getaffinity(0))
        rows = read_metrics(run / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
        assert [row["clips"] for row in rows] == [4, 8, 12, 16, 20]
        assert not (run / "checkpoints").exists() and not (run / "model").exists()
    # One global batch: the same clips in both, so the same losses.
    one, two = (
        [row["loss"] for row in read_metrics(measured.folder / f"runs/ranks-{n}/round-1/{M}")]
        for n in (1, 2)
    )
    assert two == pytest.approx(one, rel=1e-4)


M = "metrics.jsonl"


def _threads() -> int:
    given = os.environ.get("OMP_NUM_THREADS")
    return int(given) if given else max(1, len(os.sched_getaffinity(0)) // 2)


def test_the_table_is_what_the_metrics_say(measured: Measured) -> None:
    told = json.loads((measured.folder / "scaling.json").read_text())
    (series,) = told["series"]
    assert (series["unit"], series["mode"]) == ("ranks", "strong")
    assert any("the recipe's store" in note for note in series["notes"])
    rates = []
    for row, ranks in zip(series["rows"], (1, 2), strict=True):
        rows = read_metrics(measured.folder / f"runs/ranks-{ranks}/round-1/{M}")[1:]
        rates.append(median(r["clips_per_second"] for r in rows))
        assert row["rate"] == pytest.approx(rates[-1])
        assert row["seconds_per_step"] == pytest.approx(4 / rates[-1])
        waited = sum(r["stall"] / r["clips_per_second"] for r in rows)
        total = sum(1 / r["clips_per_second"] for r in rows)
        assert row["stall"] == pytest.approx(waited / total)
    found = series["rows"][1]["efficiency"]["1"]
    assert found["value"] == pytest.approx(rates[1] / rates[0] / 2)
    assert f"{found['value']:.1%}" in measured.said
    crowded = 2 * _threads() > len(os.sched_getaffinity(0))
    assert series["rows"][1]["oversubscribed"] == crowded
    assert ("2*" in measured.said) == crowded


def test_logs_of_the_runs_give_the_same_medians(measured: Measured) -> None:
    found = read_logs(measured.logs, warmup=1)
    told = json.loads((measured.folder / "scaling.json").read_text())["series"][0]["rows"]
    assert found.unit == "ranks" and found.sizes == [1, 2]
    assert [p.rate for p in found.points] == pytest.approx([row["rate"] for row in told])
    for point in found.points:  # two halves of four steps
        assert point.low is not None and point.high is not None
        assert point.low <= point.rate <= point.high
    assert rows_of(found)[1].efficiency[1] is not None


def test_logs_of_several_nodes(measured: Measured, tmp_path: Path) -> None:
    """As if both ranks had been nodes of their own, and an older version had written one."""
    root = copied(measured, tmp_path)
    change(root / "r2/env.json", lambda env: env.update(nodes=2))
    found = read_logs(str(root / "*"), warmup=1)
    assert (found.unit, found.sizes) == ("nodes", [1, 2])
    change(root / "r2/env.json", lambda env: env.pop("nodes"))
    with pytest.raises(DataError, match=r"does not say on how many nodes.*--ranks-per-node"):
        read_logs(str(root / "*"), warmup=1)
    assert read_logs(str(root / "*"), warmup=1, ranks_per_node=1).sizes == [1, 2]
    assert read_run(root / "r2", 1, ranks_per_node=2).nodes == 1


@pytest.mark.parametrize(
    ("file", "edit", "mode", "said"),
    [
        ("recipe.yaml", lambda r: r["backbone"].update(embed_dim=16), "strong",
         "cannot be compared: backbone.embed_dim is 8 in one and 16 in the other"),
        ("recipe.yaml", lambda r: r["train"].update(precision="bf16"), "strong",
         "train.precision is fp32 in one and bf16 in the other"),
        ("recipe.yaml", lambda r: r["train"].update(batch_size=8), "strong",
         "batch_size is 4 in one and 8 in the other (equal per rank: --mode weak)"),
        ("recipe.yaml", lambda r: r["train"].update(batch_size=6), "strong",
         "batch_size is 4 in one and 6 in the other (strong scaling divides one batch)"),
        ("recipe.yaml", lambda r: None, "weak",
         "needs one batch per rank, got 4 clips on 1 ranks and 4 clips on 2 ranks"),
        ("env.json", lambda e: e.update(device="cuda:1"), "strong",
         "one ran on cpu, the other on cuda"),
        ("env.json", lambda e: e.update(world_size="two"), "strong",
         "world_size should be a whole number ≥ 1, got 'two'"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(
    measured: Measured, tmp_path: Path, file: str, edit: Any, mode: str, said: str
) -> None:
    root = copied(measured, tmp_path)
    change(root / "r2" / file, edit)
    with pytest.raises(DataError) as caught:
        read_logs(str(root / "*"), mode=mode, warmup=1)
    assert said in str(caught.value) and str(root / "r2") in str(caught.value)


def test_settings_that_leave_the_speed_alone_may_differ(measured: Measured, tmp_path: Path) -> None:
    root = copied(measured, tmp_path)
    other = {"lr": 0.5, "seed": 9, "steps": 99, "accumulate": 2, "log_every": 3}
    change(root / "r2/recipe.yaml", lambda r: r["train"].update(other))
    assert read_logs(str(root / "*"), warmup=1).sizes == [1, 2]
    change(root / "r2/recipe.yaml", lambda r: r["train"].update(batch_size=8))
    assert read_logs(str(root / "*"), mode="weak", warmup=1).mode == "weak"


def test_repeated_runs_are_rounds(measured: Measured, tmp_path: Path) -> None:
    root = copied(measured, tmp_path)
    shutil.copytree(root / "r2", root / "r2-again")
    path = root / "r2-again" / M
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    slower = [{**row, "clips_per_second": row["clips_per_second"] / 2} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in slower))
    point = read_logs(str(root / "*"), warmup=1).points[1]
    first = read_run(root / "r2", 1).rate
    assert point.high == pytest.approx(first) and point.low == pytest.approx(first / 2)
    assert point.rate == pytest.approx(0.75 * first)


def test_broken_folders(
    measured: Measured, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = copied(measured, tmp_path)
    metrics = root / "r2" / M
    whole = metrics.read_text()
    metrics.write_text(whole.splitlines()[0] + "\n")
    with pytest.raises(DataError, match=r"holds 1 step, and 1 of warm-up are left out"):
        read_logs(str(root / "*"), warmup=1)
    metrics.write_text("")
    with pytest.raises(DataError, match=r"holds 0 steps"):
        read_logs(str(root / "*"), warmup=1)
    metrics.write_text(whole.replace('"clips_per_second": ', '"clips_per_second": -'))
    with pytest.raises(DataError, match=r"step 2: clips_per_second is not a number > 0"):
        read_logs(str(root / "*"), warmup=1)
    metrics.write_text("no json\n" + whole)
    with pytest.raises(CheckpointError, match="line 1 is not a metrics row"):
        read_logs(str(root / "*"), warmup=1)
    metrics.write_text(whole)
    (root / "r2/env.json").write_text("{")
    with pytest.raises(DataError, match=r"env\.json cannot be read"):
        read_logs(str(root / "*"), warmup=1)
    (root / "r2/env.json").unlink()
    with pytest.raises(DataError, match=r"env\.json is missing"):
        read_logs(str(root / "*"), warmup=1)
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=r"none of its 1 matches holds a metrics\.jsonl"):
        read_logs(str(root / "empty"))
    shutil.rmtree(root / "r2")
    assert read_logs(str(root / "*"), warmup=1).sizes == [1]
    assert "empty is no run folder" in caplog.text


def test_a_rank_that_fails_says_why(tmp_path: Path) -> None:
    # Seen only where the device is opened: in the rank.
    recipe = load_recipe("pretrain/haxby_slice", [*SETTINGS, "train.device=xpu"])
    bench = Bench(recipe, (1,), steps=2, warmup=0, rounds=1, synthetic=True)
    with pytest.raises(TrainingError) as caught:
        bench_scaling(bench, tmp_path)
    said = str(caught.value)
    assert said.startswith("rank 0 of 1 ended with code 1: train.device=xpu but this PyTorch")
    assert str(tmp_path / "runs/ranks-1/round-1/rank-0.log") in said


def test_a_launcher_above_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    bench = Bench(load_recipe("pretrain/haxby_slice", SETTINGS), (1, 2), synthetic=True)
    with pytest.raises(RecipeError, match="a launcher has started 2 of it"):
        bench_scaling(bench, tmp_path)


def test_weak_scaling_keeps_the_batch_of_a_rank() -> None:
    recipe = load_recipe("pretrain/haxby_slice", SETTINGS)
    weak = Bench(recipe, (2, 4, 6), mode="weak")
    assert [weak.at(n).train.batch_size for n in (2, 4, 6)] == [4, 8, 12]
    strong = Bench(recipe, (1, 2, 4))
    assert {strong.at(n).train.batch_size for n in (1, 2, 4)} == {4}
    assert strong.at(1).train.steps == strong.steps + strong.warmup
    with pytest.raises(FmrizooError, match="3 ranks, strong scaling"):
        Bench(recipe, (1, 3))


def test_random_clips_are_of_the_recipes_size_and_the_same_again() -> None:
    grid = Grid(6, 5, 4, 3)
    stream = RandomClips(grid, 2, seed=1)
    again = RandomClips(grid, 2, seed=1).batches(start=1)
    batches = stream.batches()
    first, second = (next(batches).to_batch(torch.device("cpu")) for _ in range(2))
    assert first.bold.shape == (2, 1, 6, 5, 4, 3) and first.mask.shape == (2, 6, 5, 4)
    outside = first.bold[:, 0][~first.mask]
    assert (outside == -2).all() and 0.5 < float(first.bold[:, 0][first.mask].std()) < 1.5
    assert not torch.equal(first.bold[0], first.bold[1])
    assert not torch.equal(first.bold, second.bold)
    assert torch.equal(next(again).to_batch(torch.device("cpu")).bold, second.bold)
