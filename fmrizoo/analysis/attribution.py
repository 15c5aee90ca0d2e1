"""Which voxels make a fine-tuned model's score? Integrated gradients and occlusion of one clip.

The inputs are the brain voxels of a clip ``(t, v)``, whatever the backbone reads (dense volumes,
or kept patches alone): what lies outside the brain is never attributed anything.

- Integrated gradients (Sundararajan et al. 2017) by captum. Complete: attributions add up to
  ``f(clip) − f(baseline)`` but for the error of the numerical integral.
- Occlusion (Zeiler & Fergus 2014): one cube of voxels after the other is set to the baseline, over
  all frames; the fall of the score is shared evenly by its voxels. Not complete in general.

Sanity check: randomising parameters from the head down must change the map (Adebayo et al. 2018).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmrizoo.errors import DataError, MissingExtraError, RecipeError
from fmrizoo.heads.base import parameter_layers
from fmrizoo.model import DownstreamModel
from fmrizoo.registry import suggest
from fmrizoo.types import Batch, TaskSpec, Voxels

METHODS = ("ig", "occlusion")
BASELINES = ("background", "mean")

Score = Callable[[Tensor], Tensor]  # (n, t, v) → (n,)


def voxels_of(batch: Batch) -> Voxels:
    """The compact form of a batch; of a dense one, its brain voxels and its value outside."""
    if batch.voxels is not None:
        return batch.voxels
    first = batch.bold[:, 0, ..., 0].flatten(1)
    outside = (~batch.mask).flatten(1)
    background = first.gather(1, outside.int().argmax(1, keepdim=True))[:, 0]
    background = torch.where(outside.any(1), background, first.new_zeros(()))
    return Voxels.of(batch.bold, batch.mask, background)


def model_scores(model: DownstreamModel, batch: Batch) -> Tensor:
    """``(b, Σ TaskSpec.scores)`` with gradients towards the clips, frozen encoder or not."""
    head, backbone = model.head, model.backbone
    stages = backbone.encode_stages(backbone.read(batch), head.stages, prompts=head.prompts())
    return head.scores(head.answer(head.read(stages)))


def target_value(
    tasks: Sequence[TaskSpec], target: int, label: int | None
) -> Callable[[Tensor], Tensor]:
    """What of the scores is explained: ``(n, Σ scores)`` → ``(n,)``.

    Classification: the logit of class ``label`` minus the mean of the other classes' (what all
    logits share decides nothing). Ordinal: the expected level, counted from 0. Regression: the
    value in the target's own unit.

    Raises:
        RecipeError: classification without a class.
    """
    task = tasks[target]
    first = sum(t.scores for t in tasks[:target])
    if task.kind == "classification" and label is None:
        raise RecipeError(f"the class of {task.name!r} that is to be explained must be given")

    def value(scores: Tensor) -> Tensor:
        own = scores[:, first : first + task.scores]
        if task.kind == "regression":
            return own[:, 0]
        if task.kind == "ordinal":
            levels = torch.arange(task.scores, device=own.device, dtype=own.dtype)
            return own.exp() @ levels
        assert label is not None
        rest = (own.sum(1) - own[:, label]) / (task.scores - 1)
        return own[:, label] - rest

    return value


def clip_score(
    model: DownstreamModel, batch: Batch, value: Callable[[Tensor], Tensor]
) -> tuple[Score, Tensor]:
    """The score of one clip as a function of its brain voxels, and these ``(t, v)``.

    Args:
        model: In ``eval()`` mode.
        batch: One clip.
        value: See :func:`target_value`.
    """
    if len(batch) != 1:
        raise DataError(f"one clip is explained at a time, got {len(batch)}")
    voxels = voxels_of(batch)

    def score(values: Tensor) -> Tensor:
        n = len(values)
        many = Voxels(
            values=values.transpose(0, 1).flatten(1),
            index=voxels.index.repeat(n),
            counts=voxels.counts * n,
            background=voxels.background.expand(n),
            grid=voxels.grid,
        )
        copies = Batch.compact(
            many,
            mask=batch.mask.expand(n, -1, -1, -1),
            tr=batch.tr.expand(n),
            subject=batch.subject * n,
            run=batch.run * n,
            start=batch.start.expand(n),
        )
        return value(model_scores(model, copies))

    return score, voxels.values


def baseline_of(batch: Batch, how: str) -> Tensor:
    """``(t, v)`` what a voxel is without a signal.

    ``background``: the value outside the brain. ``mean``: the voxel's mean over the clip, which
    leaves the level of each voxel and removes what changes over time.
    """
    voxels = voxels_of(batch)
    if how == "background":
        return voxels.background[0].to(voxels.values.dtype).expand_as(voxels.values)
    if how == "mean":
        return voxels.values.mean(0, keepdim=True).expand_as(voxels.values)
    raise RecipeError(f"baseline={how!r} is not known.{suggest(how, list(BASELINES))}")


@dataclass(frozen=True, eq=False)
class Attributed:
    """Attributions of one clip.

    Attributes:
        values: ``(t, v)``; occlusion: the same in every frame.
        score, baseline: Of the clip and of its baseline.
    """

    values: Tensor
    score: float
    baseline: float

    @property
    def difference(self) -> float:
        """What complete attributions add up to."""
        return self.score - self.baseline

    @property
    def error(self) -> float:
        """Sum of the attributions minus :attr:`difference`."""
        return float(self.values.double().sum()) - self.difference


def integrated_gradients(
    score: Score, values: Tensor, baseline: Tensor, *, steps: int = 32, at_once: int = 8
) -> Attributed:
    """Integrated gradients along the line from ``baseline`` to ``values`` (both ``(t, v)``).

    Args:
        score: Differentiable.
        values, baseline: The clip and where the path starts.
        steps: Points of the Gauss–Legendre rule.
        at_once: Clips in memory at a time.

    Raises:
        MissingExtraError: captum is not installed.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise MissingExtraError(
            'integrated gradients need captum: pip install "fmrizoo[understand]", or take '
            "--method occlusion"
        ) from None

    found = IntegratedGradients(score).attribute(
        values[None].detach(),
        baselines=baseline[None].detach(),
        n_steps=steps,
        internal_batch_size=at_once,
    )
    return Attributed(found[0].detach(), *_ends(score, values, baseline))


