"""What comes out of a store is what went in, and damaged bytes never come out at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest

from fmrizoo.config import PrepareConfig
from fmrizoo.data.prepare import prepare
from fmrizoo.data.reader import RunReader
from fmrizoo.data.sample import sample_path
from fmrizoo.data.store import Store, common_contract, read_table
from fmrizoo.errors import CorruptStoreError, DataError

RUN = "sub-001_task-objects_acq-{}_run-03"


def source(acquisition: str) -> tuple[np.ndarray, np.ndarray]:
    """Run 3 and its mask in RAS (the sample is LAS: x is flipped)."""
    root = sample_path()
    bold = nib.load(root / "sub-001/func" / f"{RUN.format(acquisition)}_bold.nii.gz")
    mask = nib.load(
        root / "derivatives/masks/sub-001/func"
        f"/sub-001_task-objects_acq-{acquisition}_desc-brain_mask.nii.gz"
    )
    return bold.get_fdata(dtype=np.float32)[::-1], np.asarray(mask.dataobj)[::-1] > 0


@pytest.mark.parametrize("acquisition", ["1slice", "25mm"])
@pytest.mark.parametrize("codec", ["int8", "gzip"])
def test_values_come_back(acquisition: str, codec: str, made: Callable[..., Store]) -> None:
    store = made("sample:haxby2001", codec=codec, select={"acquisition": acquisition, "run": "3"})
    bold, mask = source(acquisition)
    reader = store.open(RUN.format(acquisition))
    assert np.array_equal(reader.mask, mask)
    got = reader.read(0, reader.n_frames)
    assert got.shape == bold.shape and got.dtype == np.float32
    assert (got[~mask] == 0).all()
    error = got[mask] - bold[mask]
    sd = bold[mask].std(1)
    assert np.sqrt(np.mean((error[sd > 0].std(1) / sd[sd > 0]) ** 2)) < 0.01
    inside = bold[mask].astype(np.float64)
    low, middle, high = np.percentile(inside, [25, 50, 75])
    expected = {"mean": inside.mean(), "std": inside.std(), "min": inside.min()}
    expected |= {"max": inside.max(), "median": middle, "iqr": high - low}
    assert reader.statistics == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("start, n, stride", [(0, 1, 1), (5, 20, 1), (7, 6, 3), (120, 1, 1)])
@pytest.mark.parametrize("codec", ["int8", "gzip"])
def test_windows_and_strides(
    start: int, n: int, stride: int, codec: str, made: Callable[..., Store]
) -> None:
    store = made("sample:haxby2001", codec=codec, select={"acquisition": "25mm", "run": "03"})
    reader = store.open(store.runs[0])
    whole = reader.read(0, reader.n_frames)
    assert np.array_equal(
        reader.read(start, n, stride), whole[..., start : start + n * stride : stride]
    )
    out = np.empty((n, reader.row), reader.dtype)
    assert reader.read_compact(start, n, stride, out) is out
    assert np.array_equal(out, reader.read_compact(start, n, stride))


def test_frames_outside_the_run_are_refused(sample_store: Store) -> None:
    reader = sample_store.open(sample_store.runs[0])
    for start, n, stride in [
        (-1, 2, 1),
        (0, 122, 1),
        (120, 2, 1),
        (0, 42, 3),
        (0, 0, 1),
        (0, 1, 0),
    ]:
        with pytest.raises(DataError, match="121 frames"):
            reader.read_compact(start, n, stride)
    with pytest.raises(ValueError, match="C-contiguous"):
        reader.read_compact(0, 2, out=np.empty((2, reader.row + 1), reader.dtype))


@pytest.mark.parametrize("codec", ["int8", "gzip"])
def test_plain_h5py_reads_it(codec: str, made: Callable[..., Store]) -> None:
    store = made("sample:haxby2001", codec=codec, select={"acquisition": "25mm", "run": "3"})
    run = store.runs[0]
    bold, mask = source("25mm")
    with h5py.File(store.path / run.file) as file:
        group = file[run.name]
        scale = group["scale"][()].astype(np.float64)
        if codec == "int8":
            assert group["bold"].chunks is None
            flat = [np.arange(a, a + n) for a, n in group["mask_runs"][()]]
            values = group["offset"][()] + scale * group["bold"][:, : run.n_vox]
            assert np.array_equal(np.concatenate(flat), np.flatnonzero(mask))
        else:
            assert group["bold"].chunks == (1, 6, 10, 10) and group["bold"].compression == "gzip"
            values = (group["offset"][()] + scale * group["bold"][()].astype(float))[:, mask]
        assert np.abs(values - bold[mask].T).max() < 0.02 * bold[mask].std()


def test_no_variable_length_strings(sample_store: Store) -> None:
    with h5py.File(sample_store.path / sample_store.runs[0].file) as file:

        def check(name: str, item: h5py.HLObject) -> None:
            assert not isinstance(item, h5py.Dataset) or item.dtype.kind != "O", name
            for key in item.attrs:
                assert item.attrs.get_id(key).dtype.kind != "O", (name, key)

        check("/", file)
        file.visititems(check)


def test_long_rows_lie_on_pages(tmp_path: Path, tree: Any) -> None:
    from fmrizoo.data.codec import encode
    from fmrizoo.data.hdf5 import SubjectWriter

    rng = np.random.default_rng(0)
    mask = np.ones((50, 50, 30), bool)
    bold = rng.normal(1000, 10, (3, 75000)).astype(np.float32)
    with SubjectWriter(tmp_path / "sub-1.h5", "1") as writer:
        for name in ("a", "b"):
            meta = {"name": name, "uuid": name * 8, "grid": [50, 50, 30]}
            writer.add(meta, encode(bold, "int8", 0.02), mask)
    for name in ("a", "b"):
        reader = RunReader(tmp_path / "sub-1.h5", name)
        assert reader._offset % 4096 == 0 and reader.row % 4096 == 0
        assert np.abs(reader.read(0, 3).reshape(-1, 3).T - bold).max() < 0.2


# --- the store ------------------------------------------------------------------------------------


def test_runs_and_selection(sample_store: Store) -> None:
    assert len(sample_store.runs) == 18
    assert [r.name for r in sample_store.select({"acq": "25mm", "run": "7"})] == [
        "sub-001_task-objects_acq-25mm_run-07"
    ]
    assert len(sample_store.select({"subject": "sub-001", "acquisition": "1slice"})) == 9
    with pytest.raises(DataError, match="18 runs"):
        sample_store.select({"run": "10"})
    with pytest.raises(DataError, match="Did you mean 'acquisition'"):
        sample_store.select({"acquisitoin": "25mm"})
    with pytest.raises(DataError, match="Did you mean"):
        sample_store["sub-001_task-objects_acq-25mm_run-10"]


def test_contract_is_shared_or_refused(sample_store: Store) -> None:
    contract = common_contract(sample_store.select({"acquisition": "1slice"}))
    assert (contract.grid, contract.tr, contract.orientation) == ((40, 20, 1), 2.5, "RAS")
    assert contract.voxel_size == pytest.approx((3.1, 3.75, 3.75), abs=1e-3)
    with pytest.raises(DataError, match=r"grid: expected .*data\.select"):
        _ = sample_store.contract


def test_summary_counts(sample_store: Store) -> None:
    summary = sample_store.summary()
    assert (summary["subjects"], summary["runs"], summary["frames"]) == (1, 18, 18 * 121)
    assert summary["bytes"] == sum(p.stat().st_size for p in sample_store.path.glob("*.h5"))
    assert summary["stored_as"] == {"int8": 18} and len(summary["contracts"]) == 2
    assert "face" in summary["trial_types"]
    json.dumps(summary)


def test_participants_are_text(tmp_path: Path, tree: Any) -> None:
    tree.add()
    (tree.root / "participants.tsv").write_text("participant_id\tage\tsex\nsub-01\t033\tn/a\n")
    prepare(tree.root, tmp_path / "s", PrepareConfig(space="native"))
    table = Store(tmp_path / "s").participants
    assert table is not None
    assert table["age"][0] == "033" and table["sex"].isna()[0]


def test_rows_longer_than_the_header(tmp_path: Path) -> None:
    """pandas would take the first column for an index: every cell one column off."""
    file = tmp_path / "people.tsv"
    file.write_text("participant_id\tage\nsub-01\t30\textra\n")
    with pytest.raises(DataError, match=r"people\.tsv is not a tab-separated table"):
        read_table(file)
    file.write_text("participant_id\tage\nsub-01\t30\t\nsub-02\t31\t\n")  # tabs at the ends
    assert list(read_table(file)["age"]) == ["30", "31"]


def test_readers_are_shared_bounded_and_closed(sample_store: Store) -> None:
    store = Store(sample_store.path, cache=2)
    before = set(os.listdir("/proc/self/fd"))
    first = store.open(store.runs[0])
    assert store.open(store.runs[0]) is first
    for run in store.runs:
        store.open(run)
    # Evicted but in use: still readable, by its own descriptor.
    assert first.read(0, 2).shape == (40, 20, 1, 2)
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 3
    del first
    store.close()
    assert set(os.listdir("/proc/self/fd")) - before == set()


def test_threads_read_the_same(sample_store: Store) -> None:
    store = Store(sample_store.path, cache=1)  # constant eviction under the readers' feet
    expected = {r.name: sample_store.open(r).read_compact(10, 5) for r in store.runs}
    wrong: list[str] = []

    def work(offset: int) -> None:
        for k in range(60):
            run = store.runs[(k + offset) % len(store.runs)]
            if not np.array_equal(store.open(run).read_compact(10, 5), expected[run.name]):
                wrong.append(run.name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_store_can_be_pickled(sample_store: Store) -> None:
    sample_store.open(sample_store.runs[0])
    again = pickle.loads(pickle.dumps(sample_store))
    assert [r.name for r in again.runs] == [r.name for r in sample_store.runs]


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def copy(sample_store: Store, tmp_path: Path) -> Path:
    """A store folder that may be damaged."""
    out = tmp_path / "copy"
    shutil.copytree(sample_store.path, out)
    (out / "sub-001.h5").chmod(0o644)
    return out


@pytest.fixture
def tiny(tmp_path: Path, tree: Any) -> Callable[[str], Store]:
    """A store of one small run: few enough bytes to damage all of them."""

    def make(codec: str) -> Store:
        tree.add(data=np.random.default_rng(0).integers(100, 900, (4, 4, 3, 6)).astype(np.int16))
        prepare(tree.root, tmp_path / codec, PrepareConfig(space="native", codec=codec))
        store = Store(tmp_path / codec)
        (store.path / store.runs[0].file).chmod(0o644)
        return store

    return make


def read_everything(path: Path) -> np.ndarray:
    store = Store(path)
    reader = store.open(store.runs[0])
    return reader.read(0, reader.n_frames)


@pytest.mark.parametrize("codec", ["int8", "gzip"])
def test_no_flipped_bit_goes_unnoticed(codec: str, tiny: Callable[[str], Store]) -> None:
    store = tiny(codec)
    good = read_everything(store.path)
    file = store.path / store.runs[0].file
    content = file.read_bytes()
    places = [i for i, byte in enumerate(content) if byte]  # unused space is zero
    rng = np.random.default_rng(0)
    raised = 0
    for place in rng.choice(places, min(len(places), 600), replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            assert np.array_equal(read_everything(store.path), good), f"silent at byte {place}"
        except CorruptStoreError as error:
            raised += 1
            assert file.name in str(error)
    assert raised > 400


@pytest.mark.parametrize("codec", ["int8", "gzip"])
def test_truncation_is_noticed(codec: str, tiny: Callable[[str], Store]) -> None:
    store = tiny(codec)
    file = store.path / store.runs[0].file
    content = file.read_bytes()
    for keep in np.linspace(0, len(content) - 1, 40).astype(int):
        file.write_bytes(content[:keep])
        with pytest.raises(CorruptStoreError):
            read_everything(store.path)


def test_damaged_frames_are_named(copy: Path) -> None:
    store = Store(copy)
    run = store.runs[4]
    reader = store.open(run)
    row = reader.row * reader.dtype.itemsize
    with open(copy / run.file, "r+b") as file:

        def frame(t: int) -> bytes:
            return os.pread(file.fileno(), row, reader._offset + t * row)

        seven, nine = frame(7), frame(9)
        os.pwrite(file.fileno(), nine, reader._offset + 7 * row)  # two frames swapped
        os.pwrite(file.fileno(), seven, reader._offset + 9 * row)
        os.pwrite(file.fileno(), bytes(row), reader._offset + 50 * row)  # one frame zeroed
    for t in (7, 9, 50):
        with pytest.raises(CorruptStoreError, match=rf"sub-001\.h5, run {run.name}: frame {t} "):
            reader.read_compact(t, 1)
    assert reader.read(10, 40).shape[-1] == 40
    faults = store.verify()
    assert [(f.run, f.file) for f in faults] == [(run.name, "sub-001.h5")] * 3
    assert Store(copy).verify() == faults


def test_a_foreign_or_missing_file_is_noticed(copy: Path, tmp_path: Path) -> None:
    prepare("sample:haxby2001", tmp_path / "other", PrepareConfig(space="native"))
    shutil.copy(tmp_path / "other/sub-001.h5", copy / "sub-001.h5")
    with pytest.raises(CorruptStoreError, match="after the index"):
        read_everything(copy)
    (copy / "sub-001.h5").unlink()
    with pytest.raises(CorruptStoreError, match="missing"):
        read_everything(copy)
    assert Store(copy).summary()["missing_files"] == ["sub-001.h5"]
    assert len(Store(copy).verify()) == 18


def test_an_unfinished_file_is_refused(copy: Path) -> None:
    with h5py.File(copy / "sub-001.h5", "r+") as file:
        del file.attrs["complete"]
    with pytest.raises(CorruptStoreError, match="not written to its end"):
        read_everything(copy)


def test_the_index_is_checked(copy: Path, tmp_path: Path) -> None:
    text = (copy / "index.json").read_text()
    (copy / "index.json").write_text(text.replace('"tr":2.5', '"tr":2.4', 1))
    with pytest.raises(CorruptStoreError, match="checksum"):
        Store(copy)
    (copy / "index.json").write_text(text[: len(text) // 2])
    with pytest.raises(CorruptStoreError, match="damaged"):
        Store(copy)
    with pytest.raises(DataError, match="does not exist"):
        Store(tmp_path / "nowhere")
    with pytest.raises(DataError, match="fmrizoo prepare"):
        Store(tmp_path)
