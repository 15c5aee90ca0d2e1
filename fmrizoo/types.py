"""The contracts that let any backbone meet any objective, head and data set.

Shape letters: ``b`` samples, ``c`` channels (1 for BOLD), ``x y z t`` voxels and frames,
``n`` tokens, ``d`` features of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from fmrizoo.config import CHECKPOINTING
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
class Voxels:
    """In-brain voxels of several clips: the compact form of ``bold``.

    Attributes:
        values: ``(t, v)`` normalised BOLD, the samples one after the other along ``v``.
        index: ``(v,)`` int64 row-major cell ``(x · Y + y) · Z + z`` of each voxel, rising within a
            sample.
        counts: Voxels of each sample; they add up to ``v``.
        background: ``(b,)`` value of all other voxels.
        grid: Voxels and frames of the dense clips.
    """

    values: Tensor
    index: Tensor
    counts: tuple[int, ...]
    background: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        v, b = sum(self.counts), len(self.counts)
        if self.values.shape != (self.grid.t, v) or not self.values.is_floating_point():
            raise DataError(
                f"voxels must be floating point {(self.grid.t, v)}, got {self.values.dtype} "
                f"{tuple(self.values.shape)}"
            )
        if self.index.shape != (v,) or self.background.shape != (b,):
            raise DataError(
                f"index must be {(v,)} and background {(b,)}, got {tuple(self.index.shape)} and "
                f"{tuple(self.background.shape)}"
            )

    @classmethod
    def of(cls, bold: Tensor, mask: Tensor, background: Tensor) -> Voxels:
        """The voxels of ``bold (b, 1, x, y, z, t)`` in ``mask (b, x, y, z)``."""
        grid = Grid(*bold.shape[2:])
        inside = [cells.flatten().nonzero()[:, 0] for cells in mask]
        frames = bold[:, 0].permute(0, 4, 1, 2, 3)
        parts = [
            clip.flatten(1).index_select(1, index)
            for clip, index in zip(frames, inside, strict=True)
        ]
        counts = tuple(len(index) for index in inside)
        return cls(torch.cat(parts, 1), torch.cat(inside), counts, background, grid)

    def dense(self) -> Tensor:
        """``(b, 1, x, y, z, t)`` over memory in the order b, t, x, y, z."""
        space = math.prod(self.grid[:3])
        out = self.values.new_empty(len(self.counts), self.grid.t, space)
        out[:] = self.background.to(out.dtype).view(-1, 1, 1)
        values = torch.split(self.values, list(self.counts), 1)
        for clip, frames, index in zip(out, values, self.split(self.index), strict=True):
            clip.index_copy_(1, index, frames)
        return out.view(-1, self.grid.t, *self.grid[:3]).permute(0, 2, 3, 4, 1).unsqueeze(1)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """``rows (v, …)`` cut into the samples."""
        return torch.split(rows, list(self.counts))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Voxels:
        """A copy on ``device``; ``dtype`` changes the values only."""
        return replace(
            self,
            values=self.values.to(device, dtype or self.values.dtype, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            background=self.background.to(device, non_blocking=True),
        )


class _DenseOnDemand:
    """The attribute ``bold``: set to a dense tensor or to :class:`Voxels`, read as a tensor."""

    def __get__(self, batch: Batch | None, owner: type) -> Any:
        if batch is None:
            return self
        kept = batch.__dict__
        if "_bold" not in kept:
            kept["_bold"] = kept["_voxels"].dense()
        return kept["_bold"]

    def __set__(self, batch: Batch, value: Tensor | Voxels) -> None:
        batch.__dict__.pop("_bold", None)
        batch.__dict__["_voxels" if isinstance(value, Voxels) else "_bold"] = value


@dataclass
class Batch:
    """Clips of several runs, checked once at the door.

    Attributes:
        bold: ``(b, 1, x, y, z, t)`` floating point, normalised, background filled. Given as
            :class:`Voxels` (:meth:`compact`), it is made dense when it is first read.
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

    @classmethod
    def compact(
        cls,
        voxels: Voxels,
        mask: Tensor,
        tr: Tensor,
        subject: list[str],
        run: list[str],
        start: Tensor,
        target: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Batch:
        """A batch of in-brain voxels; a backbone that can do without never makes it dense."""
        return cls(cast(Tensor, voxels), mask, tr, subject, run, start, target, seed)

    def __post_init__(self) -> None:
        shape, dtype = self._form()
        b = shape[0] if shape else 0
        if len(shape) != 6 or shape[1] != 1:
            raise DataError(f"bold must be (b, 1, x, y, z, t), got {shape}")
        if not dtype.is_floating_point:
            raise DataError(f"bold must be floating point, got {dtype}")
        if tuple(self.mask.shape) != (b, *shape[2:5]) or self.mask.dtype != torch.bool:
            raise DataError(
                f"mask must be bool (b, x, y, z) = {(b, *shape[2:5])}, "
                f"got {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        for name in ("tr", "start", "target", "seed"):
            value = getattr(self, name)
            if value is not None and value.shape[:1] != (b,):
                raise DataError(f"{name} must have {b} rows, got shape {tuple(value.shape)}")
        if len(self.subject) != b or len(self.run) != b:
            raise DataError(f"subject and run need {b} names each")

    def _form(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of ``bold``, without making it dense."""
        if self.voxels is not None:
            return (len(self.voxels.counts), 1, *self.voxels.grid), self.voxels.values.dtype
        return tuple(self.bold.shape), self.bold.dtype

    def __len__(self) -> int:
        return len(self.subject)

    @property
    def voxels(self) -> Voxels | None:
        """The compact form, if the batch came in it."""
        found: Voxels | None = self.__dict__.get("_voxels")
        return found

    @property
    def background(self) -> Tensor | None:
        """``(b,)`` value outside the brain, where it is known."""
        return None if self.voxels is None else self.voxels.background

    @property
    def grid(self) -> Grid:
        """Voxels and frames of each clip."""
        return Grid(*self._form()[0][2:])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """A copy on ``device``; ``dtype`` changes ``bold`` only."""

        def move(v: Tensor | None) -> Tensor | None:
            return None if v is None else v.to(device, non_blocking=True)

        if self.voxels is not None:
            bold = cast(Tensor, self.voxels.to(device, dtype))
        else:
            bold = self.bold.to(device, dtype or self.bold.dtype, non_blocking=True)
        return replace(
            self,
            bold=bold,
            mask=self.mask.to(device, non_blocking=True),
            tr=self.tr.to(device, non_blocking=True),
            start=self.start.to(device, non_blocking=True),
            target=move(self.target),
            seed=move(self.seed),
        )


Batch.bold = _DenseOnDemand()  # type: ignore[assignment]


@dataclass
class Tokens:
    """What a backbone's ``tokenize`` returns and its ``encode`` takes.

    Attributes:
        values: ``(b, n, d)``.
        index: ``(b, n, 4)`` int64 patch coordinates x, y, z, t (``b`` may be broadcast).
        valid: ``(b, n)`` bool, False for padding tokens that stand for nothing.
        grid: The full patch grid that ``index`` points into.
        brain: ``(b, n)`` share of brain voxels in each token's patch, in [0, 1].
        patches: ``(b, n, px·py·pz·pt)`` raw voxels of each token ordered px, py, pz, pt, from
            backbones that form them anyway; voxels outside the brain hold the background.
        inside: ``(b, n, px·py·pz·pt)`` bool, True = brain voxel, beside ``patches``.
    """

    values: Tensor
    index: Tensor
    valid: Tensor
    grid: Grid
    brain: Tensor
    patches: Tensor | None = None
    inside: Tensor | None = None

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
        any_length: Takes clips of any number of frames (that ``patch_size[3]`` divides), not only
            of up to ``clip_grid.t``.
        causal_unit: What ``encode(causal=True)`` keeps from looking ahead: ``time`` (no feature
            depends on a later time slot) or ``token`` (nor on a later token of the sequence).
    """

    embed_dim: int
    num_features: int
    patch_size: tuple[int, int, int, int]
    reduction: tuple[int, int, int, int]
    clip_grid: Grid
    any_length: ClassVar[bool] = False
    causal_unit: ClassVar[str] = "time"

    @classmethod
    def supports(cls, config: Any) -> frozenset[str]:
        """Properties (``causal``) that objectives may ask of a backbone of this ``config``."""
        return frozenset()

    def tokenize(
        self,
        bold: Tensor,
        mask: Tensor | None = None,
        *,
        background: Tensor | None = None,
        tr: Tensor | None = None,
    ) -> Tokens:
        """Clips → tokens.

        Args:
            bold: ``(b, c, x, y, z, t)``.
            mask: ``(b, x, y, z)`` True = brain. What lies outside cannot change the tokens: it is
                read as ``background``.
            background: ``(b,)``; None: the lowest value (in the brain, if a mask is given) of each
                clip's first frame.
            tr: ``(b,)`` seconds between frames, for backbones that place tokens in seconds.

        Raises:
            DataError: a clip that the backbone cannot take.
        """
        raise NotImplementedError

    def read(self, batch: Batch) -> Tokens:
        """Tokens of a batch, compact or dense."""
        return self.tokenize(batch.bold, batch.mask, background=batch.background, tr=batch.tr)

    def encode(self, tokens: Tokens, *, causal: bool = False) -> Features:
        """Run the trunk. ``causal``: see ``causal_unit``."""
        raise NotImplementedError

    def forward(self, bold: Tensor, mask: Tensor | None = None) -> Features:
        """``encode(tokenize(bold, mask))``."""
        return self.encode(self.tokenize(bold, mask))

    def forward_intermediates(
        self, bold: Tensor, mask: Tensor | None = None, indices: Sequence[int] | None = None
    ) -> list[Features]:
        """Features after each stage (``indices`` picks some; negative counts from the end)."""
        raise NotImplementedError

    def place(self, patches: Tensor, index: Tensor, tr: Tensor | None = None) -> Tensor:
        """Token values of raw ``patches (b, n, px·py·pz·pt)`` at ``index (b, n, 4)``.

        Only where ``causal_unit`` is ``token``: what a forecast feeds back.
        """
        raise NotImplementedError

    def extend(self, values: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Go on with a sequence: ``(b, n, embed_dim)`` next tokens → ``(b, n, num_features)``.

        Only where ``causal_unit`` is ``token``. ``state`` is what the call before returned (None at
        the start); calls one after the other equal one ``encode`` of the whole sequence.
        """
        raise NotImplementedError

    def set_checkpointing(self, mode: str) -> None:
        """Which activations are recomputed in the backward pass (``CHECKPOINTING``)."""
        raise NotImplementedError

    def lora_targets(self) -> tuple[str, ...]:
        """Suffixes of the names of the Linear modules that low-rank adapters may wrap."""
        raise NotImplementedError

    def flops(self, grid: Grid, mask: Tensor | None = None) -> dict[str, int]:
        """Multiply-adds × 2 of one forward pass of one clip of ``grid`` voxels, by part.

        ``mask (x, y, z)``: count what is computed for a clip with this brain.
        """
        raise NotImplementedError


def chosen_stages(indices: Sequence[int] | None, count: int) -> list[int]:
    """``indices`` (None: all; negative from the end) as stage numbers.

    Raises:
        RecipeError: there is no such stage.
    """
    wanted = list(range(count)) if indices is None else list(indices)
    if bad := [i for i in wanted if not -count <= i < count]:
        raise RecipeError(f"stages {bad} do not exist: the backbone has {count}")
    return [i % count for i in wanted]


def check_checkpointing(mode: str) -> str:
    """``mode``, or :class:`RecipeError` if it is none of ``CHECKPOINTING``."""
    if mode not in CHECKPOINTING:
        raise RecipeError(f"checkpointing must be one of {', '.join(CHECKPOINTING)}, got {mode!r}")
    return mode


class Objective(nn.Module):
    """Base of every pretraining objective: ``loss, logs = objective(backbone, batch)``.

    Attributes:
        needs: Properties that ``Backbone.supports`` must hold.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def forward(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss with gradient, and detached scalars for the log."""
        raise NotImplementedError

    @torch.no_grad()
    def reconstruct(self, backbone: Backbone, batch: Batch) -> Reconstruction:
        """What the model fills in, for pictures and checks."""
        raise NotImplementedError

    @torch.no_grad()
    def forecast(self, backbone: Backbone, batch: Batch, frames: int) -> Tensor:
        """``(b, x, y, z, frames)``: what the model expects after the clips.

        Raises:
            RecipeError: this objective does not train a model to forecast.
        """
        raise RecipeError(
            f"{type(self).__name__} does not learn to forecast: train with objective=autoregressive"
        )


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
