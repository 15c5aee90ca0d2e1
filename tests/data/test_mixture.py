"""Several stores as one: nobody confused, shares as weighted, equal preprocessing only."""

from __future__ import annotations

import itertools
import logging
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrizoo import pipeline
from fmrizoo.config import DataConfig, SplitConfig, TaskConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.dataset import ClipDataset
from fmrizoo.data.draw import Order, _quotas
from fmrizoo.data.loader import Loader
from fmrizoo.data.mixture import Mixture, open_store
from fmrizoo.data.splits import Split, make_split
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.trainer.export import read_info
from fmrizoo.trainer.folder import recipe_hash
from fmrizoo.types import RunKey
from fmrizoo.zoo import load_recipe

DATA = {"clip_frames": 12, "select": {"acquisition": "1slice"}}


@pytest.fixture(scope="module")
def halves(sample_store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs 1–6 and 7–9 of the sample as two stores."""
    from fmrizoo.config import PrepareConfig
    from fmrizoo.data.prepare import prepare

    top, made = tmp_path_factory.mktemp("halves"), {}
    for name, runs in (("one", "1|2|3|4|5|6"), ("two", "7|8|9")):
        select = {"acquisition": "1slice", "run": runs}
        prepare("sample:haxby2001", top / name, PrepareConfig(space="native", select=select))
        made[name] = top / name
    return made


def config(halves: dict[str, Path], *weights: float | None, **values: Any) -> DataConfig:
    from fmrizoo.config import StoreConfig

    pairs = zip(halves.items(), weights or (None, None), strict=True)
    stores = {name: StoreConfig(str(path), weight) for (name, path), weight in pairs}
    return DataConfig(stores=stores, **{**DATA, **values})


def table(data: DataConfig) -> ClipTable:
    store = open_store(data)
    return ClipTable.windows(store, store.select(data.select), data)


def test_names_carry_their_data_set(halves: dict[str, Path]) -> None:
    store = open_store(config(halves))
    assert isinstance(store, Mixture) and len(store.runs) == 9
    assert {run.subject for run in store.runs} == {"one:001", "two:001"}
    for run in store.runs:
        key = RunKey.parse(run.name)
        assert key == run.key and key.data_set in halves
        assert key.bare.data_set == "" and key.bare.within(key.data_set) == key
        assert store[run.name] is run and store.home(run) == halves[key.data_set]
    with pytest.raises(DataError, match="Did you mean"):
        store["sub-001_task-objects_acq-1slice_run-01"]
    assert pickle.loads(pickle.dumps(store)).runs[8].name == store.runs[8].name


def test_voxels_are_those_of_the_stores(halves: dict[str, Path]) -> None:
    clips = table(config(halves, windows="random"))
    loader = Loader(clips, config(halves), 4)
    for batch in itertools.islice(loader.batches(), 6):
        for sample in batch.samples:
            key = RunKey.parse(sample.run)
            own = Store(halves[key.data_set]).open(str(key.bare))
            assert np.array_equal(sample.rows, own.read_compact(sample.start, 12))
            again = pickle.loads(pickle.dumps(sample))
            assert again.decode.background == sample.decode.background
    assert ClipDataset(clips, config(halves))[0].subject == "one:001"


# -- weights ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 10_000), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_quotas(size: int, weights: list[float]) -> None:
    quotas = _quotas(size, weights)
    assert sum(quotas) == size
    for quota, weight in zip(quotas, weights, strict=True):
        assert abs(quota - size * weight / sum(weights)) < 1 + 1e-6


@pytest.mark.parametrize("visit", [1, 4])
@pytest.mark.parametrize("balance", ["none", "subject"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0), (1.0, 5.0)])
def test_weights_are_shares_of_an_epoch(
    weights: tuple[float, float], balance: str, visit: int, halves: dict[str, Path]
) -> None:
    data = config(halves, *weights, balance=balance, clips_per_visit=visit)
    clips = table(data)
    order = Order(clips, data, seed=3, lanes=8)
    assert len(order) == len(clips)
    epochs = 4
    drawn = [order.clip(p) for p in range(epochs * len(order))]
    of = [clips.runs[r].key.data_set for r in clips.run]
    for e in range(epochs):
        got = Counter(of[c] for c in drawn[e * len(order) : (e + 1) * len(order)])
        for share, weight in zip(order.shares, weights, strict=True):
            assert got[share.data_set] == share.draws
            assert abs(share.draws - len(order) * weight / sum(weights)) < 1
    # Within a store all clips come before any comes again.
    often = Counter(drawn)
    for name in halves:
        own = [often[c] for c in range(len(clips)) if of[c] == name]
        assert max(own) - min(own) <= 1


def test_without_weights_each_clip_comes_once(halves: dict[str, Path]) -> None:
    data = config(halves)
    clips = table(data)
    order = Order(clips, data, seed=1)
    assert sorted(order.clip(p) for p in range(len(order))) == list(range(len(clips)))
    assert [s.draws for s in order.shares] == [s.clips for s in order.shares] == [60, 30]


@pytest.mark.parametrize("visit", [1, 4])
def test_shares_resume_and_do_not_know_the_world(visit: int, halves: dict[str, Path]) -> None:
    data = config(halves, 2.0, 1.0, clips_per_visit=visit, windows="random")
    clips = table(data)

    def plans(rank: int, world: int, start: int, n: int) -> list[list[tuple[int, int]]]:
        micro = 8 // world
        loader = Loader(clips, data, micro, rank=rank, world=world, seed=3, lanes=16)
        return list(itertools.islice(loader.plan(start), n))

    alone = plans(0, 1, 0, 60)
    for world in (2, 4):
        ranks = [plans(r, world, 20, 40) for r in range(world)]
        together = [[pair for rank in ranks for pair in rank[m]] for m in range(40)]
        assert together == alone[20:]


def test_weights_that_make_no_sense(halves: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"every store a weight, or none.*one has 1.0, two has N"):
        config(halves, 1.0, None)
    with pytest.raises(RecipeError, match="number > 0, got -1"):
        config(halves, 1.0, -1.0)
    data = config(halves, 1.0, 1e-6)
    with pytest.raises(DataError, match=r"data.stores.two gives it none of the 90 clips"):
        Order(table(data), data, 0)
    store = open_store(data)
    own = ClipTable.windows(store, [r for r in store.runs if r.key.data_set == "one"], data)
    with pytest.raises(DataError, match=r"data.stores.two has weight 1e-06 but no clip"):
        Order(own, data, 0)
    assert len(list(Loader(own, data, 8).epoch())) == 8  # validation needs no shares


def test_settings_that_make_no_sense(halves: dict[str, Path]) -> None:
    named = [f"data.stores.one.path={halves['one']}"]
    with pytest.raises(RecipeError, match=r"both name data"):
        load_recipe("pretrain/haxby_slice", [*named, "data.store=x"])
    with pytest.raises(RecipeError, match=r"'a_b' becomes part of subjects"):
        load_recipe("pretrain/haxby_slice", ["data.stores.a_b.path=x"])
    with pytest.raises(RecipeError, match=r"data.stores.one needs a path"):
        load_recipe("pretrain/haxby_slice", ["data.stores.one.weight=2"])
    with pytest.raises(RecipeError, match=r"pth"):
        load_recipe("pretrain/haxby_slice", ["data.stores.one.pth=x"])


# -- what does not go together ----------------------------------------------------------------


def test_other_preprocessing_is_refused(
    halves: dict[str, Path], made: Callable[..., Store]
) -> None:
    other = made(
        "sample:haxby2001",
        select={"acquisition": "1slice", "run": "9"},
        tr=2.0,
        on_tr_conflict="sidecar",
    )
    store = Mixture({"one": halves["one"], "odd": other.path})
    with pytest.raises(DataError, match=r"one and odd were preprocessed differently \(tr: exp"):
        store.select({})


def test_twins_and_empty_stores_are_refused(halves: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(halves["two"], tmp_path / "copy")
    with pytest.raises(DataError, match=r"sub-two:001\S+ and sub-copy:001\S+ are the same"):
        Mixture({"two": halves["two"], "copy": tmp_path / "copy"})
    with pytest.raises(DataError, match=r"\(data.stores.two\) matches select=\{'run': '1'\}"):
        Mixture(halves).select({"run": "1"})


# -- labels -----------------------------------------------------------------------------------


def labelled(tree: Any, made: Callable[..., Store], rows: dict[str, str | None]) -> Mixture:
    """Two subjects a store, with a participants.tsv each (``|`` for tabs), or none."""
    for subject in ("01", "02"):
        tree.add(subject)
    paths = {}
    for name, text in rows.items():
        people = tree.root / "participants.tsv"
        people.unlink(missing_ok=True)
        if text is not None:
            people.write_text(text.replace("|", "\t"))
        paths[name] = made(tree.root, name=name).path
    return Mixture(paths)


def test_labels_of_two_stores(tree: Any, made: Callable[..., Store]) -> None:
    store = labelled(
        tree,
        made,
        {
            "a": "participant_id|age|site\nsub-01|20\nsub-02|30\n",
            "b": "participant_id|sex|age\nsub-01|F|60\nsub-02|M|n/a\n",
        },
    )
    task = TaskConfig(target="age", source="participants", kind="regression", level="subject")
    clips = ClipTable.labelled(store, store.runs, DataConfig(clip_frames=12), task)
    assert clips.unit_labels() == {"sub-a:01": (20.0,), "sub-a:02": (30.0,), "sub-b:01": (60.0,)}
    sex = TaskConfig(target="sex", source="participants", level="subject")
    with pytest.raises(DataError, match="no column 'sex'"):
        ClipTable.labelled(store, store.runs, DataConfig(clip_frames=12), sex)


def test_labels_of_one_store_only_are_refused(tree: Any, made: Callable[..., Store]) -> None:
    store = labelled(tree, made, {"a": "participant_id|age\nsub-01|20\n", "b": None})
    with pytest.raises(DataError, match=r"\(data.stores.b\) has no participants.tsv, but a have"):
        _ = store.participants


# -- splits and leaks -------------------------------------------------------------------------


def test_each_store_is_split_as_on_its_own(halves: dict[str, Path], tmp_path: Path) -> None:
    store = open_store(config(halves))
    settings = SplitConfig(by="run", folds=3, seed=4)
    split = make_split(store, store.runs, settings)
    split.save(tmp_path / "split.json")
    assert Split.load(tmp_path / "split.json") == split
    for name, path in halves.items():
        alone = Store(path)
        own = make_split(alone, alone.runs, settings)
        for part, names in split.parts().items():
            of = [RunKey.parse(n) for n in names]
            assert [str(k.bare) for k in of if k.data_set == name] == own.parts()[part]
    with pytest.raises(DataError, match=r"the 3 chosen runs of two are 3 run\(s\)"):
        make_split(store, store.runs, SplitConfig(by="run", folds=4))


TINY = [
    "backbone.embed_dim=8",
    "backbone.num_heads=[1,2]",
    "train.steps=3",
    "train.batch_size=4",
    "train.validate_every=3",
]


def test_pretraining_on_two_stores(
    halves: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stores = [
        f"data.stores.{n}={{path: {p}, weight: {w}}}"
        for (n, p), w in zip(halves.items(), (2, 1), strict=True)
    ]
    split = ["split.by=run", "split.folds=3"]
    recipe = load_recipe("pretrain/haxby_slice", [*TINY, *split, *stores, "data.balance=subject"])
    caplog.set_level(logging.INFO, "fmrizoo")
    result = pipeline.pretrain(recipe, tmp_path / "run")
    assert result.step == 3 and result.model is not None
    assert "one: " in caplog.text and "of an epoch (66.7 %)" in caplog.text
    seen = read_info(tmp_path / "run/model").seen_runs
    assert {RunKey.parse(name).data_set for name in seen} == {"one", "two"}
    # A folder may move without being another run; another weight is another run.
    moved = load_recipe(
        "pretrain/haxby_slice",
        [*TINY, *split, *stores, "data.balance=subject", "data.stores.one.path=elsewhere"],
    )
    assert recipe_hash(moved) == recipe_hash(recipe)
    moved.data.stores["one"].weight = 3
    assert recipe_hash(moved) != recipe_hash(recipe)
    # The split of one store alone is that of the mixture: its test part was never seen …
    head = [*TINY, *split, f"init_from={tmp_path / 'run'}"]
    alone = [*head, f"data.stores.one.path={halves['one']}"]
    assert pipeline.finetune(load_recipe("finetune/haxby_slice", alone), tmp_path / "tuned")
    # … but another fold's was, and a store that is not named may hold the same people.
    with pytest.raises(DataError, match=r"has seen sub-one:001\S+ in pretraining"):
        pipeline.finetune(
            load_recipe("finetune/haxby_slice", [*alone, "split.fold=1"]), tmp_path / "no"
        )
    bare = [*head, f"data.store={halves['one']}", "split.fold=1"]
    with pytest.raises(DataError, match=r"may be the same person: name the data set on both"):
        pipeline.finetune(load_recipe("finetune/haxby_slice", bare), tmp_path / "no")
