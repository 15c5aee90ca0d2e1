"""Sizes, and how data were preprocessed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from fmrizoo.errors import DataError


class Grid(NamedTuple):
    """A size along x, y, z (voxels or tokens) and t (frames or tokens)."""

    x: int
    y: int
    z: int
    t: int

    @property
    def size(self) -> int:
        """Number of cells."""
        return math.prod(self)

    def padded(self, multiple: Sequence[int]) -> Grid:
        """The smallest grid not smaller than this one that ``multiple`` divides."""
        return Grid._make(math.ceil(s / m) * m for s, m in zip(self, multiple, strict=True))

    def divided(self, by: Sequence[int]) -> Grid:
        """Cell counts after merging blocks of ``by`` cells (which must divide the grid)."""
        return Grid._make(s // m for s, m in zip(self, by, strict=True))

    def __str__(self) -> str:
        return "×".join(str(s) for s in self)


@dataclass(frozen=True)
class Contract:
    """What was done to the data: stored in every data file and checkpoint, compared at load.

    Attributes:
        space: Name of the space (BIDS ``space`` entity), ``native`` if the runs were not resampled.
        orientation: Axis codes of the stored array, e.g. ``RAS`` (x runs left → right).
        grid: Voxels along x, y, z.
        voxel_size: Millimetres along x, y, z.
        tr: Repetition time in seconds.
        normalization: Mode of :mod:`fmrizoo.data.normalize` applied at load (``stored`` inside a
            store, where values are raw and any mode can still be applied).
        statistics: Over what the mode's statistics were taken.
        background: What voxels outside the brain are set to.
        code_version: fmrizoo version that wrote the data (informative, never compared).
    """

    space: str
    orientation: str
    grid: tuple[int, int, int]
    voxel_size: tuple[float, float, float]
    tr: float
    normalization: str = "stored"
    statistics: str = "run"
    background: str = "stored"
    code_version: str = ""

    def differences(self, other: Contract) -> list[str]:
        """One phrase per field in which ``other`` (the data) departs from this one (the model)."""
        found = []
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name == "code_version" or _same(f.name, mine, theirs):
                continue
            found.append(f"{f.name}: expected {mine}, found {theirs}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Contract:
        """Inverse of :meth:`to_dict`; an unknown or missing field raises :class:`DataError`."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise DataError(f"preprocessing contract has unknown fields {unknown}")
        try:
            contract = cls(**values)
        except TypeError as error:
            raise DataError(f"preprocessing contract is incomplete: {error}") from None
        x, y, z = contract.grid
        sx, sy, sz = contract.voxel_size
        return replace(contract, grid=(x, y, z), voxel_size=(sx, sy, sz))


def _same(name: str, mine: Any, theirs: Any) -> bool:
    if name in ("tr", "voxel_size"):
        a, b = (v if isinstance(v, (tuple, list)) else (v,) for v in (mine, theirs))
        return all(abs(p - q) <= 1e-3 for p, q in zip(a, b, strict=True))
    return bool(mine == theirs)
