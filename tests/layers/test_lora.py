"""The low-rank layer against its equation, and what it keeps bit by bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.layers.lora import LoraLinear, LoraSettings, linear_layers, lora_layers, unwrap, wrap


def layer_of(
    *names: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32, learned: bool = True
) -> LoraLinear:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(6, 5, dtype=dtype))
    for rank, name in enumerate(names or ("default",), start=2):
        layer.add(name, LoraSettings(rank, 8.0, dropout))
        if learned:
            nn.init.normal_(layer.lora_B[name].weight)  # type: ignore[arg-type]
    return layer


def test_a_new_adapter_changes_no_bit() -> None:
    layer, x = layer_of(learned=False), torch.randn(7, 6)
    assert torch.equal(layer(x), layer.base_layer(x))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not up.any() and down.shape == (2, 6) and up.shape == (5, 2)
    # Kaiming uniform with a = √5: the bound is 1 / √(inputs).
    wide = LoraLinear(nn.Linear(400, 3))
    wide.add("default", LoraSettings(50))
    values = wide.lora_A["default"].weight
    assert values.abs().max() <= 1 / 20
    assert values.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)


def test_output_is_that_of_the_equation() -> None:
    layer, x = layer_of(), torch.randn(2, 3, 6)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + (x @ down.T @ up.T) * (8.0 / 2)
    torch.testing.assert_close(layer(x), expected)


def test_adapters_in_use_add_up() -> None:
    layer, x = layer_of("a", "b"), torch.randn(4, 6)
    assert layer.names == ("a", "b") and layer.active == ("b",), "the newest one acts"
    base, parts = layer.base_layer(x), {}
    for name in ("a", "b"):
        layer.use([name])
        parts[name] = layer(x) - base
    layer.use(["a", "b"])
    torch.testing.assert_close(layer(x), base + parts["a"] + parts["b"])
    layer.use([])
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_merging_keeps_outputs_and_unmerging_brings_back_every_bit(dtype: torch.dtype) -> None:
    layer, x = layer_of("a", "b", dtype=dtype), torch.randn(50, 6, dtype=dtype)
    layer.use(["a", "b"])
    before, expected = layer.base_layer.weight.detach().clone(), layer(x)
    layer.merge()
    layer.merge()  # a second time changes nothing
    assert layer.merged and not torch.equal(layer.base_layer.weight, before)
    assert torch.equal(layer.plain_weight, before)
    error = (layer(x) - expected).abs().max() / expected.abs().max()
    assert error <= {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}[dtype]
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged
    assert torch.equal(layer(x), expected)


def test_a_merged_layer_is_neither_changed_nor_saved() -> None:
    layer = layer_of()
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    for change in (
        lambda: layer.add("b", LoraSettings()),
        lambda: layer.drop("default"),
        lambda: layer.use([]),
    ):
        with pytest.raises(RecipeError, match="merged into the weights: unmerge them first"):
            change()
    with pytest.raises(CheckpointError, match="merged adapters cannot be saved"):
        nn.Sequential(layer).state_dict()
    with pytest.raises(CheckpointError, match="merged adapters cannot be loaded"):
        layer.load_state_dict(state)


def test_names_of_the_parameters() -> None:
    layer = layer_of("a", "b")
    assert list(layer.state_dict()) == [
        "base_layer.weight", "base_layer.bias", "lora_A.a.weight", "lora_A.b.weight",
        "lora_B.a.weight", "lora_B.b.weight",
    ]  # fmt: skip
    assert (layer.in_features, layer.out_features) == (6, 5)
    with pytest.raises(AttributeError, match="weight"):
        _ = layer.weight


def test_dropout_acts_on_the_adapter_alone_and_in_training_only() -> None:
    layer, x = layer_of(dropout=0.5), torch.ones(1, 6)
    base = layer.base_layer(x)
    assert not torch.equal(layer.train()(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.use([])
    assert torch.equal(layer.train()(x), base)
    # As the Mamba mixer asks: a channel is there (twice as strong) or not, for every output.
    layer.use(["default"])
    with torch.no_grad():
        plain = layer.base_layer(torch.eye(6))
        full = (layer.eval()(torch.eye(6)) - plain) * 2
        drawn = layer.train()(torch.eye(6)) - plain
    kept = drawn.abs().sum(1) > 1e-6
    assert kept.any() and not kept.all()
    torch.testing.assert_close(drawn, full * kept.unsqueeze(1), atol=1e-6, rtol=1e-5)


def test_copies_moves_and_recomputing() -> None:
    layer, x = layer_of(dropout=0.3), torch.randn(4, 6, requires_grad=True)
    twin = copy.deepcopy(layer)
    torch.nn.init.zeros_(twin.lora_B["default"].weight)
    assert not torch.equal(twin.eval()(x), layer.eval()(x)), "a copy shares nothing"
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert layer.to("meta")(x.to("meta")).shape == (4, 5)
    grads = []
    for again in (False, True):
        layer = layer_of(dropout=0.3).train()
        torch.manual_seed(3)
        out = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        out.square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    for kept, made in zip(*grads, strict=True):
        assert torch.equal(kept, made)


def test_a_new_adapter_is_as_awake_as_its_layer() -> None:
    base = nn.Linear(3, 3).eval()
    layer = LoraLinear(base)
    layer.add("a", LoraSettings(dropout=0.5))
    assert not any(m.training for m in layer.modules())


@pytest.mark.parametrize("name", ["", "a.b", "keys", "-a", "pop", "a b"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(RecipeError, match="cannot name an adapter"):
        layer_of().add(name, LoraSettings())
    with pytest.raises(RecipeError, match="already has an adapter 'default'"):
        layer_of().add("default", LoraSettings())


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"alpha": 0.0}, {"alpha": math.inf}, {"dropout": 1.0}]
)
def test_impossible_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="low-rank adapters need rank ≥ 1, alpha > 0"):
        LoraSettings(**values)  # type: ignore[arg-type]


def test_layers_of_a_model_are_wrapped_in_place_and_come_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    first, second = model[0], model[1][0]
    assert list(linear_layers(model)) == ["0", "1.0"]
    for layer in wrap(model, ["1.0"]):
        layer.add("0", LoraSettings(1))
    assert model[0] is first and model[1][0].base_layer is second
    assert list(linear_layers(model)) == ["0", "1.0"] and list(lora_layers(model)) == ["1.0"]
    unwrap(model, empty_only=True)
    assert list(lora_layers(model)) == ["1.0"]
    unwrap(model)
    assert model[1][0] is second and not lora_layers(model)


@pytest.mark.parametrize("wants_input", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_one_adapter_on_a_frozen_layer_is_summed_inside_the_product(
    bias: bool, wants_input: bool
) -> None:
    """The same numbers as the operations one by one, forward and backward (fp64, 1e-12)."""
    found = []
    for frozen in (True, False):
        torch.manual_seed(0)
        layer = LoraLinear(nn.Linear(6, 5, bias=bias, dtype=torch.float64))
        layer.add("default", LoraSettings(3, 5.0))
        nn.init.normal_(layer.lora_B["default"].weight)  # type: ignore[arg-type]
        layer.base_layer.requires_grad_(not frozen)
        x = torch.randn(4, 7, 6, dtype=torch.float64).requires_grad_(wants_input)
        out = layer(x)
        by = [out.grad_fn, *(f for f, _ in out.grad_fn.next_functions if f is not None)]
        assert any("_Adapted" in type(f).__name__ for f in by) == frozen
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        grads = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        found.append([out, *grads, *([x.grad] if wants_input else [])])
        assert (layer.base_layer.weight.grad is None) == frozen
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_what_follows_may_overwrite_the_output() -> None:
    """Rotary positions turn queries and keys in place."""
    layer, x = layer_of(), torch.randn(4, 6)
    layer.base_layer.requires_grad_(False)
    out = layer(x)
    out.mul_(2)
    out.sum().backward()
    doubled = layer.lora_A["default"].weight.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(doubled, 2 * layer.lora_A["default"].weight.grad)


def test_dropout_and_autocast_take_the_operations_one_by_one() -> None:
    layer, x = layer_of(dropout=0.5), torch.randn(9, 6)
    layer.base_layer.requires_grad_(False)
    layer.eval()
    assert "_Adapted" in type(layer(x).grad_fn).__name__
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    # Only the dropout of a frozen encoder's adapters follows train().
    layer.lora_dropout.train()
    assert not torch.equal(layer(x), layer(x))


def test_the_summed_form_recomputes_and_rounds_as_the_other() -> None:
    layer, x = layer_of(), torch.randn(64, 6)
    layer.base_layer.requires_grad_(False)
    layer(x).square().sum().backward()
    expected = [w.grad.clone() for w in layer.parameters() if w.grad is not None]
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    again = [w.grad.clone() for w in layer.parameters() if w.grad is not None]
    assert len(again) == 2 and all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    layer.zero_grad()
    layer.bfloat16()(x.bfloat16()).square().sum().backward()
    rounded = [w.grad for w in layer.parameters() if w.grad is not None]
    for a, b in zip(rounded, expected, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()
