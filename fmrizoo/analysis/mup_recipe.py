"""The coordinate check of a recipe: its model, small in all but the width, on one made-up batch.

Kept is what the rules depend on: backbone, objective and their options. Made small is what they do
not depend on, because muP keeps it fixed: voxels, frames, patches, windows, stages, blocks, states
and the channels of a head (of large heads a narrow model has too few to average over). A recipe
whose base has heads of another size than its own keeps their number here, and their size grows.

Fresh queries and keys have nothing in common, so under muP's 1/d the logits of growing heads start
at √(base head_dim / head_dim) of those at base width, and training takes long to cover that chance
part (measured: slopes -0.3 to -0.6 after 4 steps): a transient that Yang et al. know. To judge what
is learned, the check lets such queries start at zero, and reads the logits of all blocks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrizoo.analysis.mup_check import (
    LIMIT,
    CoordinateCheck,
    Tap,
    coordinate_check,
    leaf_taps,
)
from fmrizoo.analysis.sizes import brain_of
from fmrizoo.backbones.mamba2 import EPS, Mamba2
from fmrizoo.backbones.neuromamba import MambaBlock
from fmrizoo.backbones.ssd import ssd
from fmrizoo.config import ParametrizationConfig, Recipe
from fmrizoo.errors import RecipeError
from fmrizoo.layers.swin import SwinBlock, WindowAttention
from fmrizoo.model import PretrainingModel
from fmrizoo.mup import Parametrization
from fmrizoo.types import Batch, Grid
from fmrizoo.zoo import build_model, load_recipe

CLIPS = 2
SIDE = 4  # patches along x, y, z and time
STAGES, BLOCKS = 2, 2
PATCH, WINDOW, STATES = 2, 2, 16  # at most
CHANNELS = {"swin4d": 4, "swin_factorized": 6}  # of a head; rotary positions need multiples of 6
OTHER_CHANNELS = 8
ZERO = ("drop_rate", "attn_drop_rate", "drop_path_rate")
LR = 2**-9
BETAS, EPSILON = (0.9, 0.95), 1e-12
FACTORS = (1, 2, 4, 8)
NARROWEST = 32
# Where heads grow in size, their channels at the narrowest width; of few, chance weighs too much.
GROWING = {"swin4d": 16, "swin_factorized": 18}
LOGITS = "attn.logits"
TRANSIENTS = {LOGITS: 2}  # with them: no logits before the queries' first step


# --- the recipe, made small -----------------------------------------------------------------------


def small(recipe: Recipe) -> Recipe:
    """The recipe with a small clip and few layers; its widths are still to be set.

    Raises:
        RecipeError: it does not pretrain a backbone.
    """
    if recipe.backbone is None or recipe.objective is None:
        raise RecipeError("the coordinate check trains a backbone with an objective: name both")
    made = deepcopy(recipe)
    made.head = None
    backbone = made.backbone
    backbone.patch_size = [min(p, PATCH) for p in backbone.patch_size]
    backbone.img_size = [SIDE * p for p in backbone.patch_size]
    made.data.clip_frames = backbone.img_size[3]
    for key in ZERO:
        if hasattr(backbone, key):
            setattr(backbone, key, 0.0)
    if hasattr(backbone, "depths"):
        blocks = 4 if hasattr(backbone, "temporal_window") else BLOCKS
        backbone.depths = [blocks for _ in backbone.depths[:STAGES]]
        backbone.window_size = [min(w, WINDOW) for w in backbone.window_size]
        if getattr(backbone, "first_window_size", None) is not None:
            backbone.first_window_size = list(backbone.window_size)
        if hasattr(backbone, "temporal_window"):
            backbone.temporal_window = min(backbone.temporal_window, WINDOW)
    else:
        backbone.depth = min(backbone.depth, BLOCKS)
        backbone.d_state = min(backbone.states, STATES)
        backbone.head_dim = OTHER_CHANNELS
    if getattr(made.objective, "mask_patch_size", None) is not None:
        made.objective.mask_patch_size = None
    return made


def channels_of(recipe: Recipe, grow: bool = False) -> int:
    """Channels of a head of a recipe made small; ``grow``: at the narrowest width."""
    return (GROWING if grow else CHANNELS).get(recipe.backbone.name, OTHER_CHANNELS)


def widths_of(recipe: Recipe, grow: bool = False) -> tuple[int, ...]:
    """Four widths of a recipe made small, each twice the one before, that whole heads make up."""
    step = channels_of(recipe, grow)
    first = -(-NARROWEST // step) * step
    return tuple(first * factor for factor in FACTORS)


def heads_grow(recipe: Recipe) -> bool:
    """Whether the recipe's base has heads of another size than its backbone."""
    base, backbone = recipe.parametrization.base, recipe.backbone
    heads = getattr(backbone, "num_heads", None)
    if heads is None or "num_heads" not in base or "embed_dim" not in base:
        return False
    both = zip(heads, base["num_heads"], strict=True)
    return any(backbone.embed_dim * old != base["embed_dim"] * new for new, old in both)


