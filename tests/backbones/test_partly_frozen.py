"""Encoders of which a part trains: right gradients, and nothing computed for what is frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_stubs import BUILDS, blocks_of, build, parameters_of, tokens_of
from torch import Tensor, nn

from fmrizoo.layers import pieces
from fmrizoo.types import Backbone

MODES = ["none", "block", "window-chunk"]
DTYPES = [torch.float32, torch.bfloat16]


def backward(backbone: Backbone) -> dict[str, Tensor | None]:
    """Gradients by name."""
    backbone.zero_grad()
    values = backbone.encode(tokens_of(backbone)).values
    torch.manual_seed(3)
    (values.float() * torch.randn(values.shape)).sum().backward()
    return {name: p.grad for name, p in backbone.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BUILDS)
def test_what_trains_gets_the_bits_of_full_training(
    kind: str, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last two layers, the first, one in between; the others have no gradient at all."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    backbone = build(kind).to(dtype)
    backbone.set_checkpointing(mode)
    everything = backward(backbone)
    layers = backbone.layer_names()
    for chosen in (layers[-2:], layers[:1], layers[2:3]):
        names = parameters_of(backbone, chosen)
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name in names)
        for name, gradient in backward(backbone).items():
            if name not in names:
                assert gradient is None, name
                continue
            wanted = everything[name]
            assert gradient is not None and wanted is not None
            assert torch.equal(gradient, wanted), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BUILDS)
def test_single_parameters_get_the_bits_of_full_training(kind: str, mode: str) -> None:
    """Biases and norms only, matrices only: whatever is left out changes nothing else."""
    backbone = build(kind)
    backbone.set_checkpointing(mode)
    everything = backward(backbone)
    for matrices in (False, True):
        for parameter in backbone.parameters():
            parameter.requires_grad_((parameter.ndim > 1) == matrices)
        for name, gradient in backward(backbone).items():
            wanted = everything[name]
            if not backbone.get_parameter(name).requires_grad:
                assert gradient is None, name
            else:
                assert gradient is not None and wanted is not None
                assert torch.equal(gradient, wanted), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BUILDS)
def test_frozen_layers_below_run_once(
    kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed is only what a gradient passes through."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    backbone = build(kind)
    backbone.set_checkpointing(mode)
    names = parameters_of(backbone, backbone.layer_names()[-2:])
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in names)
    ran: list[nn.Module] = []
    for block in blocks_of(backbone):
        # Before, not after: recomputing stops as soon as nothing more is missing.
        block.register_forward_pre_hook(lambda module, *_: ran.append(module))
    with torch.no_grad():
        backbone.encode(tokens_of(backbone))
    once = list(ran)
    ran.clear()
    backward(backbone)
    order = list(dict.fromkeys(once))
    for number, block in enumerate(order):
        recomputes = mode == "block" or (mode == "window-chunk" and hasattr(block, "attn"))
        times = 2 if recomputes and number >= len(order) - 2 else 1
        assert ran.count(block) == times * once.count(block), number


@pytest.mark.parametrize("kind", BUILDS)
def test_frozen_layers_keep_nothing_for_the_backward_pass(kind: str) -> None:
    backbone = build(kind)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    for trains in (True, False):
        kept.clear()
        backbone.requires_grad_(trains)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            features = backbone.encode(tokens_of(backbone))
        assert features.values.requires_grad == bool(kept) == trains


class Adapter(nn.Module):
    """A low-rank adapter as any: a module around a Linear."""

    def __init__(self, base: nn.Module, ins: int, outs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(ins, 2, bias=False, dtype=dtype)
        self.up = nn.Linear(2, outs, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + 0.5 * self.up(self.down(x))
        return out


def adapt(backbone: Backbone) -> list[str]:
    """Adapters around all targets, two around the first; their names."""
    torch.manual_seed(4)
    linears = {n: m for n, m in backbone.named_modules() if isinstance(m, nn.Linear)}
    names = [n for n in linears if n.endswith(backbone.lora_targets())]
    for number, name in enumerate(names):
        base, (above, _, last) = linears[name], name.rpartition(".")
        settings: tuple[Any, ...] = (base.in_features, base.out_features, base.weight.dtype)
        made = Adapter(base, *settings)
        if number == 0:
            made = Adapter(made, *settings)
        setattr(backbone.get_submodule(above), last, made)
    return [n for n, _ in backbone.named_parameters() if ".down." in n or ".up." in n]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BUILDS)
def test_adapters_in_a_frozen_encoder_get_the_bits_of_full_training(
    kind: str, mode: str, dtype: torch.dtype
) -> None:
    backbone = build(kind).to(dtype)
    backbone.set_checkpointing(mode)
    plain = backbone.encode(tokens_of(backbone)).values
    names = adapt(backbone)
    assert not torch.equal(plain, backbone.encode(tokens_of(backbone)).values)
    everything = backward(backbone)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in names)
    for name, gradient in backward(backbone).items():
        wanted = everything[name]
        if name not in names:
            assert gradient is None, name
        else:
            assert gradient is not None and wanted is not None and gradient.abs().sum() > 0
            assert torch.equal(gradient, wanted), name
