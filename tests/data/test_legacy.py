"""Stores from SwiFT's frames and dense HDF5: the same values, and a contract that says unknown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fmrizoo.config import PrepareConfig
from fmrizoo.data.prepare import prepare
from fmrizoo.data.qc import assess
from fmrizoo.data.store import Store, common_contract
from fmrizoo.errors import DataError
from fmrizoo.report.qc import write_page

CONFIG = PrepareConfig()


def frames(seed: int = 0, n: int = 24) -> np.ndarray:
    """z-scores in a box, background at the smallest of them, fp16 as SwiFT saves them."""
    data = np.random.default_rng(seed).standard_normal((6, 7, 5, n))
    brain = np.zeros((6, 7, 5), bool)
    brain[1:5, 1:6, 1:] = True
    data[~brain] = data[brain].min()
    return data.astype(np.float16)


def swift(root: Path, subject: str, data: np.ndarray) -> Path:
    folder = root / subject
    folder.mkdir(parents=True)
    for t in range(data.shape[3]):
        torch.save(torch.from_numpy(data[..., t : t + 1].copy()), folder / f"frame_{t}.pt")
    return folder


def dense(root: Path, subject: str, data: np.ndarray, name: str = "fmri_data") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with h5py.File(root / f"{subject}.h5", "w") as file:
        file.create_dataset(name, data=data, compression="gzip", chunks=True)
    return root / f"{subject}.h5"


@pytest.mark.parametrize("layout", ["swift", "hdf5"])
@pytest.mark.parametrize("told", [True, False])
def test_values_come_through_in_numeric_order(layout: str, told: bool, tmp_path: Path) -> None:
    write = swift if layout == "swift" else dense
    write(tmp_path / "old", "NDAR_INV1", frames(1))
    write(tmp_path / "old", "100206", frames(2))
    (tmp_path / "old/participants.tsv").write_text("participant_id\nsub-100206\n")
    prepare(tmp_path / "old", tmp_path / "s", CONFIG, layout=layout if told else "auto")
    store = Store(tmp_path / "s")
    assert [r.name for r in store.runs] == ["sub-100206", "sub-NDARINV1"]
    assert store.verify() == [] and store.participants is not None
    reader = store.open("sub-NDARINV1")
    assert reader.mask.sum() == 4 * 5 * 4 and reader.n_frames == 24
    wanted = frames(1).astype(np.float32)
    assert np.abs(reader.read(0, 24) - wanted)[reader.mask].max() < 0.02  # int8 of ±4 s.d.
    contract = store.contract
    assert (contract.space, contract.orientation, contract.tr) == ("unknown", "unknown", 0.0)
    assert contract.voxel_size == (0.0, 0.0, 0.0) and contract.grid == (6, 7, 5)
    again = prepare(tmp_path / "old", tmp_path / "s", CONFIG)
    assert len(again.kept) == 2 and not again.prepared


def test_unknown_does_not_mix_with_known(tree: Any, tmp_path: Path) -> None:
    swift(tmp_path / "old/img", "1", frames())  # SwiFT's own folder has img/ and metadata/
    prepare(tmp_path / "old", tmp_path / "s", PrepareConfig(space="native"))
    tree.add("02")
    prepare(tree.root, tmp_path / "t", PrepareConfig(space="native"))
    both = [*Store(tmp_path / "s").runs, *Store(tmp_path / "t").runs]
    with pytest.raises(DataError, match="space: expected unknown, found native"):
        common_contract(both)
    with pytest.raises(DataError, match=r"other settings \(layout\)"):
        prepare(tree.root, tmp_path / "s", PrepareConfig(space="native"))
    with pytest.raises(DataError, match=r"other settings \(layout\)"):
        prepare(tmp_path / "old", tmp_path / "t", PrepareConfig(space="native"))
    prepare(tmp_path / "old", tmp_path / "u", PrepareConfig(tr=0.72))
    assert Store(tmp_path / "u").contract.tr == 0.72


def test_the_quality_page_of_unknown_axes(tmp_path: Path) -> None:
    swift(tmp_path / "old", "1", frames())
    prepare(tmp_path / "old", tmp_path / "s", CONFIG)
    store = Store(tmp_path / "s")
    rows = assess(store, CONFIG.qc)
    assert rows[0].measures["tsnr"] is None and not rows[0].flags  # normalised: no mean signal
    write_page(store, rows, tmp_path / "qc.html", CONFIG.qc)
    assert '<span class="l">?</span>' in (tmp_path / "qc.html").read_text()


def test_a_changed_frame_is_prepared_again(tmp_path: Path) -> None:
    folder = swift(tmp_path / "old", "1", frames())
    prepare(tmp_path / "old", tmp_path / "s", CONFIG)
    torch.save(torch.from_numpy(frames(3)[..., :1].copy()), folder / "frame_7.pt")
    assert prepare(tmp_path / "old", tmp_path / "s", CONFIG).prepared == ["sub-1"]


def test_bad_frames(tmp_path: Path) -> None:
    folder = swift(tmp_path / "old", "1", frames())

    def refused(said: str, **settings: Any) -> None:
        with pytest.raises(DataError, match=said):
            prepare(tmp_path / "old", tmp_path / "s", PrepareConfig(**settings))

    refused(r"prepare\.mask=compute cannot be applied", mask="compute")
    refused(r"prepare\.target_tr=2\.0 cannot be applied", target_tr=2.0)
    refused(r"1 frame\(s\) are left", dummy_scans=23)
    good = (folder / "frame_9.pt").read_bytes()
    for content in (good[: len(good) // 2], b"", b"hello"):
        (folder / "frame_9.pt").write_bytes(content)
        refused(r"frame_9\.pt is not a saved tensor")
    torch.save({"a": 1}, folder / "frame_9.pt")
    refused(r"frame_9\.pt is not a saved tensor")
    torch.save(os.getcwd, folder / "frame_9.pt")  # code is never run from such a file
    refused(r"frame_9\.pt is not a saved tensor")
    torch.save(torch.zeros(6, 7, 4, 1), folder / "frame_9.pt")
    refused(r"frame_9\.pt has shape \(6, 7, 4\), frame 0 has \(6, 7, 5\)")
    torch.save(torch.zeros(6, 7), folder / "frame_9.pt")
    refused(r"frame_9\.pt has shape \(6, 7\): a frame is")
    torch.save(torch.full((6, 7, 5, 1), float("nan")), folder / "frame_9.pt")
    refused("NaN or infinite")
    (folder / "frame_9.pt").unlink()
    (folder / "frame_11.pt").unlink()
    refused(r"lacks 2 of them, the first is frame_9\.pt")
    assert not (tmp_path / "s").exists()


def test_bad_files(tmp_path: Path) -> None:
    path = dense(tmp_path / "old", "1", frames()[..., 0][..., :4].copy())

    def refused(said: str, layout: str = "hdf5") -> None:
        with pytest.raises(DataError, match=said):
            prepare(tmp_path / "old", tmp_path / "s", CONFIG, layout=layout)

    refused(r"fmri_data is float16 \(6, 7, 4\), numbers \(x, y, z, t\)")
    dense(tmp_path / "old", "1", np.zeros((6, 7, 5, 8), np.float16))
    refused("the one value 0 everywhere")
    dense(tmp_path / "old", "1", frames(), name="bold")
    refused(r"no run in .*<subject>\.h5 with the dataset 'fmri_data'")
    path.write_bytes(path.read_bytes()[:300])
    refused(r"1\.h5 is not an HDF5 file")
    refused(r"no run in .*<subject>/frame_0\.pt", "swift")
    refused("layout 'swft' is not known. Did you mean 'swift'", "swft")
