"""The contracts that let any backbone meet any objective, head and data set.

Shape letters: ``b`` samples, ``c`` channels (1 for BOLD), ``x y z t`` voxels and frames,
``n`` tokens, ``d`` features of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fmrizoo.errors import DataError, RecipeError


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


@dataclass
class Batch:
    """Clips of several runs, checked once at the door.

    Attributes:
        bold: ``(b, 1, x, y, z, t)`` floating point, normalised, background filled.
        mask: ``(b, x, y, z)`` bool, True = brain.
        tr: ``(b,)`` seconds between two frames of the clip.
        subject, run: ``b`` names each.
        start: ``(b,)`` first frame within the run.
        target: ``(b,)`` class index or value, or None.
        seed: ``(b,)`` int64, one seed per sample for masks and augmentations: the same sample at
            the same training step gets the same draw for any world size; None draws freely.
    """

    bold: Tensor
    mask: Tensor
    tr: Tensor
    subject: list[str]
    run: list[str]
    start: Tensor
    target: Tensor | None = None
    seed: Tensor | None = None

    def __post_init__(self) -> None:
        b = self.bold.shape[0] if self.bold.ndim else 0
        if self.bold.ndim != 6 or self.bold.shape[1] != 1:
            raise DataError(f"bold must be (b, 1, x, y, z, t), got {tuple(self.bold.shape)}")
        if not self.bold.is_floating_point():
            raise DataError(f"bold must be floating point, got {self.bold.dtype}")
        if tuple(self.mask.shape) != (b, *self.bold.shape[2:5]) or self.mask.dtype != torch.bool:
            raise DataError(
                f"mask must be bool (b, x, y, z) = {(b, *self.bold.shape[2:5])}, "
                f"got {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        for name in ("tr", "start", "target", "seed"):
            value = getattr(self, name)
            if value is not None and value.shape[:1] != (b,):
                raise DataError(f"{name} must have {b} rows, got shape {tuple(value.shape)}")
        if len(self.subject) != b or len(self.run) != b:
            raise DataError(f"subject and run need {b} names each")

    def __len__(self) -> int:
        return int(self.bold.shape[0])

    @property
    def grid(self) -> Grid:
        """Voxels and frames of each clip."""
        return Grid(*self.bold.shape[2:])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """A copy on ``device``; ``dtype`` changes ``bold`` only."""

        def move(v: Tensor | None) -> Tensor | None:
            return None if v is None else v.to(device, non_blocking=True)

        return replace(
            self,
            bold=self.bold.to(device, dtype or self.bold.dtype, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            tr=self.tr.to(device, non_blocking=True),
            start=self.start.to(device, non_blocking=True),
            target=move(self.target),
            seed=move(self.seed),
        )


@dataclass
class Tokens:
    """What a backbone's ``tokenize`` returns and its ``encode`` takes.

    Attributes:
        values: ``(b, n, d)``.
        index: ``(b, n, 4)`` int64 patch coordinates x, y, z, t (``b`` may be broadcast).
        valid: ``(b, n)`` bool, False for padding tokens that stand for nothing.
        grid: The full patch grid that ``index`` points into.
        brain: ``(b, n)`` share of brain voxels in each token's patch, in [0, 1].
    """

    values: Tensor
    index: Tensor
    valid: Tensor
    grid: Grid
    brain: Tensor

    def with_values(self, values: Tensor) -> Tokens:
        """The same tokens with other values of the same shape."""
        if values.shape != self.values.shape:
            raise ValueError(f"expected {tuple(self.values.shape)}, got {tuple(values.shape)}")
        return replace(self, values=values)


POOLING = ("mean", "brain", "space")


@dataclass
class Features:
    """What a backbone's ``encode`` returns: the fields of :class:`Tokens` at the output grid."""

    values: Tensor
    index: Tensor
    valid: Tensor
    grid: Grid
    brain: Tensor

    def to_grid(self) -> Tensor:
        """``(b, d, x, y, z, t)``; cells without a token are 0."""
        b, _, d = self.values.shape
        x, y, z, t = self.index.unbind(-1)
        flat = ((x * self.grid.y + y) * self.grid.z + z) * self.grid.t + t
        out = self.values.new_zeros(b, self.grid.size, d)
        kept = self.values * self.valid.unsqueeze(-1)
        out = out.scatter_add(1, flat.expand(b, -1).unsqueeze(-1).expand(-1, -1, d), kept)
        return out.transpose(1, 2).reshape(b, d, *self.grid)

    def pooled(self, how: str = "mean") -> Tensor:
        """One vector a sample, ``(b, d)`` or, for ``space``, ``(b, x·y·z·d)``.

        Args:
            how: ``mean`` over valid tokens, ``brain`` = weighted by each token's brain share, or
                ``space`` = mean over time only, the places kept side by side.
        """
        if how not in POOLING:
            raise RecipeError(f"pooling must be one of {', '.join(POOLING)}, got {how!r}")
        if how == "space":
            return self.to_grid().mean(-1).flatten(1)
        weight = self.valid.to(self.values.dtype)
        if how == "brain":
            weight = weight * self.brain.to(self.values.dtype)
        total = weight.sum(1, keepdim=True)
        if bool((total <= 0).any()):
            raise DataError("a clip without a brain voxel cannot be pooled over the brain")
        return torch.einsum("bnd,bn->bd", self.values, weight / total)