def width_keys(recipe: Recipe, width: int, heads_at: int | None = None) -> dict[str, Any]:
    """What of a small recipe's backbone section sets its width, at heads of ``CHANNELS``.

    ``heads_at``: as many heads as at this width, which then grow in size.

    Raises:
        RecipeError: such heads do not make up the width.
    """
    backbone = recipe.backbone
    grow, every = heads_at is not None, heads_at or width
    channels = channels_of(recipe, grow)
    if width < 1 or width % channels or width % every:
        raise RecipeError(
            f"a width of {width} is no multiple of {max(channels, heads_at or 0)}, the channels of "
            f"{'all heads' if grow else 'a head'} here: take "
            f"{', '.join(map(str, widths_of(recipe, grow)))}"
        )
    if not hasattr(backbone, "num_heads"):
        return {"embed_dim": width}
    stages = range(len(backbone.depths))
    return {
        "embed_dim": width,
        "num_heads": [every * backbone.c_mult**stage // channels for stage in stages],
    }


def at_width(
    recipe: Recipe,
    width: int,
    base: int,
    parametrization: str | None,
    heads_at: int | None = None,
) -> Recipe:
    """A small recipe at ``width``; ``parametrization`` (None: its own) with ``base`` as base.

    All widths have one depth, so nothing is scaled by it. ``heads_at``: see :func:`width_keys`.
    """
    made = deepcopy(recipe)
    made.backbone = replace(recipe.backbone, **width_keys(recipe, width, heads_at))
    name = parametrization or made.parametrization.name
    made.parametrization = ParametrizationConfig()
    if name != "sp":
        # Drawn for a few heads, Mamba's steps and rates differ from width to width by chance.
        start = recipe.parametrization.ssm_init
        if hasattr(recipe.backbone, "d_state"):
            start = "stratified"
        keys = width_keys(recipe, base, heads_at)
        own = recipe.parametrization
        made.parametrization = replace(own, name=name, base=keys, ssm_init=start, depth="none")
    return made


# --- the batch ------------------------------------------------------------------------------------


def made_up_batch(grid: Grid, clips: int = CLIPS, seed: int = 0) -> Batch:
    """Waves in space and time around 1 with a little noise, in a ball around which all is −2.

    Not around 0: the readout's gradient then adds up over tokens at every width. Where it does not,
    the chance part of a narrow model's first steps makes its slope steeper (measured: −0.3).
    """
    drawn = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.arange(s) / s for s in grid), indexing="ij")
    bold = 1 + 0.3 * torch.randn(clips, 1, *grid, generator=drawn)
    for _ in range(3):
        turns = torch.randint(1, 3, (clips, 4), generator=drawn).float()
        phase = torch.rand(clips, generator=drawn)
        for clip in range(clips):
            angle = sum(t * axis for t, axis in zip(turns[clip], axes, strict=True)) + phase[clip]
            bold[clip, 0] += 0.5 * torch.sin(2 * torch.pi * angle)
    mask = brain_of(grid[:3]).expand(clips, -1, -1, -1).clone()
    bold = torch.where(mask[:, None, ..., None], bold, torch.tensor(-2.0))
    return Batch(
        bold=bold,
        mask=mask,
        tr=torch.ones(clips),
        subject=[f"s{i}" for i in range(clips)],
        run=[f"r{i}" for i in range(clips)],
        start=torch.zeros(clips),
        seed=torch.arange(clips),
    )


