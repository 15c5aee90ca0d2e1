"""Subjects divided between nodes: each clip once an epoch, nobody leaves its node, any world."""

from __future__ import annotations

import gc
import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_segments import several, windows

from fmrizoo import pipeline
from fmrizoo.config import DataConfig, StoreConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.divide import DividedOrder
from fmrizoo.data.loader import Loader
from fmrizoo.data.mixture import open_store
from fmrizoo.data.staging import stage_share
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.trainer.folder import recipe_hash
from fmrizoo.zoo import load_recipe


def order(table: ClipTable, nodes: int, lanes: int, seed: int = 0, visit: int = 1) -> DividedOrder:
    return DividedOrder(table, DataConfig(divide=nodes, clips_per_visit=visit), seed, lanes)


def drawn(found: DividedOrder, nodes: int, portion: int, draws: int) -> list[int]:
    """The first clips of the places that belong to a portion."""
    own = found.lanes // nodes
    steps = (divmod(k, own) for k in range(draws))
    return [found.clip(step * found.lanes + portion * own + place) for step, place in steps]


@settings(max_examples=120, deadline=None)
@given(
    frames=st.lists(st.integers(10, 120), min_size=1, max_size=12),
    nodes=st.integers(2, 6),
    places=st.integers(1, 5),
    visit=st.integers(1, 3),
    seed=st.integers(-(2**40), 2**40),
)
def test_every_clip_once_an_epoch(
    frames: list[int], nodes: int, places: int, visit: int, seed: int
) -> None:
    table = windows(frames, clip_frames=10, clip_stride=0.5)
    if len(table) < nodes:
        with pytest.raises(DataError, match="as many training clips"):
            order(table, nodes, nodes * places)
        return
    found = order(table, nodes, nodes * places, seed, visit)
    epochs = 4
    edges = [[found.start(k, e) for e in range(epochs + 1)] for k in range(nodes)]
    streams = [drawn(found, nodes, k, edges[k][-1]) for k in range(nodes)]
    for e in range(epochs):
        one = [c for k in range(nodes) for c in streams[k][edges[k][e] : edges[k][e + 1]]]
        assert sorted(one) == list(range(len(table)))
        # Nobody runs ahead: portions end an epoch within a draw of each other.
        assert max(x[e + 1] for x in edges) - min(x[e + 1] for x in edges) <= 1


