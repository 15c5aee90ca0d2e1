"""CompleteP over depth: the residual stream, and what steps change of it, do not grow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmrizoo.analysis.mup_check import CoordinateCheck, Tap, coordinate_check, leaf_taps
from fmrizoo.analysis.mup_recipe import loss_on, made_up_batch, small, width_keys
from fmrizoo.config import ParametrizationConfig, Recipe, TrainConfig
from fmrizoo.trainer.engine import param_groups
from fmrizoo.types import Grid
from fmrizoo.zoo import build_model, load_recipe

WIDTH = {"swin4d": 32, "swin_factorized": 36, "neuromamba": 32}
FIRST = {"swin4d": 2, "swin_factorized": 4, "neuromamba": 2}  # base depth, of every stage
NAMES = sorted(WIDTH)


def at_depth(name: str, times: int, completep: bool, **backbone: Any) -> Recipe:
    """A small recipe at base width and ``times`` the base depth.

    The voxels count double (``input_mult``): random branches of the base are then small beside the
    stream, and so is their share that goes with depth^-½ (measured without: a slope of −0.2).
    """
    made = small(load_recipe(f"pretrain/{name}_simmim"))
    base = width_keys(made, WIDTH[name])
    depth: Any = {"depth": FIRST[name] * times}
    key, own = "depth", FIRST[name]
    if name != "neuromamba":
        depth, key, own = {"depths": [FIRST[name] * times] * 2}, "depths", [FIRST[name]] * 2
    made.backbone = replace(made.backbone, **base, **depth, **backbone)
    made.parametrization = ParametrizationConfig(
        name="mup",
        base={**base, key: own} if completep else base,
        depth="completep" if completep else "none",
        input_mult=2.0,
        ssm_init="stratified" if name == "neuromamba" else "random",
    )
    return made


def outside_blocks(model: nn.Module) -> Iterator[Tap]:
    """Leaf modules that every depth has, and the stream at the end of stages (of NeuroMamba also
    half-way)."""
    yield from (tap for tap in leaf_taps(model) if ".blocks." not in tap.name)

    def out(_: object, output: Tensor) -> Tensor:
        return output

    backbone: Any = model.get_submodule("backbone")
    if hasattr(backbone, "layers"):
        for number, stage in enumerate(backbone.layers):
            yield Tap(f"stream.{number}", stage, out)
    else:
        yield Tap("stream.0", backbone.blocks[len(backbone.blocks) // 2 - 1], out)
        yield Tap("stream.1", backbone.blocks[-1], out)


def check(
    name: str,
    completep: bool,
    times: tuple[int, ...],
    seeds: int = 1,
    join_rate: bool = True,
    **backbone: Any,
) -> CoordinateCheck:
    """``times``: depths / base depth, the check's "widths"; in the trainer's own groups."""

    def make(factor: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = build_model(at_depth(name, factor, completep, **backbone)).train()
        groups = param_groups(model, TrainConfig(lr=2**-9, weight_decay=0.0, eps=1e-12))
        if not join_rate:
            groups = [{**group, "lr": 2**-9} for group in groups]  # all rates are 1 at base width
        return model, torch.optim.AdamW(groups, betas=(0.9, 0.95))

    grid = Grid(*at_depth(name, 1, completep).backbone.img_size)
    batch = made_up_batch(grid)
    found = coordinate_check(
        make, lambda m: loss_on(m, batch), times, steps=3, seeds=seeds, taps=outside_blocks
    )
    kept = tuple(p for p in found.points if ".blocks." not in p.module)  # loose ones inside blocks
    return replace(found, points=kept)


def stream(found: CoordinateCheck) -> list[tuple[float, float]]:
    return [(v.activation, v.change) for v in found.verdicts if v.module.startswith("stream")]


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_does_not_grow_with_the_depth(name: str) -> None:
    with_it = check(name, True, (1, 4))
    assert with_it.moved > 0.05, with_it.says
    assert all(abs(slope) < 0.25 for both in stream(with_it) for slope in both), stream(with_it)
    without = check(name, False, (1, 4))
    assert all(change > 0.4 for _, change in stream(without)), stream(without)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("swin4d", {}),
        ("swin_factorized", {}),
        ("swin_factorized", {"residual": "layerscale"}),
        ("neuromamba", {}),
        ("neuromamba", {"bidirectional": True}),
    ],
)
def test_completep_keeps_its_word_over_eight_times_the_depth(
    name: str, backbone: dict[str, Any]
) -> None:
    times = (1, 2, 4, 8)
    with_it = check(name, True, times, seeds=2, **backbone)
    assert with_it.passed, with_it.says
    without = check(name, False, times, seeds=2, **backbone)
    assert not without.passed and abs(without.worst.worst) > 0.5, without.says


@pytest.mark.slow
def test_what_joins_factorized_blocks_learns_slower_the_more_there_are() -> None:
    """Without the factor on its rate the last stream's change grows with the depth."""
    times = (1, 2, 4, 8)
    right = check("swin_factorized", True, times, residual="layerscale")
    wrong = check("swin_factorized", True, times, residual="layerscale", join_rate=False)
    assert wrong.worst.worst > right.worst.worst + 0.2, (wrong.says, right.says)
