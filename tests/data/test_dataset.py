"""The plain data set gives a ``DataLoader`` the clips that the loader gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from fmrizoo.config import DataConfig, StoreConfig, TaskConfig
from fmrizoo.data.dataset import ClipDataset, collate, collate_dense
from fmrizoo.data.loader import Loader
from fmrizoo.data.store import Store
from fmrizoo.errors import CorruptStoreError, RecipeError
from fmrizoo.types import Batch

KIND = {"acquisition": "1slice"}


def same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.bold, b.bold) and torch.equal(a.mask, b.mask)
    assert (a.run, a.subject) == (b.run, b.subject)
    for name in ("start", "seed", "tr"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert (a.target is None) == (b.target is None)
    assert a.target is None or b.target is None or torch.equal(a.target, b.target)


# Forking is what is tested; Python warns of it where threads of other tests are alive.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("way", "dense"),
    [
        ("none", False),
        ("none", True),
        ("fork", False),
        ("fork", True),
        pytest.param("spawn", False, marks=pytest.mark.slow),
        ("spawn", True),
    ],
)
def test_clips_are_the_loaders(way: str, dense: bool, sample_store: Store) -> None:
    config = DataConfig(store=str(sample_store.path), clip_frames=9, select=KIND)
    clips = ClipDataset.of(config, TaskConfig())
    clips[0]  # an open run must not hinder the workers
    given = DataLoader(
        clips,
        batch_size=30,
        num_workers=0 if way == "none" else 2,
        multiprocessing_context=None if way == "none" else way,
        collate_fn=collate_dense if dense else collate,
    )
    found = list(given)
    ours = list(Loader(clips.table, config, 30, tasks=clips.tasks).epoch())
    assert len(found) == len(ours) == 3
    for a, b in zip(found, ours, strict=True):
        assert isinstance(a, Batch) == dense
        if dense:
            assert a.voxels is None
        same(a if dense else a.to_batch(), b.to_batch())


def test_windows_of_chosen_runs_and_of_several_stores(sample_store: Store) -> None:
    path = str(sample_store.path)
    runs = [run.name for run in sample_store.select(KIND)][2:4]
    clips = ClipDataset.of(DataConfig(store=path, clip_frames=20), runs=runs)
    assert len(clips) == 12 and {clips[i].run for i in range(12)} == set(runs)
    assert clips[3].targets == ()
    named = DataConfig(stores={"haxby": StoreConfig(path)}, clip_frames=20, select=KIND)
    assert ClipDataset.of(named)[0].subject == "haxby:001"
    with pytest.raises(RecipeError, match=r"data\.store is empty"):
        ClipDataset.of(DataConfig())


def test_targets_of_the_training_data_are_kept(sample_store: Store) -> None:
    config = DataConfig(store=str(sample_store.path), clip_frames=9, select=KIND)
    runs = [run.name for run in sample_store.select(KIND)]
    train = ClipDataset.of(config, TaskConfig(), runs=runs[:6])
    test = ClipDataset.of(config, TaskConfig(), runs=runs[6:], tasks=train.tasks)
    assert test.tasks == train.tasks and len(train) == 48 and len(test) == 24
    sample = test[5]
    assert train.tasks[0].classes[int(sample.targets[0])] == sample.labels[0]


def test_training_settings_change_no_clip(sample_store: Store) -> None:
    path = str(sample_store.path)
    plain = ClipDataset.of(DataConfig(store=path, clip_frames=20, select=KIND))
    moved = DataConfig(store=path, clip_frames=20, select=KIND, windows="random")
    random = ClipDataset.of(moved)
    assert [random[i].start for i in range(6)] == [plain[i].start for i in range(6)]


def test_damage_in_a_worker_is_named(sample_store: Store, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(sample_store.path, tmp_path / "s")
    config = DataConfig(store=str(tmp_path / "s"), clip_frames=20, select=KIND)
    clips = ClipDataset.of(config)
    (tmp_path / "s/sub-001.h5").unlink()
    loader = DataLoader(
        clips, batch_size=4, num_workers=1, multiprocessing_context="spawn", collate_fn=collate
    )
    with pytest.raises(CorruptStoreError, match="is missing"):
        next(iter(loader))
