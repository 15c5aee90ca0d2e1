"""Several clips of a run that is opened: still each clip once, and bounded in what stays open."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_segments import several, windows

from fmrizoo.config import DataConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.draw import Order
from fmrizoo.data.loader import Loader
from fmrizoo.data.store import Store


def order(table: ClipTable, visit: int, lanes: int, seed: int = 0) -> Order:
    return Order(table, DataConfig(clips_per_visit=visit), seed, lanes)


@settings(max_examples=150, deadline=None)
@given(
    frames=st.lists(st.integers(10, 120), min_size=1, max_size=12),
    visit=st.integers(1, 7),
    lanes=st.integers(1, 40),
    seed=st.integers(-(2**40), 2**40),
)
def test_every_clip_once_an_epoch(frames: list[int], visit: int, lanes: int, seed: int) -> None:
    table = windows(frames, clip_frames=10, clip_stride=0.5)
    drawn = order(table, visit, lanes, seed)
    n = len(table)
    for epoch in range(3):
        assert sorted(drawn.clip(epoch * n + p) for p in range(n)) == list(range(n))


def test_epochs_differ_and_so_do_visits() -> None:
    table = windows([100] * 20, clip_frames=10)
    drawn = order(table, 4, 4)
    epochs = [tuple(drawn.clip(e * 200 + p) for p in range(200)) for e in range(3)]
    assert len(set(epochs)) == 3

    def visits(epoch: tuple[int, ...]) -> set[frozenset[int]]:
        """Clips of one run that lie near each other in one lane."""
        lane = epoch[0::4]
        runs = {c // 10 for c in lane[:8]}
        return {frozenset(c for c in lane[:8] if c // 10 == r) for r in runs}

    assert visits(epochs[0]) != visits(epochs[1])


@pytest.mark.parametrize("visit, lanes, world", [(4, 8, 1), (4, 16, 4), (3, 10, 2)])
def test_a_rank_opens_a_run_once_a_visit(visit: int, lanes: int, world: int) -> None:
    """Readers needed at a time follow from lanes and visits, whatever the number of runs."""
    table = windows([240] * 400, clip_frames=20)  # 12 clips a run
    drawn = order(table, visit, lanes)
    own = lanes // world
    room = own * (drawn.mixed_visits + 2)  # what Loader reserves
    for rank in range(world):
        cache: dict[int, None] = {}
        opened = clips = 0
        for step in range(len(table) // lanes):
            for lane in range(rank * own, (rank + 1) * own):
                run = int(table.run[drawn.clip(step * lanes + lane)])
                clips += 1
                opened += run not in cache
                cache.pop(run, None)
                cache[run] = None
                if len(cache) > room:
                    del cache[next(iter(cache))]
        # A visit that lies across two lanes or blocks is opened twice: a few per lane.
        assert opened <= 1.15 * clips / visit + 2 * own
    assert room < 400 or lanes == 10


def test_a_batch_holds_many_runs() -> None:
    table = windows([240] * 400, clip_frames=20)
    drawn = order(table, 4, 16)
    for step in range(100):
        runs = Counter(int(table.run[drawn.clip(step * 16 + lane)]) for lane in range(16))
        assert len(runs) >= 13  # lanes are in different visits
    # One lane mixes several visits: the same run does not come four times on end.
    lane = [int(table.run[drawn.clip(step * 16)]) for step in range(200)]
    longest = max(len(list(group)) for _, group in itertools.groupby(lane))
    repeats = sum(a == b for a, b in itertools.pairwise(lane)) / len(lane)
    assert longest <= 8 and repeats < 0.6


@pytest.mark.parametrize("values", [{"balance": "subject"}, {"windows": "random"}, {}])
def test_neither_threads_nor_world_size_matter(values: dict[str, Any], sample_store: Store) -> None:
    config = DataConfig(clip_frames=12, clips_per_visit=4, select={"acquisition": "25mm"}, **values)
    table = ClipTable.windows(sample_store, sample_store.select(config.select), config)

    def read(rank: int, world: int, threads: int, start: int, n: int) -> list[list[Any]]:
        config.threads = threads
        loader = Loader(table, config, 8 // world, rank=rank, world=world, seed=2, lanes=16)
        stream = loader.batches(start)
        found = [
            [(s.run, s.start, s.seed, s.rows.tobytes()) for s in batch.samples]
            for batch in itertools.islice(stream, n)
        ]
        stream.close()
        return found

    alone = read(0, 1, 2, 0, 24)
    assert read(0, 1, 5, 17, 7) == alone[17:]
    for world in (2, 4):
        ranks = [read(r, world, 1, 10, 8) for r in range(world)]
        assert [[s for rank in ranks for s in rank[m]] for m in range(8)] == alone[10:18]


def test_the_store_keeps_as_many_runs_open_as_visits_need(
    sample_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(sample_store.path, cache=1)
    config = DataConfig(clip_frames=12, select={"acquisition": "25mm"}, clips_per_visit=4)
    table = ClipTable.windows(store, store.select(config.select), config)
    opened: list[str] = []
    from fmrizoo.data import store as module

    real = module.RunReader

    def counted(path: Path, name: str, *rest: Any) -> Any:
        opened.append(name)
        return real(path, name, *rest)

    monkeypatch.setattr(module, "RunReader", counted)
    loader = Loader(table, config, 2, seed=1)
    stream = loader.batches()
    for _ in range(len(loader) // 2):
        next(stream)
    stream.close()
    assert len(opened) <= 0.5 * len(table)
    del stream
    plain = Loader(table, DataConfig(clip_frames=12), 2, seed=1)
    assert len(store._open) <= loader.order.lanes * (loader.order.mixed_visits + 2)
    assert len(plain.order) == len(table)


def test_subjects_take_turns_by_visits() -> None:
    table = several([1, 2, 3])
    drawn = Order(table, DataConfig(balance="subject", clips_per_visit=2), 0, lanes=1)
    assert len(drawn) % 6 == 0
    got = Counter(table.runs[table.run[drawn.clip(p)]].subject for p in range(len(drawn)))
    assert set(got.values()) == {len(drawn) // 3}