@pytest.mark.parametrize("visit", [1, 4])
def test_whole_batches_are_whole_epochs(visit: int) -> None:
    """Where places divide clips, an epoch is what an epoch is without the option."""
    table = several([3, 1, 5, 2, 4, 1])  # 16 runs of four clips
    found = order(table, 4, 16, 3, visit)
    epochs = [[found.clip(64 * e + p) for p in range(64)] for e in range(3)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = order(table, 4, 16, 4, visit)
    assert [other.clip(p) for p in range(64)] != epochs[0]


@settings(max_examples=60, deadline=None)
@given(runs=st.lists(st.integers(1, 5), min_size=8, max_size=30), nodes=st.integers(2, 5))
def test_subjects_stay_at_their_node(runs: list[int], nodes: int) -> None:
    table = several(runs)
    found = order(table, nodes, nodes)
    each = len(table) // nodes
    clips = [set(drawn(found, nodes, k, each)) for k in range(nodes)]
    assert all(len(own) == each for own in clips), "equally many, none twice"
    assert not set.intersection(*clips)
    subjects = [{table.runs[table.run[c]].subject for c in own} for own in clips]
    counts = Counter(s for own in subjects for s in own)
    assert sum(n - 1 for n in counts.values()) < nodes, "cut at the borders of portions alone"
    # Later epochs draw from the same subjects, but for the clips that are left over.
    for k in range(nodes):
        later = [table.runs[table.run[c]].subject for c in drawn(found, nodes, k, 4 * each)]
        assert sum(s not in subjects[k] for s in later) <= 4


def batches(table: ClipTable, world: int, micro: int, steps: int = 6, **values: Any) -> list[Any]:
    """Per step the clips and seeds of each rank."""
    config = DataConfig(divide=4, **values)
    turns = 24 // (world * micro)
    ranks = [
        Loader(table, config, micro, rank=r, world=world, seed=5, lanes=24).plan()
        for r in range(world)
    ]
    return [
        [list(itertools.chain(*itertools.islice(plan, turns))) for plan in ranks]
        for _ in range(steps)
    ]


@pytest.mark.parametrize("visit", [1, 3])
def test_the_machine_does_not_matter(visit: int) -> None:
    """Ranks, nodes and micro-batches share the same batches out, in the same order."""
    table = several([2, 3, 1, 4, 2, 2, 3])
    table = replace(table, store=cast(Store, SimpleNamespace(reserve=lambda readers: None)))
    found = [
        batches(table, world, micro, clips_per_visit=visit)
        for world, micro in [(1, 24), (1, 4), (2, 6), (4, 6), (4, 3), (8, 1), (3, 8), (12, 2)]
    ]
    flat = [[list(itertools.chain(*ranks)) for ranks in steps] for steps in found]
    assert all(one == flat[0] for one in flat)


def test_a_node_draws_from_its_own_runs_and_resumes() -> None:
    table = several([2, 3, 1, 4, 2, 2, 3, 3])  # 80 clips: none left over
    config = DataConfig(divide=4)
    seen: list[set[str]] = []
    for node in range(4):
        names: set[str] = set()
        for rank in (2 * node, 2 * node + 1):
            loader = Loader(table, config, 3, rank=rank, world=8, seed=1, lanes=48)
            plan = list(itertools.islice(loader.plan(), 40))
            assert list(itertools.islice(loader.plan(17), 23)) == plan[17:]
            own = {run.name for run in loader.own_runs()}
            drawn_of = {table.runs[table.run[c]].name for batch in plan for c, _ in batch}
            assert drawn_of <= own
            names |= own
        seen.append(names)
    counts = Counter(name for names in seen for name in names)
    assert len(counts) == len(table.runs) and sum(n - 1 for n in counts.values()) <= 3
    # Half the nodes: each draws from two portions.
    loader = Loader(table, config, 12, rank=0, world=2, seed=1, lanes=48)
    assert {run.name for run in loader.own_runs()} == seen[0] | seen[1]


def test_what_is_refused() -> None:
    table = several([2, 2])
    with pytest.raises(DataError, match=r"data\.divide=3 divides the 8 places"):
        order(table, 3, 8)
    with pytest.raises(DataError, match="2 ranks with 3 clips at a time do not fill 8 places"):
        next(Loader(table, DataConfig(divide=2), 3, world=2, lanes=8).plan())
    with pytest.raises(RecipeError, match="divide=2 deals every clip to one node"):
        DataConfig(divide=2, balance="subject")
    with pytest.raises(RecipeError, match="divide=2 deals every clip to one node"):
        DataConfig(divide=2, stores={"a": StoreConfig("x", 1.0), "b": StoreConfig("y", 2.0)})
    with pytest.raises(RecipeError, match="divide must be ≥ 1"):
        DataConfig(divide=0)


def test_it_decides_the_run_only_where_it_is_used() -> None:
    name = "pretrain/haxby_slice"
    assert recipe_hash(load_recipe(name, ["data.divide=1"])) == recipe_hash(load_recipe(name))
    assert recipe_hash(load_recipe(name, ["data.divide=2"])) != recipe_hash(load_recipe(name))


# --- staging --------------------------------------------------------------------------------------


@pytest.fixture
def path(tree: Any, made: Callable[..., Store]) -> Path:
    for subject in ("01", "02", "03", "04", "05", "06"):
        tree.add(subject)
    return made(tree.root).path


def staged_files(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("fmrizoo-*/*.h5")}


def rows(loader: Loader, count: int) -> list[bytes]:
    found = itertools.islice(loader.batches(), count)
    return [sample.rows.tobytes() for batch in found for sample in batch.samples]


@pytest.mark.parametrize("several_stores", [False, True])
def test_nodes_keep_their_share(
    several_stores: bool, path: Path, made: Callable[..., Store], tree: Any, tmp_path: Path
) -> None:
    config = DataConfig(store=str(path), clip_frames=4, divide=3, threads=2)
    if several_stores:
        tree.add("07", data=None)
        second = made(tree.root, name="second", select={"subject": "07"}).path
        stores = {"a": StoreConfig(str(path)), "b": StoreConfig(str(second))}
        config = DataConfig(stores=stores, clip_frames=4, divide=3, threads=2)
    kept = []
    for rank in range(3):
        (node := tmp_path / f"node-{rank}").mkdir()
        plain, store = open_store(config), open_store(config)
        one, two = (
            Loader(
                ClipTable.windows(s, list(s.runs), config), config, 2, rank=rank, world=3, lanes=6
            )
            for s in (plain, store)
        )
        expected = rows(one, 9)
        own = two.own_runs()
        stage_share(store, own, node)
        kept.append(staged_files(node))
        assert kept[-1] == {run.file for run in plain.runs if run.name in {r.name for r in own}}
        assert all(node in store.open(run).path.parents for run in own)
        others = [run for run in store.runs if run.name not in {r.name for r in own}]
        assert others and all(path.parent in store.open(r).path.parents for r in others)
        assert not any(node in store.open(r).path.parents for r in others)
        assert rows(two, 9) == expected
        del plain, store, one, two, own, others
        gc.collect()
        assert staged_files(node) == set(), "the copy goes with its last user"
    assert sum(map(len, kept)) <= (7 if several_stores else 6) + 2
    assert len(set.union(*kept)) == (7 if several_stores else 6)


def test_training_with_shares(path: Path, tmp_path: Path) -> None:
    (node := tmp_path / "node").mkdir()
    given = [f"data.store={path}", "data.clip_frames=4", "data.select={}", "split.by=subject",
             "backbone.img_size=[5,6,4,4]", "backbone.patch_size=[5,3,2,2]",
             "backbone.window_size=[2,2,2,2]", "backbone.embed_dim=8", "data.divide=2",
             "backbone.num_heads=[1,2]", "train.steps=3", "train.batch_size=4"]  # fmt: skip
    recipe = load_recipe("pretrain/haxby_slice", given)
    plain = pipeline.pretrain(recipe, tmp_path / "plain")
    staged = load_recipe("pretrain/haxby_slice", [*given, f"data.stage={node}"])
    copied = pipeline.pretrain(staged, tmp_path / "copied")
    assert copied.metrics["loss"] == plain.metrics["loss"]
    gc.collect()
    assert staged_files(node) == set()
    lines = (tmp_path / "copied/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 3
    assert "divide: 2" in (tmp_path / "copied/recipe.yaml").read_text()
