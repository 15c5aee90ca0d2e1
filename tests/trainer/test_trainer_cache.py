"""Cached features: the same training, without the encoder."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_tiny import WIDTH, Encoder, Job, job
from trainer_tiny import ALONE, rows, timeless

from fmrizoo import pipeline
from fmrizoo.data.reader import RunReader
from fmrizoo.errors import CheckpointError, CorruptStoreError, RecipeError, TrainingError
from fmrizoo.trainer.cache import CachedStream, FeatureCache
from fmrizoo.trainer.device import World, init_distributed, rng_state
from fmrizoo.trainer.export import read_model
from fmrizoo.trainer.loop import StepEvent, train
from fmrizoo.trainer.ranks import Ranks
from fmrizoo.trainer.shards import Shard
from fmrizoo.zoo import load_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sample(sample_store: Path) -> Job:
    return job(sample_store)


def built(sample: Job, out: Path, dtype: torch.dtype = torch.float32) -> FeatureCache:
    init_distributed(ALONE, CPU)
    cache = FeatureCache(sample.model(), sample.recipe, out, sample.tables, sample.tasks)
    assert cache.build(CPU, dtype, Ranks(ALONE, CPU))
    return cache


def same_numbers(a: Path, b: Path, rel: float) -> None:
    """Losses, validations and weights of two runs."""
    for x, y in zip(timeless(a), timeless(b), strict=True):
        assert x.pop("validation", {}) == pytest.approx(y.pop("validation", {}), rel=rel)
        assert x == pytest.approx(y, rel=rel)
    one, two = (read_model(p / "model")[0] for p in (a, b))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=rel, atol=rel)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_equals_the_uncached_run(sample: Job, tmp_path: Path, stage: int) -> None:
    """Order, seeds, targets, draws of the head's dropout: only rounding may differ."""
    train(sample.inputs(tmp_path / "plain", cached=False, zero_stage=stage))
    given = sample.inputs(tmp_path / "cached", cached=True, zero_stage=stage)
    train(given)
    same_numbers(tmp_path / "cached", tmp_path / "plain", rel=1e-5)
    # The test could fail: without the head's dropout the losses are others.
    other = sample.inputs(tmp_path / "other", cached=True, zero_stage=stage)
    other.model.head.dropout.p = 0.0
    train(other)
    assert abs(rows(tmp_path / "other")[0]["loss"] - rows(tmp_path / "plain")[0]["loss"]) > 1e-3


SMALL = {
    "swin4d": ["embed_dim=8", "depths=[2,2]", "num_heads=[1,2]"],
    "swin_factorized": ["embed_dim=12", "depths=[4,4]", "num_heads=[2,2]"],
    "neuromamba": ["embed_dim=16", "depth=2", "d_state=8", "head_dim=8"],
}
HEADS = {
    "linear": ["pool=space", "norm=batch"],
    "complex": ["dim=16", "num_heads=2", "cells=2"],
}


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_backbone(name: str, head: str, sample_store: Path, tmp_path: Path) -> None:
    """The whole job, from the labels to the test result, with dropout in the head."""
    given = [f"backbone.{text}" for text in SMALL[name]]
    given += [f"head={head}", "objective=null", "head.dropout=0.3"]
    given += [f"head.{text}" for text in HEADS[head]] + [f"data.store={sample_store}"]
    given += ["train.steps=3", "train.validate_every=1", "train.lr=1e-2", "train.keep_best=true"]
    tested = []
    for kept in (False, True):
        more = [*given, f"train.cache_features={kept}"]
        recipe = load_recipe(f"pretrain/haxby_{name}_simmim", more)
        tested.append(pipeline.finetune(recipe, tmp_path / str(kept)))
    same_numbers(tmp_path / "True", tmp_path / "False", rel=1e-5)
    plain, cached = (result for result in tested if result is not None)
    assert cached.metrics == pytest.approx(plain.metrics)


