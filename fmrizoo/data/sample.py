"""The data that comes with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fmrizoo.errors import DataError
from fmrizoo.registry import suggest

PREFIX = "sample:"


def sample_names() -> list[str]:
    """Names that :func:`sample_path` knows."""
    folder = Path(str(files("fmrizoo.data"))) / "sample"
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def sample_path(name: str = "haxby2001") -> Path:
    """Folder of a BIDS data set inside the package.

    ``haxby2001``: subject 1 of Haxby et al. (2001), nine runs of eight object categories, as the
    whole brain at 25 mm (``acquisition: 25mm``) and half an axial slice at native resolution
    (``acquisition: 1slice``). Licence and citation: the notice file in the folder.

    Raises:
        DataError: no such sample.
    """
    known = sample_names()
    if name not in known:
        raise DataError(f"no sample data {name!r}.{suggest(name, known)}")
    return Path(str(files("fmrizoo.data"))) / "sample" / name


def resolve_source(source: str | Path) -> Path:
    """A path, or the folder behind ``sample:<name>``.

    Raises:
        DataError: it does not exist.
    """
    if isinstance(source, str) and source.startswith(PREFIX):
        return sample_path(source.removeprefix(PREFIX))
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"{path} does not exist: give a BIDS folder, an fMRIPrep folder, a TSV of files, "
            f"or {PREFIX}{'|'.join(sample_names())}"
        )
    return path
