"""Checkpoints go from any number of ranks and ZeRO stage to any other, with equal losses."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_tiny import ALONE, TinyStream, clips, inputs, on_ranks, rows, scaled, timeless

from fmrizoo.errors import CheckpointError
from fmrizoo.trainer import engine as engines
from fmrizoo.trainer.device import World, init_distributed
from fmrizoo.trainer.engine import Engine
from fmrizoo.trainer.export import read_model
from fmrizoo.trainer.fragments import WEIGHT, Fragment
from fmrizoo.trainer.loop import train
from fmrizoo.trainer.sharded import INDEX, Sharded, index_of, shard_name, take, write_shard

STAGES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
# Stage that wrote → stage that goes on, with other ranks: every stage is on both sides, both ways.
NEXT = {
    "1to2": {("fp32", 0): 3, ("fp32", 3): 1, ("fp32", 1): 2, ("fp32", 2): 0}
    | {("bf16", 1): 3, ("bf16", 3): 2, ("bf16", 2): 1},
    "2to1": {("fp32", 0): 2, ("fp32", 2): 3, ("fp32", 3): 0, ("fp32", 1): 1}
    | {("bf16", 1): 2, ("bf16", 2): 3, ("bf16", 3): 1},
}
CHANGES = [(way, *key, stage) for way, each in NEXT.items() for key, stage in each.items()]


class DyingStream(TinyStream):
    """Four micro-batches, two steps, then an error from the reader."""

    def batches(self, start: int = 0) -> Iterator[Any]:
        yield from islice(super().batches(start), 4)
        raise ConnectionError("the reader died")


def cut_short(root: Path, world: World) -> None:
    """Runs of all stages that die after their second step, where they saved."""
    for stage, precision in STAGES:
        same = {"zero_stage": stage, "precision": precision, "save_every": 2}
        given = inputs(root / f"{stage}-{precision}", world=world, **same)
        try:
            train(replace(given, model=scaled(), loader_for=DyingStream))
        except ConnectionError:
            continue
        raise AssertionError("it did not die")


def gone_on(root: Path, copies: Path, world: World) -> list[int | None]:
    """Every checkpoint in ``root``, resumed in another stage; where each started."""
    started = []
    for (precision, stage), then in NEXT[copies.name].items():
        out = copies / f"{stage}-{precision}"
        if world.main:
            shutil.copytree(root / f"{stage}-{precision}", out)
        changed = {"zero_stage": then, "precision": precision, "accumulate": 1, "save_every": 2}
        given = inputs(out, world=world, **changed)
        started.append(train(replace(given, model=scaled())).resumed_from)
    return started


def by_ranks(world: World, root: str, of_one: str, copies: str) -> list[int | None]:
    cut_short(Path(root), world)
    return gone_on(Path(of_one), Path(copies), world)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole-*``; ``one`` and ``two`` ranks' dying runs; ``1to2`` and ``2to1`` resumed."""
    root = tmp_path_factory.mktemp("universal")
    for precision in ("fp32", "bf16"):
        given = inputs(root / f"whole-{precision}", precision=precision)
        train(replace(given, model=scaled()))
    cut_short(root / "one", ALONE)
    args = (str(root / "two"), str(root / "one"), str(root / "1to2"))
    for started in on_ranks(root / "ranks", by_ranks, *args):
        assert started == [2] * len(NEXT["1to2"])
    assert gone_on(root / "two", root / "2to1", ALONE) == [2] * len(NEXT["2to1"])
    return root


@pytest.mark.parametrize(("way", "precision", "stage", "then"), CHANGES)
def test_resume_elsewhere(runs: Path, way: str, precision: str, stage: int, then: int) -> None:
    out = runs / way / f"{stage}-{precision}"
    assert f"zero_stage: {then}" in (out / "recipe.yaml").read_text()
    got, want = rows(out), rows(runs / f"whole-{precision}")
    assert [row["step"] for row in got] == [1, 2, 3, 4, 5, 6]
    close = 1e-6 if precision == "fp32" else 0.01
    for row, whole in zip(got, want, strict=True):
        assert row["loss"] == pytest.approx(whole["loss"], abs=close)
        assert row["lr"] == whole["lr"]
    weights, _ = read_model(out / "model")
    wanted, _ = read_model(runs / f"whole-{precision}" / "model")
    assert weights.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(weights[name], wanted[name], atol=close, rtol=0)


def test_moments_matter(runs: Path, tmp_path: Path) -> None:
    """The equality above is not vacuous: without Adam's moments the losses are others."""
    shutil.copytree(runs / "one" / "1-fp32", tmp_path / "run")
    given = replace(inputs(tmp_path / "run", save_every=2), model=scaled())
    begin = Engine.restore

    def forgetful(engine: Engine, stored: Sharded, told: Any = None) -> None:
        begin(engine, stored, told)
        engine.fragments.begin(stored.steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "restore", forgetful)
        train(given)
    want = [row["loss"] for row in rows(runs / "whole-fp32")]
    got = [row["loss"] for row in rows(tmp_path / "run")]
    assert got[:3] == pytest.approx(want[:3], abs=1e-6)
    assert abs(got[-1] - want[-1]) > 1e-4