def test_equals_the_uncached_run_in_bf16(sample: Job, tmp_path: Path) -> None:
    """The bf16 encoder's own rounding is kept: a bf16 number has 8 bits."""
    for name, cached in (("plain", False), ("cached", True)):
        train(sample.inputs(tmp_path / name, cached=cached, precision="bf16"))
    same_numbers(tmp_path / "cached", tmp_path / "plain", rel=2**-8)


def test_the_encoder_runs_once_per_clip(sample: Job, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watching(Encoder):
        def encode_stages(self, tokens: Any, *args: Any, **more: Any) -> Any:
            seen.append(len(tokens.values))
            return super().encode_stages(tokens, *args, **more)

    given = sample.inputs(tmp_path, cached=True, steps=6)
    given.model.backbone.__class__ = Watching
    train(given)
    assert sum(seen) == sum(len(table) for table in sample.tables.values())
    assert max(seen) == 4  # never more at a time than a micro-batch


def test_the_model_and_the_random_state_are_left_alone(sample: Job, tmp_path: Path) -> None:
    model = sample.model()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model.train()
    modes = [m.training for m in model.modules()]
    state = rng_state(CPU)
    init_distributed(ALONE, CPU)
    cache = FeatureCache(model, sample.recipe, tmp_path, sample.tables, sample.tasks)
    cache.build(CPU, torch.bfloat16, Ranks(ALONE, CPU))
    assert torch.equal(rng_state(CPU)["torch"], state["torch"])
    assert rng_state(CPU)["python"] == state["python"]
    assert [m.training for m in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_what_the_head_reads(sample: Job, tmp_path: Path, dtype: torch.dtype) -> None:
    cache, model = built(sample, tmp_path, dtype), sample.model().to(dtype).eval()
    for start in (0, 7):
        loader = sample.loader(ALONE, 4)
        plain = itertools.islice(loader.batches(start), 6)
        kept = itertools.islice(cache.stream("train", loader).batches(start), 6)
        for a, b in zip(plain, kept, strict=True):
            batch, known = a.to_batch(CPU, dtype), b.to_batch(CPU, dtype)
            assert known.subject == batch.subject and len(known) == len(batch) == len(b)
            assert b.run == a.run and b.units == a.units
            assert batch.target is not None and torch.equal(known.target, batch.target)
            with torch.no_grad():
                wanted = model.read(batch)
            for x, y in zip(known.read, wanted, strict=True):
                assert x.dtype == y.dtype and x.shape == y.shape
                torch.testing.assert_close(x, y)  # batches of other clips: rounding
    assert wanted[1].shape[2] == WIDTH and wanted[2].dtype == torch.bool


def test_features_of_another_precision_are_refused(sample: Job, tmp_path: Path) -> None:
    cache = built(sample, tmp_path)
    with pytest.raises(TrainingError, match=r"computed in torch\.float32, a model in torch\.bf"):
        next(cache.epoch("train", 4)).to_batch(CPU, torch.bfloat16)
    with pytest.raises(TrainingError, match="cache of train needs a Loader of the table"):
        other = replace(sample, tables={"train": sample.tables["validation"]})
        cache.stream("train", other.loader(ALONE, 4))


def test_streams_of_two_ranks_are_the_loaders(sample: Job, tmp_path: Path) -> None:
    cache = built(sample, tmp_path)
    for rank in range(2):
        loader = sample.loader(World(rank, 2, rank, "test"), 3)
        plain, kept = loader.batches(2), CachedStream(loader, cache._rows["train"]).batches(2)
        for a, b in itertools.islice(zip(plain, kept, strict=True), 4):
            assert [s.start for s in b.samples] == [s.start for s in a.samples]
            assert b.run == a.run
        plain.close()


def test_features_are_gone_after_the_run(
    sample: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    given = sample.inputs(tmp_path, cached=True)
    seen = []
    train(replace(given, on_step=lambda event: seen.append((tmp_path / "features").is_dir())))
    assert all(seen) and not (tmp_path / "features").exists() and "removed" in caplog.text
    again = train(sample.inputs(tmp_path, cached=True))
    assert again.already_finished and not (tmp_path / "features").exists()


def killed(sample: Job, out: Path) -> None:
    def kill(event: StepEvent) -> None:
        if event.step == 3:
            raise ZeroDivisionError

    given = sample.inputs(out, cached=True, save_every=2)
    with pytest.raises(ZeroDivisionError):
        train(replace(given, on_step=kill))


def test_resume_uses_the_features_again(
    sample: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    train(sample.inputs(tmp_path / "whole", cached=True))
    out = tmp_path / "cut"
    killed(sample, out)
    before = {p: p.stat().st_mtime_ns for p in (out / "features").rglob("*.npy")}
    assert len(before) == 6
    caplog.clear()
    seen: dict[Path, int] = {}
    given = sample.inputs(out, cached=True, save_every=2)
    look = lambda event: seen.update({p: p.stat().st_mtime_ns for p in before})  # noqa: E731
    done = train(replace(given, on_step=look))
    assert done.resumed_from == 2 and seen == before
    assert "using those in" in caplog.text and "running the frozen encoder" not in caplog.text
    assert timeless(out) == timeless(tmp_path / "whole")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("flip", r"rank-00000\.1\.npy is missing or damaged"),
        ("remove", r"rank-00000\.1\.npy is missing or damaged"),
        ("facts", r"rank-00000\.json is unreadable"),
        ("encoder", r"made with another encoder"),
    ],
)
def test_damaged_or_foreign_features_are_made_again(
    sample: Job, tmp_path: Path, harm: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    train(sample.inputs(tmp_path / "whole", cached=True))
    out = tmp_path / "cut"
    killed(sample, out)
    file = out / "features" / "train" / "rank-00000.1.npy"
    if harm == "flip":
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    elif harm == "remove":
        file.unlink()
    elif harm == "facts":
        file.with_name("rank-00000.json").write_text("{}")
    else:
        facts = file.with_name("rank-00000.json")
        facts.write_text(facts.read_text().replace('"encoder": "', '"encoder": "0'))
    done = train(sample.inputs(out, cached=True, save_every=2))
    assert done.resumed_from == 2 and timeless(out) == timeless(tmp_path / "whole")
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert re.search(said, warnings[0]) and "making them again" in warnings[0]


def test_what_decides_the_features(sample: Job, tmp_path: Path) -> None:
    """Every one of these makes other features; moving the store does not."""
    cache = built(sample, tmp_path)

    def fault(changed: Job, dtype: torch.dtype = torch.float32, size: int = 1) -> str:
        model = changed.model()
        other = FeatureCache(model, changed.recipe, tmp_path, changed.tables, changed.tasks)
        return other._shards("train", changed.tables["train"], dtype, size)[0].fault()

    recipe, table = sample.recipe, sample.tables["train"]
    assert fault(sample) == ""
    moved = replace(recipe, data=replace(recipe.data, store="/elsewhere", threads=7))
    assert fault(replace(sample, recipe=moved)) == ""
    other = replace(recipe, data=replace(recipe.data, normalization="minmax"))
    assert fault(replace(sample, recipe=other)) == "made with another data section"
    head = replace(recipe, head=replace(recipe.head, numbers=[3]))
    assert fault(replace(sample, recipe=head)) == "made with another head section"
    later = replace(table, start=table.start + 1)
    assert fault(replace(sample, tables={"train": later})) == "made with another table of clips"
    assert fault(sample, torch.bfloat16) == "made with another precision"
    assert fault(sample, size=2) == "made with another rows"
    assert cache.folder == tmp_path / "features"


def test_no_room_is_said_before_the_work(
    sample: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        said = r"features need 0\.0\d+ MB in .* make room, or"
        with pytest.raises(CheckpointError, match=said) as remembered:
            train(sample.inputs(tmp_path, cached=True))
    assert torch.is_grad_enabled(), f"also while {remembered.value} lives, with the encoder's frame"
    assert not list(tmp_path.rglob("*.npy")) and not (tmp_path / "recipe.yaml").exists()


def test_disk_that_fills_up(sample: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fmrizoo.trainer.shards as shards

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "publish", full)
        with pytest.raises(CheckpointError, match=r"cannot write features to .*No space left"):
            train(sample.inputs(tmp_path, cached=True))
    assert [p for p in (tmp_path / "features").rglob("*") if p.is_file()] == []
    assert train(sample.inputs(tmp_path, cached=True)).step == 6


def test_what_fails_in_the_encoder_is_not_called_a_write_error(sample: Job, tmp_path: Path) -> None:
    class Broken(Encoder):
        def encode_stages(self, *args: Any, **more: Any) -> Any:
            raise RuntimeError("out of memory")

    given = sample.inputs(tmp_path, cached=True)
    given.model.backbone.__class__ = Broken
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        train(given)


def test_damaged_clip_is_named(
    sample: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(self: RunReader, start: int, *_: object) -> None:
        raise CorruptStoreError(f"{self.name}: checksum of frames from {start}")

    monkeypatch.setattr(RunReader, "read_compact", torn)
    with pytest.raises(CorruptStoreError, match=r"sub-001.*checksum of frames"):
        train(sample.inputs(tmp_path, cached=True))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_signal_while_features_are_made(sample: Job, tmp_path: Path) -> None:
    """Stops between two batches; whole parts are kept and the next start goes on."""
    calls: list[int] = []

    class Interrupted(Encoder):
        def encode_stages(self, *args: Any, **more: Any) -> Any:
            calls.append(1)
            if len(calls) == 16:  # 56 clips of the training part are 14 micro-batches
                os.kill(os.getpid(), signal.SIGTERM)
            return super().encode_stages(*args, **more)

    given = sample.inputs(tmp_path, cached=True)
    given.model.backbone.__class__ = Interrupted
    stopped = train(given)
    assert stopped.interrupted and stopped.step == 0 and stopped.model is None
    kept = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert kept[0] == "features/train/rank-00000.0.npy" and len(kept) == 4
    assert train(sample.inputs(tmp_path, cached=True)).step == 6


def test_an_encoder_that_trains_is_refused(sample: Job, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"^train\.cache_features=true needs a frozen encoder; head=reader .* trains it$",
    ):
        FeatureCache(sample.model(frozen=False), sample.recipe, tmp_path, sample.tables)
    lacking = replace(sample.inputs(tmp_path, cached=True), features=None)
    with pytest.raises(RecipeError, match=r"cache_features=true is for heads on a frozen encoder"):
        train(lacking)


# --- shards ---------------------------------------------------------------------------------------


def test_shard_round_trip_of_every_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
    whole = [(torch.randn(7, 2, 3) * 2).to(dtype) for dtype in dtypes]
    shard = Shard(tmp_path, 0, 10, 17, {"a": 1})
    assert shard.fault() == "absent"
    shard.write([tuple(t[i : i + 3] for t in whole) for i in (0, 3, 6)])
    again = Shard(tmp_path, 0, 10, 17, {"a": 1})
    assert again.fault() == ""
    again.open()
    order = [16, 10, 13, 13]
    for got, want in zip(again.stack([again.row(i) for i in order]), whole, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want[[i - 10 for i in order]])
    # Plain NumPy files, mapped, not loaded.
    assert np.array_equal(np.load(tmp_path / "rank-00000.0.npy"), whole[0].numpy())
    assert isinstance(again.row(10)[0].base, np.memmap)
    assert Shard(tmp_path, 0, 10, 17, {"a": 2}).fault() == "made with another a"
    facts = tmp_path / "rank-00000.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "schema": "fmrizoo.features/0"}))
    assert again.fault() == "written in another format (fmrizoo.features/0)"


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.zeros(3, 2), torch.zeros(3, 2)], "1 rows of torch.float32 .2,. were still exp"),
        ([torch.zeros(3, 2), torch.zeros(1, 3)], r"got 1 of torch.float32 \(3,\)"),
        ([torch.zeros(3, 2), torch.zeros(1, 2).bfloat16()], "got 1 of torch.bfloat16"),
        ([torch.zeros(3, 2)], "1 rows never came"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    tmp_path: Path, batches: list[torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Shard(tmp_path, 0, 0, 4, {}).write([(rows,) for rows in batches])
    assert not list(tmp_path.iterdir())
