"""Staged copies: whole or not there, shared by the processes of a node, gone at the end."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from fmrizoo import pipeline
from fmrizoo.config import DataConfig
from fmrizoo.data import staging
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.mixture import Mixture
from fmrizoo.data.staging import staged
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError
from fmrizoo.zoo import load_recipe


@pytest.fixture
def store(sample_store: Store) -> Store:
    return Store(sample_store.path)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder on a node."""
    (tmp_path / "node").mkdir()
    return tmp_path / "node"


def copies(node: Path) -> list[Path]:
    return sorted(node.glob("fmrizoo-*"))


def test_clips_are_the_same_and_come_from_the_copy(store: Store, node: Path) -> None:
    config = DataConfig(clip_frames=12, select={"acquisition": "25mm"})
    found = staged(store, store.select(config.select), node)
    (copy,) = copies(node)
    assert found.path == copy and found.home(found.runs[0]) == copy
    assert copy.stat().st_mode & 0o777 == 0o700  # people's brains in a shared place
    for name in ("index.json", "participants.tsv", "sub-001.h5"):
        assert (copy / name).read_bytes() == (store.path / name).read_bytes()
    one, two = (
        Loader(ClipTable.windows(s, s.select(config.select), config), config, 4).epoch()
        for s in (store, found)
    )
    for a, b in zip(one, two, strict=True):
        assert [s.rows.tobytes() for s in a.samples] == [s.rows.tobytes() for s in b.samples]


def test_the_copy_goes_with_its_last_user(store: Store, node: Path) -> None:
    one, two = (staged(store, store.runs, node) for _ in range(2))
    assert len(copies(node)) == 1
    del one
    gc.collect()
    assert len(copies(node)) == 1 and two.open(two.runs[0]).n_frames == 121
    del two
    gc.collect()
    assert copies(node) == []
    kept = staged(store, store.runs, node, keep=True)
    del kept
    gc.collect()
    assert len(copies(node)) == 1


def _use(path: Path, node: Path, start: Any, done: Any, told: Any) -> None:
    """A rank: stages, says how many files it copied, and waits for the others."""
    copied: list[str] = []
    real = staging._copy
    staging._copy = lambda s, t: (copied.append(s.name), real(s, t))[1]  # type: ignore[func-returns-value]
    start.wait()
    store = Store(path)
    found = staged(store, store.runs, node)
    told.put((len(copied), found.open(found.runs[0]).n_frames))
    done.wait()


def test_ranks_share_one_copy(store: Store, node: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, done, told = spawn.Barrier(3), spawn.Barrier(4), spawn.Queue()
    ranks = [spawn.Process(target=_use, args=(store.path, node, start, done, told)) for _ in "123"]
    for rank in ranks:
        rank.start()
    answers = sorted(told.get(timeout=120) for _ in ranks)
    assert [n for n, _ in answers] == [0, 0, 3] and {frames for _, frames in answers} == {121}
    assert len(copies(node)) == 1
    done.wait()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    assert copies(node) == []


def test_an_interrupted_copy_goes_on(
    store: Store, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, copied = staging._copy, []

    def dies(source: Path, target: Path) -> str:
        if source.suffix == ".h5" and not copied.count("again"):
            target.with_name(target.name + ".part").write_bytes(b"half")
            raise KeyboardInterrupt
        copied.append(source.name)
        return real(source, target)

    monkeypatch.setattr(staging, "_copy", dies)
    with pytest.raises(KeyboardInterrupt):
        staged(store, store.runs, node)
    (copy,) = copies(node)
    assert not (copy / "sub-001.h5").exists() and copied == ["index.json", "participants.tsv"]
    with (copy / "staged.jsonl").open("a") as file:
        file.write('{"file": "sub-0')  # a line that a kill cut off
    copied[:] = ["again"]
    found = staged(store, store.runs, node)
    assert copied == ["again", "sub-001.h5"] and found.open(found.runs[3]).n_frames == 121


def test_a_file_of_another_length_is_copied_again(store: Store, node: Path) -> None:
    first = staged(store, store.runs, node, keep=True)
    file = first.path / "sub-001.h5"
    whole = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(whole[:1000])
    assert staged(store, store.runs, node, keep=True).path == first.path
    assert file.read_bytes() == whole


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_no_room(store: Store, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = sum((store.path / n).stat().st_size for n in os.listdir(store.path) if n[0] != ".")
    usage = _Usage(2 * need, need, need - 1)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=rf"has {need - 1} bytes free, but the 3 files .* {need}:"):
        staged(store, store.runs, node)
    monkeypatch.undo()
    assert staged(store, store.runs, node).runs  # nothing is left locked


def test_a_copy_that_differs_is_refused(
    store: Store, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        def hexdigest(self) -> str:
            return "0"

    monkeypatch.setattr(staging.hashlib, "file_digest", lambda *_: Other())
    with pytest.raises(DataError, match=r"index\.json is not what was read from"):
        staged(store, store.runs, node)


def test_folders_that_make_no_sense(
    store: Store, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"data\.stage=\S+nowhere is no folder"):
        staged(store, store.runs, node / "nowhere")
    first = staged(store, store.runs, node)
    (copy,) = copies(node)
    other = copy.rename(node / "elsewhere")
    copy.symlink_to(other)
    with pytest.raises(DataError, match="is not yours"):
        staged(store, store.runs, node)
    copy.unlink()
    other.rename(copy)
    assert first.path == copy


def test_several_stores(store: Store, node: Path, tree: Any, made: Any) -> None:
    tree.add("01")
    tree.add("02")
    other = made(tree.root)
    mixture = Mixture({"a": store.path, "b": other.path})
    runs = [run for run in mixture.runs if run.name != "sub-b:02_task-rest_run-1"]
    found = staged(mixture, runs, node)
    assert len(copies(node)) == 2
    assert isinstance(found, Mixture) and found.runs[0].name == mixture.runs[0].name
    assert found.open("sub-b:01_task-rest_run-1").n_frames == 12
    staged_files = {p.name for c in copies(node) for p in c.glob("*.h5")}
    assert staged_files == {"sub-001.h5", "sub-01.h5"}


def test_pretraining_from_a_copy(store: Store, node: Path, tmp_path: Path) -> None:
    tiny = ["backbone.embed_dim=8", "backbone.num_heads=[1,2]", "train.steps=2"]
    given = [f"data.store={store.path}", "train.batch_size=4", *tiny]
    plain = pipeline.pretrain(load_recipe("pretrain/haxby_slice", given), tmp_path / "plain")
    recipe = load_recipe("pretrain/haxby_slice", [*given, f"data.stage={node}"])
    copied = pipeline.pretrain(recipe, tmp_path / "copied")
    assert copied.metrics["loss"] == plain.metrics["loss"]
    gc.collect()
    assert copies(node) == []
    rows = (tmp_path / "copied/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 2


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_the_command_line_stages(command: str, store: Store, node: Path, tmp_path: Path) -> None:
    from fmrizoo.cli import app

    given = [command, f"{command}/haxby_slice", f"data.store={store.path}"]
    asked = [*given, "--out", str(tmp_path / "run"), "--stage", str(node / "nowhere")]
    done = CliRunner().invoke(app, asked)
    assert isinstance(done.exception, DataError)
    assert "nowhere is no folder" in str(done.exception)
