"""Real trainings whose readers fail, whose store changes under them, and whose clocks lie."""

from __future__ import annotations

import ast
import itertools
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import thread as pool_module
from pathlib import Path
from typing import Any

import pytest
from trainer_tiny import inputs, timeless

from fmrizoo.config import PrepareConfig, Recipe
from fmrizoo.data.dataset import ClipDataset
from fmrizoo.data.prepare import prepare
from fmrizoo.data.store import Store, subject_files
from fmrizoo.errors import CorruptStoreError, DataError
from fmrizoo.pipeline import pretrain
from fmrizoo.trainer.inputs import StepEvent
from fmrizoo.trainer.loop import train
from fmrizoo.zoo import load_recipe

ROOT = Path(__file__).parents[2] / "fmrizoo"


@pytest.fixture
def store(tmp_path: Path, sample_store: Path) -> Path:
    """The sample's store, to be harmed."""
    copy = tmp_path / "store"
    shutil.copytree(sample_store, copy)
    return copy


@pytest.fixture
def recipe(store: Path, tiny: list[str]) -> Recipe:
    values = [*tiny, "train.steps=6", "train.save_every=2", f"data.store={store}"]
    return load_recipe("pretrain/haxby_swin4d_simmim", values)


def at_clip(number: int, do: Callable[[], Any], patch: pytest.MonkeyPatch) -> None:
    """Let reading the so-many-th clip of a training do this instead."""
    count, read = itertools.count(1), ClipDataset.read

    def wrapped(self: ClipDataset, *args: Any, **kwargs: Any) -> Any:
        if next(count) == number:
            do()
        return read(self, *args, **kwargs)

    patch.setattr(ClipDataset, "read", wrapped)


def raising(error: BaseException) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