@torch.no_grad()
def occlusion(
    score: Score, values: Tensor, baseline: Tensor, cube: Tensor, *, at_once: int = 8
) -> Attributed:
    """Fall of the score where one cube after the other is set to the baseline.

    Args:
        score: Of clips ``(n, t, v)``.
        values, baseline: ``(t, v)``.
        cube: ``(v,)`` which cube each voxel is in, see :func:`cubes`.
        at_once: Clips in memory at a time.
    """
    full, empty = _ends(score, values, baseline)
    _, place, size = torch.unique(cube, return_inverse=True, return_counts=True)
    falls = []
    for part in torch.split(torch.arange(len(size), device=values.device), at_once):
        gone = (place[None] == part[:, None])[:, None]
        falls.append(full - score(torch.where(gone, baseline[None], values[None])).double())
    fall = torch.cat(falls)
    each = (fall / size)[place] / len(values)
    return Attributed(each.expand(len(values), -1), full, empty)


@torch.no_grad()
def _ends(score: Score, values: Tensor, baseline: Tensor) -> tuple[float, float]:
    full, empty = score(torch.stack([values, baseline])).tolist()
    return full, empty


def cubes(voxels: Voxels, side: Sequence[int]) -> Tensor:
    """``(v,)`` number of the cube of ``side`` voxels along x, y, z that each voxel is in."""
    _, ny, nz, _ = voxels.grid
    x, y, z = voxels.index // (ny * nz), voxels.index // nz % ny, voxels.index % nz
    sx, sy, sz = side
    return ((x // sx) * (ny // sy + 1) + y // sy) * (nz // sz + 1) + z // sz


def explain(
    model: DownstreamModel,
    batch: Batch,
    value: Callable[[Tensor], Tensor],
    *,
    method: str = "ig",
    baseline: str = "background",
    steps: int = 32,
    side: Sequence[int] | None = None,
    at_once: int = 8,
) -> Attributed:
    """Attributions of one clip by name of the method.

    Args:
        model: In ``eval()`` mode.
        batch: One clip on the model's device.
        value: See :func:`target_value`.
        method: ``ig`` or ``occlusion``.
        baseline: See :func:`baseline_of`.
        steps: Of integrated gradients.
        side: Voxels of an occluded cube; None: the backbone's patch.
        at_once: Clips in memory at a time.

    Raises:
        RecipeError: an unknown method or baseline.
        DataError: a score that is not finite.
    """
    if method not in METHODS:
        raise RecipeError(f"method={method!r} is not known.{suggest(method, list(METHODS))}")
    score, values = clip_score(model, batch, value)
    start = baseline_of(batch, baseline)
    if method == "ig":
        found = integrated_gradients(score, values, start, steps=steps, at_once=at_once)
    else:
        cube = cubes(voxels_of(batch), side or model.backbone.patch_size[:3])
        found = occlusion(score, values, start, cube, at_once=at_once)
    if not bool(torch.isfinite(found.values).all()):
        raise DataError(f"attributions of run {batch.run[0]} are NaN or infinite")
    return found


def cascade(model: DownstreamModel, at_most: int = 6) -> list[tuple[str, list[str]]]:
    """Parameters in the order in which they are randomised: the head, then layers from the top.

    Returns:
        Up to ``at_most`` steps of (name, parameters); the last one ends with the patch embedding.
    """
    layers = parameter_layers(model.backbone)
    count = max(layers.values()) + 1
    bounds = sorted({round(count * k / (at_most - 1)) for k in range(at_most)}, reverse=True)
    steps = [("head", [f"head.{name}" for name, _ in model.head.named_parameters()])]
    for top, low in itertools.pairwise(bounds):
        names = [f"backbone.{n}" for n, layer in layers.items() if low <= layer < top]
        what = "patch embedding" if top == 1 else f"layer {max(low, 1)}"
        if top - max(low, 1) > 1:
            what = f"layers {top - 1} to {max(low, 1)}"
        steps.append((what + (" and patch embedding" if low == 0 and top > 1 else ""), names))
    return steps


@torch.no_grad()
def randomised(model: DownstreamModel, names: Sequence[str], seed: int = 0) -> DownstreamModel:
    """A copy with the named parameters drawn anew: Gaussian, with each tensor's mean and s.d.

    Adebayo et al. draw them as before training; with the trained tensor's own moments the scale of
    activations stays, whichever the initialisation was (zeros included). Tensors whose values are
    all equal carry nothing and stay.
    """
    other: DownstreamModel = copy.deepcopy(model)
    # Far from the small seeds that people train with: the same draw again would be no other model.
    source = torch.Generator().manual_seed(2_018_000_003 + seed)
    parameters: dict[str, nn.Parameter] = dict(other.named_parameters())
    for name in names:
        parameter = parameters[name]
        if parameter.numel() > 1:
            mean, spread = parameter.mean().cpu(), parameter.std().cpu()
            drawn = torch.randn(parameter.shape, generator=source) * spread + mean
            parameter.copy_(drawn.to(parameter))
    return other.eval()
