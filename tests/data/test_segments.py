"""Segments as the source names them: SL frames, SWS apart, starting SBS segments apart."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrizoo.config import DataConfig, TaskConfig, to_dict
from fmrizoo.data.clips import ClipTable, clip_span
from fmrizoo.data.draw import Order
from fmrizoo.data.loader import Loader
from fmrizoo.data.order import permuted
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.trainer.folder import deciding_keys
from fmrizoo.types import RunKey
from fmrizoo.zoo import load_recipe


def run(subject: str, n_frames: int, number: int = 1) -> RunInfo:
    """A run as the index knows it, without a file."""
    key = RunKey(subject, task="rest", run=str(number))
    known = {"key": key, "name": str(key), "subject": key.subject, "n_frames": n_frames}
    return cast(RunInfo, SimpleNamespace(**known, grid=(4, 4, 4), tr=1.0, events=()))


def windows(frames: list[int], **values: Any) -> ClipTable:
    runs = [run(f"{k:02d}", n) for k, n in enumerate(frames)]
    return ClipTable.windows(cast(Store, None), runs, DataConfig(**values))


def several(runs_of: list[int], n_frames: int = 40, **values: Any) -> ClipTable:
    """``runs_of[s]`` runs of subject ``s``, four clips a run."""
    runs = [run(f"{s:02d}", n_frames, k) for s, n in enumerate(runs_of) for k in range(n)]
    return ClipTable.windows(cast(Store, None), runs, DataConfig(clip_frames=10, **values))


segments = st.fixed_dictionaries(
    {
        "clip_frames": st.integers(1, 40),
        "frame_stride": st.integers(1, 6),
        "clip_stride": st.floats(0.05, 3.0),
    }
)


@settings(max_examples=200, deadline=None)
@given(values=segments, spare=st.lists(st.integers(0, 300), min_size=1, max_size=4))
def test_segments(values: dict[str, Any], spare: list[int]) -> None:
    config = DataConfig(**values)
    sl, sws, sbs = values["clip_frames"], values["frame_stride"], values["clip_stride"]
    assert clip_span(config) == (sl - 1) * sws + 1
    frames = [clip_span(config) + s for s in spare]
    table = windows(frames, **values)
    # Neither the length of a clip nor its inner stride knows of SBS.
    assert (table.clip_frames, table.frame_stride, table.grid.t) == (sl, sws, sl)
    step = max(1, round(sbs * sl * sws))
    for k, n in enumerate(frames):
        own = table.start[table.run == k]
        last = own[-1] + (sl - 1) * sws
        assert own[0] == 0 and last <= n - 1  # inside the run
        assert (np.diff(own) == step).all()  # overlap as said
        assert last + step > n - 1  # no further window would fit


@settings(max_examples=60, deadline=None)
@given(values=segments, other=st.floats(0.05, 3.0))
def test_sbs_changes_starts_only(values: dict[str, Any], other: float) -> None:
    span = clip_span(DataConfig(**values))
    one = windows([span + 50], **values)
    two = windows([span + 50], **{**values, "clip_stride": other})
    assert one.grid == two.grid and one.frame_stride == two.frame_stride
    assert one.start[0] == two.start[0] == 0


def test_half_overlap_shares_half_of_the_frames() -> None:
    table = windows([100], clip_frames=20, clip_stride=0.5)
    clips = [set(range(s, s + 20)) for s in table.start]
    assert all(len(a & b) == 10 for a, b in itertools.pairwise(clips))
    strided = windows([100], clip_frames=10, frame_stride=2, clip_stride=0.5)
    clips = [set(range(s, s + 20, 2)) for s in strided.start]
    assert all(len(a & b) == 5 for a, b in itertools.pairwise(clips))


def test_every_short_run_is_named() -> None:
    with pytest.raises(DataError, match=r"01_task-rest_run-1 has 19 .*so are .*03_\S+ \(5\).*runs"):
        windows([20, 19, 40, 5], clip_frames=20)
    with pytest.raises(DataError, match=r"run sub-01\S+ has 19 .*\): shorten .* leave the run out"):
        windows([20, 19], clip_frames=20)


# -- random windows ---------------------------------------------------------------------------


def starts(loader: Loader, clips: int, first: int = 0) -> list[tuple[int, int]]:
    """(run, first frame) of the training clips, without reading them."""
    pairs = itertools.chain.from_iterable(loader.plan(first))
    of = loader.dataset.start_of
    return [(int(loader.table.run[c]), of(c, seed)) for c, seed in itertools.islice(pairs, clips)]


def test_random_windows_move_and_stay_inside() -> None:
    config = DataConfig(clip_frames=10, frame_stride=2, windows="random")
    table = windows([50, 19, 33], clip_frames=10, frame_stride=2)
    loader = Loader(table, config, 1, seed=3)
    n, epochs = len(table), 300
    drawn = starts(loader, epochs * n)
    for k, room in enumerate((32, 1, 15)):
        own = Counter(start for r, start in drawn if r == k)
        assert set(own) == set(range(room))  # every start that fits, and no other
        expected = own.total() / room
        chi2 = sum((own[s] - expected) ** 2 / expected for s in range(room))
        assert chi2 < room - 1 + 6 * np.sqrt(2 * room)
    # As many clips of each run an epoch as there are fixed windows.
    each = Counter(table.run.tolist())
    for e in range(5):
        assert Counter(r for r, _ in drawn[e * n : (e + 1) * n]) == each
    assert sorted(drawn[:n]) != sorted(drawn[n : 2 * n])
    assert starts(loader, n, 7) == drawn[7 : 7 + n]


def test_random_windows_are_what_is_read(sample_store: Store) -> None:
    config = DataConfig(clip_frames=12, windows="random", select={"acquisition": "25mm"})
    table = ClipTable.windows(sample_store, sample_store.select(config.select), config)
    alone = Loader(table, replace(config, threads=1), 4, seed=1)
    wanted = starts(alone, 8)
    halves = [
        Loader(table, replace(config, threads=3), 2, rank=r, world=2, seed=1).batches()
        for r in range(2)
    ]
    got = [next(half) for _ in range(2) for half in halves]
    samples = [s for batch in got for s in batch.samples]
    assert [(s.run, s.start) for s in samples] == [(table.runs[r].name, s) for r, s in wanted]
    for sample in samples:
        reader = sample_store.open(sample.run)
        assert np.array_equal(sample.rows, reader.read_compact(sample.start, 12))
    for half in halves:
        half.close()
    # Validation and test keep the table's windows.
    found = [s.start for batch in Loader(table, config, 5).epoch() for s in batch.samples]
    assert found == table.start.tolist()


def test_events_do_not_move(sample_store: Store) -> None:
    runs = sample_store.select({"acquisition": "1slice"})
    config = DataConfig(clip_frames=9, windows="random")
    table = ClipTable.labelled(sample_store, runs, config, TaskConfig())
    with pytest.raises(DataError, match="off their events"):
        Loader(table, config, 4).batches()
    with pytest.raises(RecipeError, match="off their events"):
        load_recipe("finetune/haxby_slice", ["data.windows=random"])
    traits = ["task.source=participants", "task.level=subject", "train.cache_features=true"]
    with pytest.raises(RecipeError, match="features of fixed clips"):
        load_recipe("finetune/haxby_slice", ["data.windows=random", *traits])


# -- balance ----------------------------------------------------------------------------------


def drawn(order: Order, n: int, first: int = 0) -> list[int]:
    return [order.clip(p) for p in range(first, first + n)]


def subjects(table: ClipTable, clips: list[int]) -> list[str]:
    return [table.runs[table.run[c]].subject for c in clips]


@settings(max_examples=60, deadline=None)
@given(
    runs_of=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    seed=st.integers(0, 2**40),
    visit=st.integers(1, 5),
    lanes=st.integers(1, 9),
    epochs=st.integers(1, 4),
)
def test_subjects_come_equally_often(
    runs_of: list[int], seed: int, visit: int, lanes: int, epochs: int
) -> None:
    table = several(runs_of)
    config = DataConfig(balance="subject", clips_per_visit=visit)
    order = Order(table, config, seed, lanes)
    assert len(order) % (visit * len(runs_of)) == 0
    got = drawn(order, epochs * len(order))
    for e in range(epochs):
        epoch = subjects(table, got[e * len(order) : (e + 1) * len(order)])
        assert set(Counter(epoch).values()) == {len(order) // len(runs_of)}
    # All clips of a subject come once before any comes again.
    often = Counter(got)
    for name in set(subjects(table, got)):
        own = [often[c] for c in range(len(table)) if table.runs[table.run[c]].subject == name]
        assert max(own) - min(own) <= 1


def test_without_balance_subjects_come_as_often_as_they_have_clips() -> None:
    table = several([1, 5])
    order = Order(table, DataConfig(), 0)
    assert Counter(subjects(table, drawn(order, len(order)))) == {"00": 4, "01": 20}


def test_turns_are_rounds() -> None:
    table = several([1, 2, 3, 4])
    got = subjects(table, drawn(Order(table, DataConfig(balance="subject"), 5), 40))
    rounds = [tuple(got[k : k + 4]) for k in range(0, 40, 4)]
    assert all(len(set(r)) == 4 for r in rounds) and len(set(rounds)) > 3


@pytest.mark.parametrize(
    "values", [{}, {"balance": "subject"}, {"clips_per_visit": 4}], ids=lambda v: "-".join(v)
)
def test_any_step_at_once(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A late step of a large table costs as little as the first: nothing is listed."""
    table = windows([490] * 3000, clip_frames=20, clip_stride=0.1)
    assert len(table) > 600_000
    loader = Loader(_quiet(table), DataConfig(windows="random", **values), 8, seed=1)
    assert loader.order.clip(0) < len(table)
    calls: list[int] = []

    def counted(position: int, n: int, seed: int, epoch: int) -> int:
        calls.append(n)
        return permuted(position, n, seed, epoch)

    monkeypatch.setattr("fmrizoo.data.draw.permuted", counted)
    plan = next(loader.plan(10**12))
    assert len(plan) == 8 and all(0 <= c < len(table) for c, _ in plan)
    assert len(calls) <= 4 * 8


