"""Synthetic recordings for the benchmarks of the data room, and stores of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fmrizoo.config import PrepareConfig
from fmrizoo.data.codec import encode
from fmrizoo.data.hdf5 import SubjectWriter
from fmrizoo.data.process import statistics as run_statistics
from fmrizoo.data.spatial import place, target_affine
from fmrizoo.data.store import write_index
from fmrizoo.types import Contract

WINDOW = 20
GRID = (96, 96, 96)
TR = 0.8


def brain() -> tuple[np.ndarray, np.ndarray]:
    """Nilearn's MNI152 brain mask on the stored grid, and a tissue-like mean image."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    config = PrepareConfig()
    mask_image = load_mni152_brain_mask(resolution=2)
    template = load_mni152_template(resolution=2)
    mask, _ = place(np.asarray(mask_image.dataobj) > 0, mask_image.affine, config, nearest=True)
    tissue, _ = place(template.get_fdata(dtype=np.float32), template.affine, config)
    return mask, tissue[mask]


def synthetic(tissue: np.ndarray, frames: int, seed: int) -> np.ndarray:
    """``(frames, n_vox)`` like EPI: tSNR about 50, drift, lag-1 correlation 0.4, whole numbers."""
    rng = np.random.default_rng(seed)
    mean = 3000 + 9000 * tissue / tissue.max()
    noise = rng.standard_normal((frames, tissue.size), dtype=np.float32)
    for t in range(1, frames):
        noise[t] = 0.4 * noise[t - 1] + 0.92 * noise[t]
    drift = np.linspace(-1, 1, frames, dtype=np.float32)[:, None]
    out = mean + mean / 50 * (noise + drift * rng.standard_normal(tissue.size, dtype=np.float32))
    return np.rint(out).astype(np.float32)


def write_store(
    folder: Path, recordings: Iterable[np.ndarray], mask: np.ndarray, codec: str = "int8"
) -> Path:
    """A store with one subject for each of ``recordings (frames, n_vox)``.

    The same array several times in a row is encoded once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contract = Contract("MNI152NLin2009cAsym", "RAS", GRID, (2.0, 2.0, 2.0), TR)
    entries = []
    last = encoded = summary = None
    for number, bold in enumerate(recordings):
        if bold is not last:
            last, encoded, summary = bold, encode(bold, codec, 0.02), run_statistics(bold)
        subject = f"{number:03d}"
        meta = {
            "name": f"sub-{subject}_task-rest",
            "uuid": f"{number:032x}",
            "key": {"subject": subject, "session": "", "task": "rest", "acquisition": ""}
            | {"run": "", "extra": []},
            "tr": contract.tr,
            "grid": list(GRID),
            "affine": target_affine(PrepareConfig()).tolist(),
            "contract": contract.to_dict(),
            "events": [],
            "statistics": summary,
            "fingerprint": {},
        }
        file = f"sub-{subject}.h5"
        assert encoded is not None
        with SubjectWriter(folder / file, subject) as writer:
            writer.add(meta, encoded, mask)
        entries.append({**writer.entries[0], "file": file})
    write_index(folder, entries, "benchmark")
    return folder
