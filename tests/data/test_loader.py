"""The loader: right voxels, each clip once an epoch, the same for any threads, ranks, resume."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.batch import CompactBatch, batch_target, collate
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import ClipDataset, Loader
from fmrizoo.data.store import Store
from fmrizoo.data.targets import fit_tasks
from fmrizoo.errors import CorruptStoreError, DataError
from fmrizoo.types import TaskSpec


def table(store: Store, acquisition: str = "25mm", **settings: Any) -> ClipTable:
    data = DataConfig(**{"clip_frames": 12, **settings})
    return ClipTable.windows(store, store.select({"acquisition": acquisition}), data)


def events(store: Store) -> ClipTable:
    runs = store.select({"acquisition": "1slice"})
    return ClipTable.labelled(store, runs, DataConfig(clip_frames=9), TaskConfig())


def names(batch: CompactBatch) -> list[tuple[str, int, int]]:
    return [(s.run, s.start, s.seed) for s in batch.samples]


def take(loader: Loader, n: int, start: int = 0) -> list[list[tuple[str, int, int]]]:
    stream = loader.batches(start)
    found = [names(b) for b in itertools.islice(stream, n)]
    stream.close()
    return found


@pytest.mark.parametrize("acquisition", ["1slice", "25mm"])
@pytest.mark.parametrize("mode", ["znorm_minback", "voxel"])
@pytest.mark.parametrize("stride", [1, 2])
def test_voxels_land_where_they_belong(
    acquisition: str, mode: str, stride: int, sample_store: Store
) -> None:
    clips = table(sample_store, acquisition, frame_stride=stride)
    settings = DataConfig(clip_frames=12, frame_stride=stride, normalization=mode)
    batch = next(Loader(clips, settings, 5, seed=1).batches()).to_batch("cpu")
    x, y, z = clips.grid[:3]
    assert batch.bold.shape == (5, 1, x, y, z, 12)
    # Memory runs over b, t, x, y, z.
    assert batch.bold[:, 0].permute(0, 4, 1, 2, 3).is_contiguous()
    for i in range(5):
        reader = sample_store.open(batch.run[i])
        raw = reader.read(int(batch.start[i]), 12, stride)
        s = reader.statistics
        if mode == "voxel":
            whole = reader.read(0, reader.n_frames)
            with np.errstate(invalid="ignore", divide="ignore"):
                want = (raw - whole.mean(3, keepdims=True)) / whole.std(3, keepdims=True)
            want = np.nan_to_num(want)
            background, tolerance = 0.0, 0.05
        else:
            want, tolerance = (raw - s["mean"]) / s["std"], 2e-5
            background = (s["min"] - s["mean"]) / s["std"]
        want[~reader.mask] = background
        assert np.abs(batch.bold[i, 0].numpy() - want).max() < tolerance
        assert np.array_equal(batch.mask[i].numpy(), reader.mask)
    assert torch.allclose(batch.tr, torch.tensor(2.5 * stride))
    assert batch.target is None and batch.subject == ["001"] * 5


@pytest.mark.parametrize("other", [{"codec": "gzip"}, {"max_error": 0.001}])
def test_codecs_give_the_same_clips(
    other: dict[str, Any], made: Callable[..., Store], sample_store: Store
) -> None:
    store = made("sample:haxby2001", select={"acquisition": "25mm"}, **other)
    kinds = {"float16", "float32"} if "codec" in other else {"int16"}
    assert {r.kind for r in store.runs} == kinds
    settings = DataConfig(clip_frames=12, frame_stride=2)
    batches = [
        next(Loader(table(s, frame_stride=2), settings, 6, seed=2).batches()).to_batch("cpu")
        for s in (store, sample_store)
    ]
    assert batches[0].run == batches[1].run and torch.equal(*(b.mask for b in batches))
    # int8 rounds to 0.7 % of a voxel's s.d. (rms); here in units of the run's s.d.
    assert (batches[0].bold - batches[1].bold).abs().max() < 0.01


def test_bf16_is_rounded_once(sample_store: Store) -> None:
    compact = next(Loader(table(sample_store), DataConfig(), 3).batches())
    full, half = compact.to_batch("cpu"), compact.to_batch("cpu", torch.bfloat16)
    assert torch.equal(full.bold.to(torch.bfloat16), half.bold)


@pytest.mark.parametrize("micro", [1, 4, 7])
def test_every_clip_once_an_epoch(micro: int, sample_store: Store) -> None:
    clips = table(sample_store)
    n = len(clips)
    stream = itertools.chain.from_iterable(take(Loader(clips, DataConfig(), micro), 2 * n))
    places = [(run, start) for run, start, _ in itertools.islice(stream, 2 * n)]
    assert len(set(places[:n])) == len(set(places[n:])) == n
    assert places[:n] != places[n:]


def test_threads_do_not_change_the_order(sample_store: Store) -> None:
    clips = table(sample_store)
    runs = [take(Loader(clips, DataConfig(threads=t), 4, seed=3), 12) for t in (1, 2, 5)]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("world", [2, 4])
def test_world_size_does_not_change_the_global_batches(world: int, sample_store: Store) -> None:
    clips = table(sample_store)
    alone = take(Loader(clips, DataConfig(), 8, seed=3), 10)
    ranks = [
        take(Loader(clips, DataConfig(), 8 // world, rank=r, world=world, seed=3), 10)
        for r in range(world)
    ]
    together = [list(itertools.chain.from_iterable(rank[m] for rank in ranks)) for m in range(10)]
    assert together == alone


def test_resume_anywhere(sample_store: Store) -> None:
    loader = Loader(table(sample_store), DataConfig(), 5, seed=9)
    whole = take(loader, 60)
    for start in (1, 17, 59):
        assert take(loader, 1, start) == [whole[start]]


def test_seeds(sample_store: Store) -> None:
    clips = table(sample_store)
    one, two = (take(Loader(clips, DataConfig(), 5, seed=s), 3) for s in (0, 1))
    assert one != two
    n = len(clips)
    seeds = {seed for batch in take(Loader(clips, DataConfig(), 1), 2 * n) for *_, seed in batch}
    assert len(seeds) == 2 * n  # another draw for the same clip in the next epoch
    straight = take(Loader(clips, DataConfig(), 1, shuffle=False), n + 2)
    assert [b[0][1] for b in straight[:3]] == [0, 12, 24]
    assert straight[n][0][:2] == straight[0][0][:2]


@pytest.mark.parametrize("world", [1, 3])
def test_epoch_is_the_table_in_order(world: int, sample_store: Store) -> None:
    clips = table(sample_store)
    found = []
    for rank in range(world):
        loader = Loader(clips, DataConfig(), 7, rank=rank, world=world, seed=5)
        sizes = [len(b) for b in loader.epoch()]
        assert all(s == 7 for s in sizes[:-1]) and 1 <= sizes[-1] <= 7
        found += [(s.run, s.start) for b in loader.epoch() for s in b.samples]
    assert found == [(clips.runs[r].name, s) for r, s in zip(clips.run, clips.start, strict=True)]


def test_more_ranks_than_clips(sample_store: Store) -> None:
    clips = table(sample_store, clip_frames=121)
    sizes = [len(list(Loader(clips, DataConfig(), 1, rank=r, world=20).epoch())) for r in range(20)]
    assert sum(sizes) == 9 and set(sizes) == {0, 1}


def test_targets_and_units(sample_store: Store) -> None:
    clips = events(sample_store)
    tasks = fit_tasks(clips, TaskConfig())
    loader = Loader(clips, DataConfig(), 16, tasks=tasks)
    for compact in loader.epoch():
        batch = compact.to_batch("cpu")
        assert batch.target is not None and batch.target.dtype == torch.int64
        assert [(tasks[0].classes[i],) for i in batch.target] == compact.labels
        assert len(set(compact.units)) == len(compact)
    # Labels alone make no targets.
    plain = next(Loader(clips, DataConfig(), 4).epoch())
    assert plain.to_batch("cpu").target is None and plain.labels[0] == clips.labels[0]
    known = replace(tasks[0], classes=tasks[0].classes[1:])
    with pytest.raises(DataError, match=rf"'{tasks[0].classes[0]}' does not occur in the training"):
        Loader(clips, DataConfig(), 4, tasks=(known,))
    with pytest.raises(DataError, match="labelled with trial_type, the tasks are age"):
        Loader(clips, DataConfig(), 4, tasks=(replace(tasks[0], name="age"),))
    with pytest.raises(DataError, match="labelled with nothing, the tasks are trial_type"):
        Loader(table(sample_store), DataConfig(), 4, tasks=tasks)


def test_regression_targets_are_values(sample_store: Store) -> None:
    runs = sample_store.select({"acquisition": "1slice"})
    task = TaskConfig(target="duration", kind="regression")
    clips = ClipTable.labelled(sample_store, runs, DataConfig(clip_frames=9), task)
    spec = TaskSpec("regression", mean=20.0, std=3.0, name="duration")
    compact = next(Loader(clips, DataConfig(), 4, tasks=(spec,)).batches())
    batch = compact.to_batch("cpu")
    assert batch.target is not None and batch.target.dtype == torch.float32
    assert torch.allclose(batch.target, torch.tensor(22.5))


def test_several_targets_lie_side_by_side(sample_store: Store) -> None:
    clips = events(sample_store)
    assert clips.labels is not None
    labels = [(name, None if i % 3 else 0.1 * i) for i, (name,) in enumerate(clips.labels)]
    labels[1] = (None, 0.7)
    several = replace(clips, labels=tuple(labels), targets=("trial_type", "score"))
    (kinds,) = fit_tasks(clips, TaskConfig())
    tasks = (kinds, TaskSpec("regression", name="score"))
    compact = next(Loader(several, DataConfig(), 4, tasks=tasks).epoch())
    target = compact.to_batch("cpu").target
    assert target is not None and target.shape == (4, 2) and target.dtype == torch.float32
    nan = float("nan")
    first = float(kinds.classes.index(str(labels[0][0])))
    wanted = torch.tensor([[first, 0.0], [nan, 0.7]])
    assert torch.allclose(target[:2], wanted, equal_nan=True)
    assert compact.samples[1].targets[1] == 0.7  # as exact as in the table
    # A single target that is missing somewhere is NaN among floats.
    gap = replace(clips, labels=((None,), *clips.labels[1:]))
    alone = next(Loader(gap, DataConfig(), 4, tasks=(kinds,)).epoch()).to_batch("cpu").target
    assert (
        alone is not None
        and alone.dtype == torch.float32
        and alone.isnan().tolist()[:2]
        == [
            True,
            False,
        ]
    )


def test_facts_are_those_of_the_sample(sample_store: Store) -> None:
    clips = events(sample_store)
    loader = Loader(clips, DataConfig(), 5, tasks=fit_tasks(clips, TaskConfig()))
    (sample, *_) = next(loader.batches()).samples
    ((clip, seed), *_) = next(loader.plan())
    facts = loader.dataset.facts(clip)
    for name in ("subject", "run", "start", "tr", "unit", "labels", "targets"):
        assert getattr(facts, name) == getattr(sample, name)
    assert sample.seed == seed and isinstance(facts.targets[0], int)
    assert batch_target([facts]).tolist() == list(facts.targets)  # type: ignore[union-attr]


@pytest.mark.parametrize("world, rank", [(1, 0), (3, 1)])
def test_the_plan_is_what_is_read(world: int, rank: int, sample_store: Store) -> None:
    clips = table(sample_store)
    loader = Loader(clips, DataConfig(), 4, rank=rank, world=world, seed=3)
    for stream, plan in (
        (loader.batches(7), loader.plan(7)),
        (loader.epoch(), loader.epoch_plan()),
    ):
        for batch, pairs in itertools.islice(zip(stream, plan, strict=True), 25):
            planned = [
                (clips.runs[clips.run[c]].name, int(clips.start[c]), seed) for c, seed in pairs
            ]
            assert names(batch) == planned


def test_nothing_is_read_for_plans_and_facts(
    sample_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(events(sample_store), DataConfig(), 5)
    monkeypatch.setattr(Store, "open", lambda *_: pytest.fail("a run was opened"))
    plan = [pair for pairs in loader.epoch_plan() for pair in pairs]
    assert [loader.dataset.facts(clip).unit for clip, _ in plan] == list(loader.table.units or ())


def test_impossible_ranks(sample_store: Store) -> None:
    for micro, rank, world in [(0, 0, 1), (1, 1, 1), (1, -1, 2)]:
        with pytest.raises(DataError, match="cannot load"):
            Loader(table(sample_store), DataConfig(), micro, rank=rank, world=world)


def test_threads_end_with_the_iterator(sample_store: Store) -> None:
    def readers() -> int:
        return sum(t.name.startswith("fmrizoo-reader") for t in threading.enumerate())

    stream = Loader(table(sample_store), DataConfig(threads=3), 4).batches()
    next(stream)
    assert readers() > 0
    stream.close()
    assert readers() == 0
    stream = Loader(table(sample_store), DataConfig(threads=3), 4).batches()
    next(stream)
    del stream
    gc.collect()
    assert readers() == 0


def test_damage_reaches_the_consumer(sample_store: Store, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(sample_store.path, tmp_path / "s")
    store = Store(tmp_path / "s")
    clips = table(store)
    reader = store.open(clips.runs[3])
    file = tmp_path / "s/sub-001.h5"
    file.chmod(0o644)
    with open(file, "r+b") as handle:
        handle.seek(reader._offset + 50 * reader.row)
        handle.write(b"\x55")
    loader = Loader(clips, DataConfig(threads=2), 4)
    with pytest.raises(CorruptStoreError, match=f"run {clips.runs[3].name}: frame 50 fails"):
        list(loader.epoch())
    assert not any(t.name.startswith("fmrizoo-reader") for t in threading.enumerate())


def test_memory_is_reused_but_never_under_ones_feet(sample_store: Store) -> None:
    clips = table(sample_store)
    stream = Loader(clips, DataConfig(threads=1), 2).batches()
    kept, copies, addresses = [], [], []
    for k in range(30):
        batch = next(stream)
        addresses += [s.rows.ctypes.data for s in batch.samples]
        if k % 3 == 0:  # keep views of some samples, and let the batch itself go
            kept += [torch.from_numpy(s.rows[1:]) for s in batch.samples]
            copies += [s.rows[1:].copy() for s in batch.samples]
        del batch
    stream.close()
    assert len(set(addresses)) < len(addresses) - 10
    for tensor, copy in zip(kept, copies, strict=True):
        assert np.array_equal(tensor.numpy(), copy)


@pytest.mark.parametrize("workers", [0, 1])
def test_plain_dataloader(workers: int, sample_store: Store) -> None:
    clips = table(sample_store, clip_frames=40)
    loader = DataLoader(
        ClipDataset(clips, DataConfig()),
        batch_size=6,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context="spawn" if workers else None,
    )
    found = [batch.to_batch("cpu") for batch in loader]
    ours = [batch.to_batch("cpu") for batch in Loader(clips, DataConfig(), 6).epoch()]
    assert len(found) == len(ours) == 5
    for a, b in zip(found, ours, strict=True):
        assert torch.equal(a.bold, b.bold) and torch.equal(a.mask, b.mask)
        assert a.run == b.run and torch.equal(a.seed, b.seed)