# --- what is looked at ----------------------------------------------------------------------------


def pooled_taps(model: nn.Module) -> Iterator[Tap]:
    """:func:`zoo_taps` with the logits of all blocks as one."""
    for tap in zoo_taps(model):
        yield tap._replace(name=LOGITS) if tap.name.endswith(".logits") else tap


def zoo_taps(model: nn.Module) -> Iterator[Tap]:
    """Leaf modules, residual streams, and what fused modules never pass through one of their own.

    Of attention: logits of neighbouring rows, and the mixed values. Of a Mamba mixer: its parts
    before and after the convolution, the scan and what it adds to the stream.
    """
    yield from leaf_taps(model)
    for name, module in model.named_modules():
        if isinstance(module, SwinBlock):
            yield Tap(f"{name}.stream", module, lambda _, out: out)
        elif isinstance(module, WindowAttention):
            yield Tap(f"{name}.logits", module.qkv, _logits(module))
            yield Tap(f"{name}.mixed", module.proj, lambda inputs, _: inputs[0])
        elif isinstance(module, MambaBlock):
            yield Tap(f"{name}.stream", module, lambda _, out: out)
            yield Tap(f"{name}.added", module, lambda inputs, out: out - inputs[0])
            for part in MIXER_PARTS:
                yield Tap(f"{name}.mixer.{part}", module, _mixer_part(module, part))


def _logits(attention: WindowAttention) -> Callable[[tuple[Any, ...], Any], Tensor]:
    """``q_i · k_(i+1) · scale`` of every head: of the size of true logits, whatever the windows."""

    def read(_: tuple[Any, ...], qkv: Any) -> Tensor:
        q, k, _ = qkv.unflatten(-1, (3, attention.heads, -1)).unbind(-3)
        found: Tensor = (q[:-1] * k[1:]).sum(-1) * (attention.scale * attention.multiplier)
        return found

    return read


MIXER_PARTS = ("z", "x", "B", "C", "dt", "scan")


def _mixer_part(block: MambaBlock, part: str) -> Callable[[tuple[Any, ...], Any], Tensor]:
    def read(inputs: tuple[Any, ...], _: Any) -> Tensor:
        return mixer_parts(block.mixer, inputs[0], block.norm.weight)[part]

    return read


def mixer_parts(mixer: Mamba2, u: Tensor, prenorm: Tensor) -> dict[str, Tensor]:
    """What a mixer forms on the way, computed again from its input ``u (b, l, d)``.

    ``x, B, C`` after convolution and SiLU, ``dt`` after softplus, ``scan`` with the skip.
    """
    w, groups, inner = mixer.weights(prenorm), mixer.ngroups, mixer.inner
    states = groups * mixer.d_state
    projected = F.linear(F.rms_norm(u, u.shape[-1:], eps=EPS), w.inward, w.inward_bias)
    z, mixed, dt = torch.split(projected, [inner, inner + 2 * states, mixer.heads], -1)
    taps = F.pad(mixed.transpose(1, 2), (mixer.d_conv - 1, 0))
    mixed = F.silu(F.conv1d(taps, w.conv[:, None], w.conv_bias, groups=len(w.conv))).transpose(1, 2)
    x, B, C = torch.split(mixed, [inner, states, states], -1)
    dt, x = F.softplus(dt + w.dt_bias), torch.unflatten(x, -1, (mixer.heads, -1))
    B, C = (torch.unflatten(v, -1, (groups, -1)) for v in (B, C))
    y, _ = ssd(x, dt, w.A, B, C)
    return {"z": z, "x": x, "B": B, "C": C, "dt": dt, "scan": y + x * w.D[:, None]}