def test_same_ranks_resume_to_the_bit(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one" / "3-fp32", tmp_path / "run")
    same = {"zero_stage": 3, "save_every": 2}
    train(replace(inputs(tmp_path / "run", **same), model=scaled()))
    train(replace(inputs(tmp_path / "whole", **same), model=scaled()))
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


def test_another_number_of_ranks_is_said(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(runs / "two" / "2-fp32", tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        train(replace(inputs(tmp_path / "run", zero_stage=2, save_every=2), model=scaled()))
    assert "1 ranks go on with what 2 wrote: same clips and weights" in caplog.text


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_every_element_is_written_once(runs: Path, stage: int, precision: str) -> None:
    """Two ranks' shards hold a whole model, which is what one rank wrote."""
    one = Sharded(runs / "one" / f"{stage}-{precision}" / "checkpoints" / "step-000002")
    two = Sharded(runs / "two" / f"{stage}-{precision}" / "checkpoints" / "step-000002")
    assert (one.ranks, two.ranks, one.steps, two.steps) == (1, 2, 2, 2)
    assert one.tensors.keys() == two.tensors.keys() == scaled().state_dict().keys()
    held = 0
    for name in one.tensors:
        assert one.kinds(name) == two.kinds(name)
        for kind in one.kinds(name):
            close = 1e-6 if precision == "fp32" else 0.01
            torch.testing.assert_close(
                one.whole(name, kind), two.whole(name, kind), atol=close, rtol=0
            )
            held += 1
    trained = [name for name, p in scaled().named_parameters() if p.requires_grad]
    assert held == len(one.tensors) + 2 * len(trained)
    one.close()
    two.close()
    sizes = [f.stat().st_size for f in sorted(two.folder.glob("shard-*"))]
    assert len(sizes) == 2 and (stage == 0 or max(sizes) < 2 * min(sizes))


def engine() -> Engine:
    init_distributed(ALONE, torch.device("cpu"))
    given = inputs(Path("unused"))
    return Engine(scaled(), given.recipe.train, ALONE, torch.device("cpu"))


def test_checkpoints_of_earlier_versions_are_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds no tensors.json: it was written by an earlier"
    ):
        Sharded(tmp_path)
    made = engine()
    with (
        Sharded(runs / "one" / "1-fp32" / "checkpoints" / "step-000002") as stored,
        pytest.raises(CheckpointError, match=r"does not fit this model: it holds no x \(and 13 mo"),
    ):
        stored.check_model({"x": (1,)})
    made.close()


def test_gaps_and_overlaps_are_not_published() -> None:
    made = engine()
    places = take(made.fragments.written()).places
    made.close()
    assert index_of({0: places}, 3)["optimizer_steps"] == 3
    name = "backbone.hidden.weight"
    whole = places[name]
    for start, numel, said in (
        (0, 71, f"the ranks hold 71 elements of {name}, which has 72"),
        (1, 71, f"elements 0 to 0 of {name} are held by no rank"),
    ):
        with pytest.raises(CheckpointError, match=said):
            index_of({0: {name: {**whole, "start": start, "numel": numel}}}, 3)
    with pytest.raises(CheckpointError, match="by two ranks"):
        index_of({0: {name: whole}, 1: {name: whole}}, 3)
    with pytest.raises(CheckpointError, match="do not agree on what"):
        index_of({0: {name: whole}, 1: {name: {**whole, "trained": False}}}, 3)


def keeping_small_ones_whole(world: World, root: str) -> list[int]:
    """ZeRO 3 with parameters that every rank keeps whole; how many each engine had."""
    configured, made, kept = engines.deepspeed_config, Engine.__init__, []

    def larger(*args: Any) -> dict[str, Any]:
        config = configured(*args)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 20
        return config

    def noting(self: Engine, *args: Any) -> None:
        made(self, *args)
        kept.append(len(self._engine.optimizer.persistent_parameters))

    same = {"zero_stage": 3, "ema": 0.9, "validate_every": 2, "save_every": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "deepspeed_config", larger)
        patch.setattr(Engine, "__init__", noting)
        for name, stream in (("whole", TinyStream), ("cut", DyingStream), ("cut", TinyStream)):
            given = inputs(Path(root, name), world=world, **same)
            with suppress(ConnectionError):
                train(replace(given, model=scaled(), loader_for=stream, validate=decoded))
    return kept


def decoded(model: torch.nn.Module, device: torch.device) -> dict[str, float]:
    loss, _ = model(clips(1000, 4))
    return {"loss": float(loss)}


def test_parameters_that_stay_whole_at_stage_3(runs: Path, tmp_path: Path) -> None:
    """Resume and running means reach them too."""
    for kept in on_ranks(tmp_path / "ranks", keeping_small_ones_whole, str(tmp_path)):
        assert len(kept) == 3 and min(kept) > 3
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    plain = rows(runs / "whole-fp32")
    for row, want in zip(rows(tmp_path / "whole"), plain, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], abs=1e-6)
    given = inputs(tmp_path / "one", zero_stage=1, ema=0.9, validate_every=2)
    train(replace(given, model=scaled(), validate=decoded))
    whole, alone = (rows(tmp_path / name)[-1]["validation"]["loss"] for name in ("whole", "one"))
    assert whole == pytest.approx(alone, abs=1e-6)
    model, _ = read_model(tmp_path / "whole" / "model")
    want, _ = read_model(tmp_path / "one" / "model")
    for name, value in want.items():
        torch.testing.assert_close(model[name], value, atol=1e-6, rtol=0)


def test_last_part_larger_than_the_others(tmp_path: Path) -> None:
    """ZeRO 1 may cut a tensor at the end of a small first part: no parts of equal size."""
    values = torch.arange(12.0)
    pieces = {0: (0, 3), 1: (3, 9)}
    places = {}
    for rank, (start, numel) in pieces.items():
        part = Fragment("w", (12,), start, numel, True, {WEIGHT: values[start:][:numel]})
        snapshot = take([part])
        write_shard(tmp_path / shard_name(rank), snapshot)
        places[rank] = snapshot.places
    (tmp_path / INDEX).write_text(json.dumps(index_of(places, 1)))
    with Sharded(tmp_path) as stored:
        assert torch.equal(stored.whole("w"), values)
        assert torch.equal(stored.read("w", WEIGHT, 2, 4), values[2:6])
