"""NeuroMamba: a Mamba-2 over the in-brain patches of a clip, one long sequence of voxels.

Source: "NeuroMamba" (direct sequence modelling of 4-D fMRI), sizes and order as published:
background patches are dropped, the others follow each other in space (slow) and time (fast), get
Fourier features of their position, and run through residual Mamba-2 blocks.
What differs: which patches are dropped is decided for every clip by itself (the source takes the
union over the batch), positions are projected by a trained Linear (the source's is a fixed random
matrix), and positions may be in millimetres and seconds.

Shapes: b samples, n tokens, d width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmrizoo.backbones.mamba2 import BACKENDS, BATCHING, EPS, Mamba2, MixerState
from fmrizoo.backbones.ssd import SHORTEST
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.layers.coordinates import FEATURES, fourier_features, grid_centres, world_centres
from fmrizoo.layers.kept import keep_patches
from fmrizoo.layers.patches import background_value
from fmrizoo.layers.pieces import wants_gradient
from fmrizoo.layers.prompts import Frame, check_prompts, overwrite
from fmrizoo.layers.ragged import Pack, give_back
from fmrizoo.layers.readout import ScaledLinear
from fmrizoo.registry import register_backbone, suggest
from fmrizoo.types import (
    Backbone,
    Batch,
    Features,
    Grid,
    Tokens,
    Voxels,
    check_checkpointing,
    chosen_stages,
)

log = logging.getLogger(__name__)

COORDINATES = ("grid", "world")


@dataclass
class NeuroMambaConfig:
    """Mamba-2 over the in-brain patches of a clip, space slow, time fast (NeuroMamba)."""

    name: str = "neuromamba"
    img_size: list[int] = field(default_factory=lambda: [96, 96, 96, 20])  # voxels x y z, frames
    patch_size: list[int] = field(default_factory=lambda: [6, 6, 6, 2])  # voxels x y z, frames
    embed_dim: int = 192  # width
    d_state: int | None = None  # states per head; None: embed_dim / 4
    depth: int = 12  # blocks
    d_conv: int = 4  # taps of the causal convolution
    expand: int = 2  # inner width / embed_dim
    head_dim: int = 64  # channels of a head
    ngroups: int = 1  # groups of heads that share B and C
    bidirectional: bool = False  # a second mixer per block reads the sequence backwards
    order: str = "xyzt"  # of the tokens, slowest axis first
    coordinates: str = "grid"  # positions as share of the grid, or world: mm and seconds
    voxel_size: list[float] = field(default_factory=lambda: [2.0, 2.0, 2.0])  # mm, for world
    extent: list[float] = field(
        default_factory=lambda: [192.0, 192.0, 192.0, 60.0]
    )  # mm x y z and seconds that count as 1, for world
    drop_background: bool = True  # leave out patches without a brain voxel
    scan_backend: str = "auto"  # torch | mamba_ssm (CUDA kernels) | auto: these where they can run
    batching: str = "packed"  # packed: no padding is computed | padded
    chunk_size: int = 64  # tokens of a chunk of the scan
    drop_rate: float = 0.0  # dropout after each mixer

    def __post_init__(self) -> None:
        for key, count in (("img_size", 4), ("patch_size", 4), ("voxel_size", 3), ("extent", 4)):
            value = getattr(self, key)
            if len(value) != count or any(v <= 0 for v in value):
                raise RecipeError(
                    f"backbone.{key} needs {count} positive numbers (x, y, z"
                    f"{', t' if count == 4 else ''}), got {list(value)}"
                )
        for key in ("embed_dim", "depth", "d_conv", "expand", "head_dim", "ngroups", "chunk_size"):
            if getattr(self, key) < 1:
                raise RecipeError(f"backbone.{key} must be ≥ 1, got {getattr(self, key)}")
        if self.chunk_size % SHORTEST:
            raise RecipeError(
                f"backbone.chunk_size must be a multiple of {SHORTEST}, got {self.chunk_size}"
            )
        if self.d_conv < 2:
            raise RecipeError(f"backbone.d_conv must be ≥ 2, got {self.d_conv}")
        if self.states < 1:
            raise RecipeError(f"backbone.d_state must be ≥ 1, got {self.states}")
        inner = self.expand * self.embed_dim
        if inner % self.head_dim:
            raise RecipeError(
                f"backbone.head_dim={self.head_dim} does not divide the inner width "
                f"expand·embed_dim = {inner}"
            )
        if (inner // self.head_dim) % self.ngroups:
            raise RecipeError(
                f"backbone.ngroups={self.ngroups} does not divide the {inner // self.head_dim} "
                f"heads (expand·embed_dim / head_dim)"
            )
        if sorted(self.order) != sorted("xyzt"):
            raise RecipeError(
                f"backbone.order must hold each of x, y, z, t once (slowest first), got "
                f"{self.order!r}"
            )
        choices = {"coordinates": COORDINATES, "scan_backend": BACKENDS, "batching": BATCHING}
        for key, known in choices.items():
            value = getattr(self, key)
            if value not in known:
                raise RecipeError(
                    f"backbone.{key}={value!r} is not known.{suggest(value, list(known))}"
                )
        if not 0 <= self.drop_rate < 1:
            raise RecipeError(f"backbone.drop_rate must be in [0, 1), got {self.drop_rate}")
        if self.img_size[3] % self.patch_size[3]:
            raise RecipeError(
                f"a clip of {self.img_size[3]} frames does not divide into patches of "
                f"{self.patch_size[3]} frames: change data.clip_frames or backbone.patch_size"
            )

    @property
    def states(self) -> int:
        """States per head."""
        return self.embed_dim // 4 if self.d_state is None else self.d_state


@dataclass
class PlacedTokens(Tokens):
    """Tokens with the features of their positions: ``where (b, n, 84)`` fp32.

    ``values`` are without positions: an objective may hide a token's content, not its place.
    """

    where: Tensor | None = None


class MambaBlock(nn.Module):
    """``x += Mamba2(RMSNorm(x))``; two ways along the sequence if ``bidirectional``."""

    def __init__(self, config: NeuroMambaConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.embed_dim, eps=EPS)  # its weight only: the mixer applies it
        self.mixer = _mixer(config)
        self.reverse = _mixer(config) if config.bidirectional else None
        self.drop = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, pack: Pack) -> Tensor:
        """``(b', l', d)`` → same shape."""
        weight = self.norm.weight
        if self.reverse is None and not (self.training and self.drop.p):
            return self.mixer.run(x, pack, prenorm=weight, residual=True)
        mixed = self.mixer.run(x, pack, prenorm=weight)
        if self.reverse is not None:
            mixed = mixed + self.reverse.run(x, pack, prenorm=weight, reverse=True)
        out: Tensor = x + self.drop(mixed)
        return out

    def extend(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """The next tokens of sequences."""
        mixed, state = self.mixer.extend(x, state, prenorm=self.norm.weight)
        return x + self.drop(mixed), state


@cache
def _announce(backend: str) -> None:
    """Say what the scans are computed with, once in a process."""
    log.info("neuromamba scans with %s", backend)


def _mixer(config: NeuroMambaConfig) -> Mamba2:
    return Mamba2(
        config.embed_dim,
        d_state=config.states,
        d_conv=config.d_conv,
        expand=config.expand,
        head_dim=config.head_dim,
        ngroups=config.ngroups,
        chunk_size=config.chunk_size,
        scan_backend=config.scan_backend,
        batching=config.batching,
    )


@register_backbone("neuromamba", NeuroMambaConfig)
class NeuroMamba(Backbone):
    """``(b, 1, x, y, z, t)`` → one feature vector ``(embed_dim,)`` per kept patch.

    Clips smaller than ``img_size`` lie in its corner; they may have any number of frames that the
    patch divides. Without ``bidirectional`` every feature depends on its own and earlier tokens of
    the sequence only, whether ``causal`` is asked for or not.
    """

    any_length = True
    causal_unit = "token"

    def __init__(self, config: NeuroMambaConfig) -> None:
        super().__init__()
        self.config = config
        px, py, pz, pt = config.patch_size
        self.patch_size = (px, py, pz, pt)
        self.reduction = self.patch_size
        self.clip_grid = Grid(*config.img_size).padded(self.patch_size)
        self.grid = self.clip_grid.divided(self.patch_size)
        self.embed_dim = self.num_features = config.embed_dim
        self.embed = ScaledLinear(prod(self.patch_size), config.embed_dim)
        self.position = nn.Linear(FEATURES, config.embed_dim)
        self.blocks = nn.ModuleList(MambaBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.embed_dim, eps=EPS)
        self.stage_features = (config.embed_dim,) * config.depth
        self.checkpointing = "none"

    @classmethod
    def supports(cls, config: NeuroMambaConfig) -> frozenset[str]:
        """``prompts``; ``causal``, unless the sequence is read both ways."""
        return frozenset({"prompts"} if config.bidirectional else {"causal", "prompts"})

    def _blocks(self) -> list[MambaBlock]:
        return cast(list[MambaBlock], list(self.blocks))

    @property
    def scan_backend(self) -> str:
        """What the scans are computed with where the model is now: ``torch`` or ``mamba_ssm``."""
        return self._blocks()[0].mixer.scan_backend

    def set_checkpointing(self, mode: str) -> None:
        """``block``: recompute a block at a time; ``window-chunk``: a slice of a block at a time.

        ``window-chunk`` keeps the least: each block's input, and a state per slice.
        """
        self.checkpointing = check_checkpointing(mode)
        for module in self.modules():
            if isinstance(module, Mamba2):
                module.recompute = mode == "window-chunk"

    def tokenize(
        self,
        bold: Tensor,
        mask: Tensor | None = None,
        *,
        background: Tensor | None = None,
        tr: Tensor | None = None,
    ) -> Tokens:
        """Patches of ``bold (b, 1, x, y, z, t)`` with at least one brain voxel.

        Without a mask, brain is what differs from the background in any frame. Tokens are padded
        at the end to the longest sample; the ``index`` of padding points at left-out patches.

        Raises:
            DataError: not one channel, a clip larger than the grid, frames that no patch divides, a
                clip without a brain voxel, or no ``tr`` although positions are in seconds.
        """
        if bold.ndim != 6 or bold.shape[1] != 1:
            raise DataError(f"bold must be (b, 1, x, y, z, t), got {tuple(bold.shape)}")
        self._check(Grid(*bold.shape[2:]))
        if background is None:
            background = background_value(bold, mask)
        if mask is None:
            mask = torch.ones_like(bold[:, 0, ..., 0], dtype=torch.bool)
            if self.config.drop_background:
                mask = (bold[:, 0] != background.view(-1, 1, 1, 1, 1)).any(-1)
        return self._tokens(Voxels.of(bold, mask, background), tr)

    def read(self, batch: Batch) -> Tokens:
        """Tokens of a batch; a compact one is never made dense."""
        if batch.voxels is None:
            return super().read(batch)
        self._check(batch.voxels.grid)
        return self._tokens(batch.voxels, batch.tr)

    def _check(self, clip: Grid) -> None:
        if any(have > size for have, size in zip(clip[:3], self.clip_grid[:3], strict=True)):
            raise DataError(
                f"clip of {clip} voxels is larger than the model's grid {self.clip_grid}"
            )
        if clip.t % self.patch_size[3]:
            raise DataError(
                f"{clip.t} frames do not divide into patches of {self.patch_size[3]} frames"
            )

    def _tokens(self, voxels: Voxels, tr: Tensor | None) -> PlacedTokens:
        grid = self.grid._replace(t=voxels.grid.t // self.patch_size[3])
        kept = keep_patches(
            voxels, self.patch_size, grid, self.config.order, self.config.drop_background
        )
        values = self.embed(kept.patches)
        if not bool(kept.valid.all()):
            values = values * kept.valid.unsqueeze(-1)
        return PlacedTokens(
            values=values,
            index=kept.index,
            valid=kept.valid,
            grid=grid,
            brain=kept.inside.float().mean(-1),
            patches=kept.patches,
            inside=kept.inside,
            where=self._where(kept.index, tr),
        )

    def _where(self, index: Tensor, tr: Tensor | None) -> Tensor:
        """``(b, n, 84)`` features of the positions of patches at ``index (b, n, 4)``."""
        if self.config.coordinates == "grid":
            return fourier_features(grid_centres(index, self.grid))
        extent, size = self.config.extent, self.config.voxel_size
        return fourier_features(world_centres(index, self.patch_size, size, tr, extent))

    def _placed(self, values: Tensor, where: Tensor) -> Tensor:
        placed: Tensor = values + self.position(where.to(self.position.weight.dtype))
        return placed

    def encode_stages(
        self,
        tokens: Tokens,
        indices: Sequence[int] | None = None,
        *,
        causal: bool = False,
        prompts: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        """Features after blocks; the last one's are normed, those of padding are 0.

        Args:
            tokens: From :meth:`tokenize` or :meth:`read`.
            indices: Blocks (None: all; negative counts from the end).
            causal: Changes nothing: it always is.
            prompts: ``(p, embed_dim)`` for every block. Every sequence gets ``p`` places before its
                first token (if ``bidirectional`` as many after its last), where each block finds
                its own prompts whatever the block before has left there.

        Raises:
            RecipeError: ``causal`` is asked of a bidirectional model, a block that does not exist,
                or prompts that do not fit.
        """
        if causal and self.config.bidirectional:
            raise RecipeError(
                "neuromamba with bidirectional=true looks both ways: it cannot encode causally"
            )
        wanted = chosen_stages(indices, len(self.blocks))
        kept = self._run(tokens, set(wanted), check_prompts(prompts, self.prompt_widths()))
        return [kept[i] for i in wanted]

    def prompt_widths(self) -> tuple[int, ...]:
        """``embed_dim`` for every block."""
        return self.stage_features

    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        """Patch embedding and positions, then the blocks; the last norm belongs to the last one."""
        blocks: list[tuple[str, ...]] = [(f"blocks.{i}",) for i in range(len(self.blocks))]
        return (("embed", "position"), *blocks[:-1], (*blocks[-1], "norm"))

    def _run(
        self, tokens: Tokens, keep: set[int], prompts: Sequence[Tensor] | None
    ) -> dict[int, Features]:
        """Features after the blocks in ``keep``; those that follow do not run."""
        _announce(self.scan_backend)
        where = getattr(tokens, "where", None)
        if where is None:
            where = self._where(tokens.index, None)
        x = self._placed(tokens.values, where)
        lengths = tokens.valid.sum(1).tolist()
        frame = None
        if prompts is not None:
            frame = Frame(len(prompts[0]), self.config.bidirectional)
            x = frame.around(x)
        batch, length, _ = x.shape
        extra = 0 if frame is None else frame.extra
        packs = self._blocks()[0].mixer.packs([n + extra for n in lengths], length, x.device)
        last = len(self.blocks) - 1
        found: dict[int, list[Tensor]] = {number: [] for number in keep}
        for pack in packs:
            part = pack.take(x)
            places = None if frame is None else frame.places(pack, lengths, length, x.device)
            for number, block in enumerate(self._blocks()[: max(keep, default=-1) + 1]):
                if prompts is not None and places is not None:
                    part = overwrite(part, places, prompts[number])
                part = self._through(block, part, pack)
                if number in keep:
                    found[number].append(self._normed(part) if number == last else part)
        kept = {}
        for number, parts in found.items():
            values = give_back(packs, parts, batch, length)
            values = values if frame is None else frame.within(values)
            if min(lengths) < values.shape[1]:
                values = values * tokens.valid.unsqueeze(-1)
            kept[number] = Features(values, tokens.index, tokens.valid, tokens.grid, tokens.brain)
        return kept

    def _normed(self, x: Tensor) -> Tensor:
        """The last norm. Autocast leaves ``x`` narrower than the weight: PyTorch would warn."""
        normed: Tensor = self.norm(x.to(torch.promote_types(x.dtype, self.norm.weight.dtype)))
        return normed

    def _through(self, block: MambaBlock, x: Tensor, pack: Pack) -> Tensor:
        """One block, which is run again in the backward pass if that is asked for."""
        # The CUDA kernels know no slices: there a block is the least that is made again.
        again = self.checkpointing == "block" or (
            self.checkpointing == "window-chunk" and self.scan_backend == "mamba_ssm"
        )
        if again and wants_gradient(x, (block,)):
            recomputed: Tensor = checkpoint(block, x, pack, use_reentrant=False)
            return recomputed
        done: Tensor = block(x, pack)
        return done

    def place(self, patches: Tensor, index: Tensor, tr: Tensor | None = None) -> Tensor:
        """``patches (b, n, p)`` at ``index (b, n, 4)`` → values with positions, for `extend`."""
        return self._placed(self.embed(patches), self._where(index, tr))

    def extend(self, values: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Features ``(b, n, d)`` of the next tokens, whose ``values`` are from :meth:`place`.

        ``state`` holds a :class:`MixerState` a block. All samples must go on together, without
        padding between calls.

        Raises:
            RecipeError: the model is bidirectional.
        """
        if self.config.bidirectional:
            raise RecipeError("neuromamba with bidirectional=true cannot go on with a sequence")
        _announce(self.scan_backend)
        states = [None] * len(self.blocks) if state is None else list(state)
        after = []
        for block, before in zip(self._blocks(), states, strict=True):
            values, reached = block.extend(values, before)
            after.append(reached)
        return self._normed(values), after

    def lora_targets(self) -> tuple[str, ...]:
        """Suffixes of the Linear modules that low-rank adapters may wrap."""
        return ("in_proj", "out_proj")

    def flops(self, grid: Grid, mask: Tensor | None = None) -> dict[str, int]:
        """FLOPs (2 per multiply-add) of the forward pass of one clip, by part.

        ``mask (x, y, z)``: only patches that hold brain are counted, where background is dropped;
        without one, all patches of the padded grid.
        """
        patches = self.grid.x * self.grid.y * self.grid.z
        if mask is not None and self.config.drop_background:
            cells = mask.nonzero() // torch.tensor(self.patch_size[:3], device=mask.device)
            patches = len(torch.unique(cells, dim=0))
        tokens = patches * (grid.t // self.patch_size[3])
        mixers = len(self.blocks) * (2 if self.config.bidirectional else 1)
        each = self._blocks()[0].mixer.flops(tokens)
        return {
            "patch_embed": 2 * tokens * prod(self.embed.weight.shape),
            "positions": 2 * tokens * prod(self.position.weight.shape),
            **{part: mixers * count for part, count in each.items()},
        }
