"""A synthetic cohort as a source of ``prepare``: runs are made when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fmrizoo.config import PrepareConfig
from fmrizoo.data.bids import RunFile
from fmrizoo.data.synthetic.anatomy import Anatomy, anatomy
from fmrizoo.data.synthetic.cohort import person
from fmrizoo.data.synthetic.config import SynthConfig
from fmrizoo.data.synthetic.run import MadeRun, RunId, make_run, run_ids, run_key
from fmrizoo.data.synthetic.truth import digest, read_cached
from fmrizoo.errors import DataError

LAYOUT = "synth"
_FREE = ("codec", "max_error", "select", "qc", "desc", "on_tr_conflict")  # may differ from synth's


def find_synthetic(source: Path, config: PrepareConfig) -> list[RunFile]:
    """All runs of the cohort that ``source``, a synth.json, describes.

    Raises:
        DataError: not such a file, or settings that need files of the cohort.
    """
    made = _config(source)
    asked, own = asdict(config), asdict(made.prepare)
    if different := [k for k in own if k not in _FREE and asked[k] != own[k]]:
        key = different[0]
        raise DataError(
            f"{source} describes runs of prepare.{key}={own[key]}, not {asked[key]}: change it "
            f"there, or write the cohort as files and prepare those"
        )
    return [
        RunFile(key=run_key(made, who), path=source, tr=made.tr, layout=LAYOUT)
        for who in run_ids(made)
    ]


def synthetic_fingerprint(run: RunFile, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is made from."""
    sums = {"bold": digest(_config(run.path))}
    return {"sha256": sums, "tr": run.tr, "settings": settings}


def make(run: RunFile) -> tuple[MadeRun, Anatomy]:
    """The run, and the brain that its voxels are of."""
    config = _config(run.path)
    who = RunId(int(run.key.subject) - 1, int(run.key.session or 1) - 1, int(run.key.run or 1) - 1)
    return make_run(config, person(config, who.subject), who), anatomy(config)


def _config(path: Path) -> SynthConfig:
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return read_cached(path, modified)
