"""Stages and layers of every backbone: what runs, in what order, and what belongs to what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_stubs import BUILDS, blocks_of, build, parameters_of, tokens_of
from torch import nn

from fmrizoo.backbones import Swin4D, Swin4DConfig
from fmrizoo.errors import RecipeError
from fmrizoo.types import Backbone


def watched(backbone: Backbone) -> list[nn.Module]:
    """Filled with the blocks as they run."""
    ran: list[nn.Module] = []
    for block in blocks_of(backbone):
        block.register_forward_hook(lambda module, *_: ran.append(module))
    return ran


@pytest.mark.parametrize("kind", BUILDS)
def test_every_parameter_lies_in_one_layer(kind: str) -> None:
    backbone = build(kind)
    layers = backbone.layer_names()
    found = [name for layer in layers for name in parameters_of(backbone, [layer])]
    assert sorted(found) == sorted(name for name, _ in backbone.named_parameters())
    assert len(layers) == 1 + len(blocks_of(backbone)) == 1 + len(backbone.prompt_widths())
    for layer in layers:
        assert parameters_of(backbone, [layer])
        for part in layer:
            above, _, last = part.rpartition(".")
            assert hasattr(backbone.get_submodule(above), last)


@pytest.mark.parametrize("kind", BUILDS)
def test_layers_are_named_in_the_order_they_run(kind: str) -> None:
    backbone = build(kind).eval()
    ran = watched(backbone)
    with torch.no_grad():
        backbone.encode(tokens_of(backbone, 1))
    order = list(dict.fromkeys(ran))
    name_of = {module: name for name, module in backbone.named_modules()}
    layers = backbone.layer_names()[1:]
    assert len(order) == len(layers)
    for block, layer in zip(order, layers, strict=True):
        assert name_of[block] in layer
    widths = [getattr(b, "norm1", getattr(b, "norm", None)).weight.numel() for b in order]
    assert tuple(widths) == backbone.prompt_widths()


@pytest.mark.parametrize("kind", BUILDS)
def test_later_stages_do_not_run(kind: str) -> None:
    backbone = build(kind).eval()
    tokens = tokens_of(backbone)
    every = backbone.encode_stages(tokens)
    assert [f.values.shape[-1] for f in every] == list(backbone.stage_features)
    assert backbone.num_features == backbone.stage_features[-1]
    per_stage = len(blocks_of(backbone)) // len(every)
    ran = watched(backbone)
    for indices in ([0], [1, 0], [-len(every)], [-1], [1, 1], []):
        ran.clear()
        found = backbone.encode_stages(tokens, indices)
        last = max((i % len(every) for i in indices), default=-1)
        assert len(dict.fromkeys(ran)) == (last + 1) * per_stage
        assert len(found) == len(indices)
        for index, features in zip(indices, found, strict=True):
            assert torch.equal(features.values, every[index].values)
    assert torch.equal(backbone.encode(tokens).values, every[-1].values)
    with pytest.raises(RecipeError, match="do not exist"):
        backbone.encode_stages(tokens, [len(every)])


@pytest.mark.parametrize("kind", [k for k in BUILDS if k != "both_ways"])
def test_stages_may_be_causal(kind: str) -> None:
    backbone = build(kind).eval()
    tokens = tokens_of(backbone)
    first, last = backbone.encode_stages(tokens, (0, -1), causal=True)
    assert torch.equal(last.values, backbone.encode(tokens, causal=True).values)
    plain = backbone.encode_stages(tokens, (0,))[0]
    assert torch.equal(first.values, plain.values) == (backbone.causal_unit == "token")


def test_the_last_two_layers_hold_about_thirty_percent() -> None:
    """Of the 51M encoder: 27.9 %."""
    values: dict[str, Any] = {
        "embed_dim": 96,
        "depths": [2, 2, 18, 2],
        "num_heads": [6, 12, 24, 48],
        "patch_size": [6, 6, 6, 2],
        "patch_norm": True,
        "final_norm": True,
    }
    with torch.device("meta"):
        backbone = Swin4D(Swin4DConfig(**values))
    counts = {name: p.numel() for name, p in backbone.named_parameters()}
    last = parameters_of(backbone, backbone.layer_names()[-2:])
    assert 50e6 < sum(counts.values()) < 52e6
    assert 0.275 < sum(counts[name] for name in last) / sum(counts.values()) < 0.30
