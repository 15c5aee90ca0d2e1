"""An ablation from the command to the table, on the sample, in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fmrizoo.pipeline.ablation.chains as engine
from fmrizoo.cli import app
from fmrizoo.data.splits import Split
from fmrizoo.errors import INTERRUPTED, DivergedError
from fmrizoo.pipeline.ablation import ablate, plan
from fmrizoo.pipeline.ablation.run import Planned, missing
from fmrizoo.trainer.export import read_info

SMALL = [
    "backbone.embed_dim=8",
    "backbone.num_heads=[1,2]",
    "backbone.depths=[1,1]",
    "train.steps=3",
    "train.batch_size=4",
    "data.clip_stride=1.0",
    "ablate.axes.MR=[0.9]",
    "ablate.seeds=1",
    "ablate.controls=[frozen random]",
    "ablate.baselines=false",
    "ablate.tasks.objects={recipe: finetune/haxby_slice, "
    "overrides: [split.folds=2, train.steps=3, train.validate_every=3]}",
]


def small(store: Path, *more: str) -> Planned:
    return plan("pretrain/haxby_slice", [f"data.store={store}", *SMALL, *more])


def test_everything_is_trained_once_tested_once_and_never_seen_before(
    sample_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = small(sample_store)
    seen: list[str] = []
    found = ablate(planned, tmp_path, on_done=lambda d, n, name: seen.append(name))
    assert found is not None and len(seen) == len(planned.chains) == 2 * 2 + 1
    table = found.table
    assert [line.name for line in table.lines] == ["reference", "MR 0.9", "swin4d frozen random"]
    assert {row.n_units for line in table.lines for row in line.rows.values()} == {72}
    assert {line.standing["all"].rank for line in table.of("cell")} <= {1, 2}
    for chain in planned.chains:
        for tuning in chain.tunings:
            split = Split.load(tmp_path / tuning.folder / "split.json")
            if chain.pretraining is not None:
                info = read_info(tmp_path / chain.name / "model")
                assert not set(info.seen_runs) & set(split.test)
            # Only the pretrained models stay.
            assert not (tmp_path / tuning.folder / "model").exists()

    # The same call trains nothing and finds the same.
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr(engine, "pretrain", never)
    monkeypatch.setattr(engine, "finetune", never)
    again = ablate(planned, tmp_path)
    assert again is not None
    assert again.table.lines[0].rows["objects"].results == table.lines[0].rows["objects"].results


@pytest.mark.slow
def test_parts_make_the_table_together(sample_store: Path, tmp_path: Path) -> None:
    planned = small(sample_store)
    assert ablate(planned, tmp_path, part=(1, 2)) is None
    assert 0 < len(missing(planned, tmp_path)) < sum(len(c.tunings) for c in planned.chains)
    assert ablate(planned, tmp_path, part=(2, 2)) is not None
    body = json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))
    assert body["rows"][0]["name"] == "reference"


@pytest.mark.slow
def test_a_part_that_was_stopped_says_go_on_and_one_that_is_done_does_not(
    sample_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["ablate", "pretrain/haxby_slice", f"data.store={sample_store}", *SMALL]
    command = [*words, "ablate.controls=[]", "--out", str(tmp_path)]
    assert ablate(small(sample_store, "ablate.controls=[]"), tmp_path, part=(1, 2)) is None
    # As a signal leaves it: nothing more is trained.
    monkeypatch.setattr("fmrizoo.pipeline.ablation.ablate", lambda *_, **__: None)
    done = CliRunner().invoke(app, [*command, "--part", "1/2"])
    assert done.exit_code == 0 and "part 1/2 is done" in done.output
    for part in (["--part", "2/2"], []):
        stopped = CliRunner().invoke(app, [*command, *part])
        assert stopped.exit_code == INTERRUPTED and "run the same command" in stopped.output


def test_a_pretraining_that_diverges_is_a_gap(
    sample_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.pretrain

    def diverging(recipe: object, out: Path) -> object:
        if "MR-0.9" in str(out):
            raise DivergedError("the loss is NaN at step 2")
        return real(recipe, out)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "pretrain", diverging)
    found = ablate(small(sample_store, "ablate.controls=[]"), tmp_path)
    assert found is not None
    reference, other = found.table.lines
    assert other.gaps == {"objects": "0 of 2 results; 2 diverged"}
    assert other.standing["all"].rank is None and reference.standing["all"].rank == 1


def test_the_command_plans_and_refuses(sample_store: Path, tmp_path: Path) -> None:
    command = ["ablate", "pretrain/haxby_slice", f"data.store={sample_store}", *SMALL]
    shown = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "a"), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "4 pretrainings and 6 fine-tunings" in shown.output and "MR 0.9" in shown.output
    assert not (tmp_path / "a").exists()
    bad = CliRunner().invoke(app, [*command, "ablate.axes.MX=[1]", "--out", str(tmp_path / "a")])
    assert bad.exit_code == 1 and "ablate.axes.MX is no axis" in str(bad.exception)
    part = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "a"), "--part", "3/2"])
    assert "--part takes K/N" in str(part.exception)
    assert not (tmp_path / "a").exists()