class Backbone(nn.Module):
    """Base of every backbone: ``tokenize`` (patches → tokens) and ``encode`` (tokens → features).

    Attributes:
        embed_dim: Width of ``Tokens.values``.
        num_features: Width of ``Features.values``.
        patch_size: Voxels/frames per input token along x, y, z, t.
        reduction: Voxels/frames per output token along x, y, z, t.
        clip_grid: Voxels and frames of a clip after padding.
        supports: Properties that objectives may ask for (``causal``).
    """

    embed_dim: int
    num_features: int
    patch_size: tuple[int, int, int, int]
    reduction: tuple[int, int, int, int]
    clip_grid: Grid
    supports: ClassVar[frozenset[str]] = frozenset()

    def tokenize(self, bold: Tensor, mask: Tensor | None = None) -> Tokens:
        """``bold (b, c, x, y, z, t)`` and brain ``mask (b, x, y, z)`` → tokens."""
        raise NotImplementedError

    def encode(self, tokens: Tokens, *, causal: bool = False) -> Features:
        """Run the trunk. ``causal``: no output may depend on later frames."""
        raise NotImplementedError

    def forward(self, bold: Tensor, mask: Tensor | None = None) -> Features:
        """``encode(tokenize(bold, mask))``."""
        return self.encode(self.tokenize(bold, mask))

    def forward_intermediates(
        self, bold: Tensor, mask: Tensor | None = None, indices: Sequence[int] | None = None
    ) -> list[Features]:
        """Features after each stage (``indices`` picks some; negative counts from the end)."""
        raise NotImplementedError

    def lora_targets(self) -> tuple[str, ...]:
        """Names of the Linear modules that low-rank adapters may wrap."""
        raise NotImplementedError

    def flops(self, grid: Grid) -> dict[str, int]:
        """Multiply-adds × 2 of one forward pass of one clip of ``grid`` voxels, by part."""
        raise NotImplementedError


class Objective(nn.Module):
    """Base of every pretraining objective: ``loss, logs = objective(backbone, batch)``.

    Attributes:
        needs: Properties a backbone must declare in ``supports``.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def forward(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss with gradient, and detached scalars for the log."""
        raise NotImplementedError

    @torch.no_grad()
    def reconstruct(self, backbone: Backbone, batch: Batch) -> Reconstruction:
        """What the model fills in, for pictures and checks."""
        raise NotImplementedError


@dataclass
class Reconstruction:
    """What a model filled in, ``(b, x, y, z, t)`` each; ``masked`` True = hidden from the model."""

    truth: Tensor
    predicted: Tensor
    masked: Tensor


@dataclass(frozen=True)
class TaskSpec:
    """What a head is to predict.

    Attributes:
        kind: ``classification`` or ``regression``.
        classes: Names in index order (classification).
        mean, std: Scaler fitted on training units (regression).
    """

    kind: str
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("classification", "regression"):
            raise RecipeError(f"task must be classification or regression, got {self.kind!r}")
        if self.kind == "classification" and len(self.classes) < 2:
            raise RecipeError(
                f"classification needs at least two classes in the training units, "
                f"found {list(self.classes)}"
            )
        if self.kind == "regression" and not self.std > 0:
            raise RecipeError(f"the target's training s.d. is {self.std}: nothing to predict")

    @property
    def outputs(self) -> int:
        """Width of the head's output."""
        return len(self.classes) if self.kind == "classification" else 1


class Head(nn.Module):
    """Base of every head. It owns what it adds after the encoder and what of the encoder trains."""

    task: TaskSpec

    def attach(self, backbone: Backbone) -> None:
        """Set ``requires_grad`` of the encoder's parameters (called once, before the optimizer)."""
        raise NotImplementedError

    def encoder_trains(self) -> bool:
        """False: the encoder stays in ``eval()`` and runs without gradients."""
        raise NotImplementedError

    def forward(self, features: Features) -> Tensor:
        """``(b, task.outputs)``: logits, or the scaled value."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Scalar training loss; ``target (b,)`` class index or unscaled value."""
        raise NotImplementedError


@dataclass(frozen=True)
class RunKey:
    """BIDS identity of one run. ``str()`` gives the BIDS-like name used in splits and tables."""

    subject: str
    session: str = ""
    task: str = ""
    acquisition: str = ""
    run: str = ""
    extra: tuple[tuple[str, str], ...] = field(default=())

    def __str__(self) -> str:
        parts = [("sub", self.subject), ("ses", self.session), ("task", self.task)]
        parts += [("acq", self.acquisition), ("run", self.run), *self.extra]
        return "_".join(f"{k}-{v}" for k, v in parts if v)

    @classmethod
    def parse(cls, name: str) -> RunKey:
        """Inverse of ``str()``.

        Raises:
            DataError: ``name`` is not made of ``key-value`` pairs with a subject.
        """
        pairs = [part.partition("-") for part in name.split("_")]
        found = {key: value for key, _, value in pairs}
        if not all(value for _, _, value in pairs) or "sub" not in found:
            raise DataError(f"{name!r} is no run name of the form sub-01_task-rest_run-01")
        known = {"ses": "session", "task": "task", "acq": "acquisition", "run": "run"}
        fields_ = {known[k]: v for k, v in found.items() if k in known}
        extra = tuple((k, v) for k, v in found.items() if k not in known and k != "sub")
        return cls(found["sub"], extra=extra, **fields_)