class _NoStore:
    def reserve(self, readers: int) -> None:
        pass


def _quiet(table: ClipTable) -> ClipTable:
    return replace(table, store=cast(Store, _NoStore()))


def test_folders_from_before_these_settings_still_resume() -> None:
    now = to_dict(load_recipe("pretrain/haxby_slice"))
    data = now["data"]
    new = ("stores", "windows", "balance", "clips_per_visit", "augment", "stage", "stage_keep")
    old = {**now, "data": {key: value for key, value in data.items() if key not in new}}
    before, after = deciding_keys(old, now)
    assert before == after
    for key, value in [("windows", "random"), ("balance", "subject"), ("clips_per_visit", 2)]:
        changed = {**now, "data": {**data, key: value}}
        assert deciding_keys(changed)[0] != after
    noisy = {**now, "data": {**data, "augment": {**data["augment"], "noise": 0.1}}}
    assert deciding_keys(noisy)[0] != after


def test_a_sweep_and_quality_limits_decide_no_training() -> None:
    now = to_dict(load_recipe("pretrain/haxby_slice"))
    after = deciding_keys(now)[0]
    limits = {**now["prepare"], "qc": {**now["prepare"]["qc"], "max_fd": 9.0}}
    for same in ({"sweep": {**now["sweep"], "seeds": 5}}, {"prepare": limits}):
        assert deciding_keys({**now, **same})[0] == after
    split = dict(now["split"])
    assert deciding_keys({**now, "split": {**split, "train_units": 2}})[0] != after
    del split["train_units"]
    assert deciding_keys({**now, "split": split})[0] == after