@pytest.mark.parametrize("error", [ValueError("bad stride"), SystemExit(0), MemoryError()])
def test_failing_reader_names_the_clip(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """SystemExit would end a thread in silence, or the whole run with exit code 0."""
    at_clip(14, raising(error), monkeypatch)
    words = rf"reading \S+\.h5, run sub-\S+, clip from frame \d+ failed with {type(error).__name__}"
    with pytest.raises(DataError, match=words) as caught:
        pretrain(recipe, tmp_path / "run")
    assert caught.value.__cause__ is error
    monkeypatch.undo()
    assert pretrain(recipe, tmp_path / "run").resumed_from == 2


def test_reader_that_ends_without_a_word(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is gone and nobody will ever answer for its clip: no wait without end."""
    count, run = itertools.count(1), pool_module._WorkItem.run

    def wrapped(self: Any) -> None:
        if next(count) == 14:
            raise SystemExit  # outside of what the pool reports
        run(self)

    monkeypatch.setattr(pool_module._WorkItem, "run", wrapped)
    with pytest.raises(DataError, match=r"reader thread ended without a word; \S+\.h5, run sub-"):
        pretrain(recipe, tmp_path / "run")


def overwrite_frames(store: Path, file: Path) -> None:
    """All frames of a file, in place; its metadata stay as they are."""
    found = Store(store)
    for run in (run for run in found.runs if run.file == file.name):
        reader = found.open(run)
        with file.open("r+b") as opened:
            opened.seek(reader._offset)
            opened.write(b"\x55" * (reader.n_frames * reader.row * reader.dtype.itemsize))


def harm(store: Path, how: str, other: Path) -> None:
    for file in subject_files(store):
        os.chmod(file, 0o644)
        if how == "truncated":
            os.truncate(file, file.stat().st_size // 3)
        elif how == "overwritten":
            overwrite_frames(store, file)
        elif how == "replaced":
            shutil.copy(other / file.name, file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)


@pytest.fixture(scope="module")
def prepared_again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recordings in another store: other files under the same names."""
    store = tmp_path_factory.mktemp("again") / "store"
    prepare("sample:haxby2001", store, PrepareConfig(space="native"))
    return store


@pytest.mark.parametrize(
    ("how", "said"), [("truncated", "is cut off"), ("overwritten", "fails its checksum")]
)
def test_store_changed_while_it_is_read(
    tmp_path: Path, store: Path, recipe: Recipe, prepared_again: Path, how: str, said: str
) -> None:
    recipe.train.steps = 40

    def change(event: StepEvent) -> None:
        if event.step == 3:
            harm(store, how, prepared_again)

    with pytest.raises(CorruptStoreError, match=rf"\.h5, run sub-.*frame \d+ {said}"):
        pretrain(recipe, tmp_path / "run", on_step=change)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-000002\n"
    with pytest.raises(CorruptStoreError, match=r"\.h5, run sub-"):
        pretrain(recipe, tmp_path / "run")


def test_file_replaced_between_start_and_resume(
    tmp_path: Path, store: Path, recipe: Recipe, prepared_again: Path
) -> None:
    interrupted(recipe, tmp_path / "run")
    harm(store, "replaced", prepared_again)
    with pytest.raises(CorruptStoreError, match=r"was written after the index: run prepare again"):
        pretrain(recipe, tmp_path / "run")


def test_store_prepared_again_between_start_and_resume(
    tmp_path: Path, store: Path, recipe: Recipe, prepared_again: Path, sample_store: Path
) -> None:
    """Whole in itself, and another data set under the same names."""
    interrupted(recipe, tmp_path / "run")
    shutil.rmtree(store)
    shutil.copytree(prepared_again, store)
    with pytest.raises(DataError, match=r"more runs were prepared again since the training in"):
        pretrain(recipe, tmp_path / "run")
    shutil.rmtree(store)
    shutil.copytree(sample_store, store)
    assert pretrain(recipe, tmp_path / "run").resumed_from == 2


def interrupted(recipe: Recipe, out: Path) -> None:
    """A run that ends after three steps."""

    def end(event: StepEvent) -> None:
        if event.step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pretrain(recipe, out, on_step=end)


def test_folder_from_before_there_was_a_list_of_recordings(tmp_path: Path, recipe: Recipe) -> None:
    interrupted(recipe, tmp_path / "run")
    (tmp_path / "run" / "store.json").unlink()
    assert pretrain(recipe, tmp_path / "run").resumed_from == 2
    (tmp_path / "run" / "store.json").write_text("{")
    with pytest.raises(DataError, match=r"store\.json cannot be read"):
        pretrain(recipe, tmp_path / "run")


# --- clocks ---------------------------------------------------------------------------------------


def test_clock_that_goes_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day back at every look, and checkpoints from the future: the same steps all the same."""
    train(inputs(tmp_path / "true", dropout=0.3))
    now, seen = time.time(), itertools.count()
    monkeypatch.setattr(time, "time", lambda: now - 86_400 * next(seen))

    def end(event: StepEvent) -> None:
        if event.step == 5:
            raise ZeroDivisionError

    lying = inputs(tmp_path / "lying", dropout=0.3, save_every=2)
    lying.on_step = end
    with pytest.raises(ZeroDivisionError):
        train(lying)
    # The oldest is the newest by its date, and all are of next year.
    ages = {"step-000002": 400, "step-000004": 380}
    for name, days in ages.items():
        for path in [*(tmp_path / "lying" / "checkpoints" / name).rglob("*"),
                     tmp_path / "lying" / "checkpoints" / name]:  # fmt: skip
            os.utime(path, (now + 86_400 * days, now + 86_400 * days))
    done = train(inputs(tmp_path / "lying", dropout=0.3, save_every=2))
    assert done.resumed_from == 4 and done.seconds >= 0
    assert timeless(tmp_path / "lying") == timeless(tmp_path / "true")
    from trainer_tiny import rows

    seconds = [row["seconds"] for row in rows(tmp_path / "lying")]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert all(row["clips_per_second"] > 0 for row in rows(tmp_path / "lying"))


def test_nothing_asks_the_clock_on_the_wall() -> None:
    """What decides (checkpoints, locks, waiting) counts monotonic time, steps and checksums."""
    wall = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "os.path.getmtime"}
    # A cache in memory of a file that a person edits: in doubt it is read again.
    allowed = {"data/synthetic/source.py"}
    found = []
    for room in ("trainer", "data", "pipeline", "files.py"):
        place = ROOT / room
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    text = ast.unparse(node)
                    if text in wall or node.attr.startswith(("st_mtime", "st_ctime", "st_atime")):
                        found.append((name, text))
    assert {name for name, _ in found} <= allowed, found