# --- the check ------------------------------------------------------------------------------------


def build_at(
    recipe: Recipe,
    width: int,
    seed: int,
    base: int,
    parametrization: str | None = None,
    heads_at: int | None = None,
) -> PretrainingModel:
    """The small model at ``width``; see :func:`at_width`. ``heads_at``: its queries start at 0."""
    torch.manual_seed(seed)
    model = build_model(at_width(recipe, width, base, parametrization, heads_at))
    if heads_at is not None:
        for module in model.modules():
            if isinstance(module, WindowAttention):
                module.init_zero_queries()
    return cast(PretrainingModel, model.train())


def lr_scales(model: nn.Module) -> dict[str, float]:
    """Factor on the learning rate of every trained parameter by its name; all 1 without muP."""
    made: Parametrization | None = getattr(model, "parametrization", None)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if made is None:
        return dict.fromkeys(names, 1.0)
    groups = made.groups(model)
    return {name: groups[name].lr_scale for name in names}


def adamw(model: nn.Module, scales: dict[str, float], lr: float) -> torch.optim.AdamW:
    """Without decay, ε scaled as the rate is, so that every first step has the size of its rate."""
    named = dict(model.named_parameters())
    groups = [
        {
            "params": [p for name, p in named.items() if scales.get(name) == scale],
            "lr": lr * scale,
            "eps": EPSILON * scale,
        }
        for scale in sorted(set(scales.values()))
    ]
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)


def check_recipe(
    recipe: str | Recipe,
    overrides: Sequence[str] = (),
    widths: Sequence[int] | None = None,
    *,
    parametrization: str | None = None,
    lr: float = LR,
    steps: int = 4,
    seeds: int = 2,
    tolerance: float = LIMIT,
    on_model: Callable[[int, int, int], None] | None = None,
) -> CoordinateCheck:
    """Coordinate check of a recipe's backbone and objective, made small.

    Args:
        recipe: Of a pretraining; its own base width is replaced with the narrowest of ``widths``.
            If the heads of its base have another size (:func:`heads_grow`), they are one number
            at all widths, and their queries start at zero (see above).
        overrides: ``key=value``.
        widths: Of the first stage; None: :func:`widths_of`.
        parametrization: ``sp`` or ``mup`` instead of the recipe's own.
        lr: Of AdamW; large, or the check proves nothing.
        steps, seeds, tolerance, on_model: See :func:`coordinate_check`.

    Raises:
        RecipeError: a recipe without an objective, or widths that its heads do not make up.
    """
    whole = load_recipe(recipe, overrides)
    made = small(whole)
    grow = heads_grow(whole)
    sizes = sorted(widths or widths_of(made, grow))
    base, name = sizes[0], parametrization or made.parametrization.name
    heads_at = base if grow else None
    for width in sizes:
        width_keys(made, width, heads_at)  # refused before the first model is trained
    batch = made_up_batch(Grid(*made.backbone.img_size))

    def make(width: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = build_at(made, width, seed, base, name, heads_at)
        return model, adamw(model, lr_scales(model), lr)

    return coordinate_check(
        make,
        lambda model: loss_on(model, batch),
        sizes,
        steps=steps,
        seeds=seeds,
        taps=pooled_taps if grow else zoo_taps,
        name=f"{made.backbone.name} {made.objective.name} {name}",
        tolerance=tolerance,
        transients=TRANSIENTS if grow else {},
        on_model=on_model,
    )


def loss_on(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of a pretraining model on ``batch``."""
    loss: Tensor = model(batch)[0]
    return loss
