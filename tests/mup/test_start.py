"""How muP models start, and what survives what is done to models."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, cast

import mup
import pytest
import torch
from mup_tiny import MOST, TASKS, model, recipe
from torch import Tensor, nn

from fmrizoo import zoo
from fmrizoo.config import Recipe
from fmrizoo.errors import RecipeError
from fmrizoo.heads.readout import TaskLinear
from fmrizoo.layers.readout import Readout
from fmrizoo.model import DownstreamModel, PretrainingModel
from fmrizoo.mup import Parametrization
from fmrizoo.mup.dims import infer
from fmrizoo.mup.parametrization import skeleton
from fmrizoo.types import Backbone, Batch

BOTH = ("swin4d", "swin_factorized", "neuromamba")


def build(made: Recipe, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return model(made)


def batch(target: bool = False) -> Batch:
    torch.manual_seed(5)
    bold = torch.randn(2, 1, 8, 8, 4, 4)
    mask = torch.ones(2, 8, 8, 4, dtype=torch.bool)
    labels = torch.tensor([[0.0, 30.0, 1.0], [2.0, 50.0, 2.0]]) if target else None
    return Batch(
        bold=bold,
        mask=mask,
        tr=torch.full((2,), 2.0),
        subject=["a", "b"],
        run=["a-1", "b-1"],
        start=torch.zeros(2, dtype=torch.long),
        target=labels,
        seed=torch.arange(2),
    )


def steps(trained: nn.Module, count: int = 3, given: Parametrization | None = None) -> list[float]:
    """Losses of AdamW with the groups that the parametrization asks for (None: the trainer's)."""
    groups = None if given is None else given.groups(trained)
    params = []
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
            lr, wd, eps = 3e-3, 0.1, 1e-8
            if groups is not None:
                found = groups[name]
                decays = found.decays
                lr, wd, eps = lr * found.lr_scale, wd * found.wd_scale, eps * found.eps_scale
            params.append(
                {"params": [parameter], "lr": lr, "eps": eps, "weight_decay": wd * decays}
            )
    optimizer = torch.optim.AdamW(params)
    losses = []
    for _ in range(count):
        torch.manual_seed(1)
        loss, _ = trained(batch(isinstance(trained, DownstreamModel)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("backbone", "part"), MOST)
def test_at_base_width_it_is_the_standard_parametrization_bit_for_bit(
    backbone: str, part: str
) -> None:
    plain = build(recipe(backbone, part, name="sp"))
    after = torch.rand(1)
    scaled = build(recipe(backbone, part))
    assert torch.equal(torch.rand(1), after), "as many random numbers were drawn"
    assert plain.parametrization is None
    given = cast(Parametrization, scaled.parametrization)
    left, right = plain.state_dict(), scaled.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)
    if isinstance(plain, Backbone):
        return
    assert steps(plain) == steps(scaled, given=given)
    left, right = plain.state_dict(), scaled.state_dict()
    assert all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(("backbone", "part"), MOST)
def test_every_start_has_the_spread_of_base_width_times_its_factor(
    backbone: str, part: str
) -> None:
    """Pooled over seeds, s.d. within 5 standard errors (of a normal's, wider than a uniform's)."""
    m = 4
    drawn: dict[int, dict[str, list[Tensor]]] = {1: {}, m: {}}
    table = None
    for times, found in drawn.items():
        for seed in range(3):
            built = build(recipe(backbone, part, times), seed)
            table = cast(Parametrization, built.parametrization).table
            for name, parameter in built.named_parameters():
                found.setdefault(name, []).append(parameter.detach().flatten())
    assert table is not None
    for name, rule in table.items():
        base, wide = (torch.cat(found[name]).double() for found in drawn.values())
        if rule.role == "hidden":
            assert rule.init_scale == 0.5
        small, large = (float((x - x.mean()).square().mean().sqrt()) for x in (base, wide))
        if max(small, large) < 1e-9:
            assert torch.allclose(base.mean(), wide.mean()), name
            continue
        if name.endswith(("A_log", "dt_bias")) or "head.project.bias" in name:
            continue  # two or four heads; an ordinal target's cut points
        error = 5 * (1 / (2 * base.numel()) + 1 / (2 * wide.numel())) ** 0.5
        assert abs(large / (small * rule.init_scale) - 1) < error, (name, rule.role, small, large)


@pytest.mark.parametrize("backbone", BOTH)
def test_biases_start_as_the_mup_package_rescales_them(backbone: str) -> None:
    sizes = {n: recipe(backbone, "simmim_mlp", n) for n in (1, 2, 4)}
    ours = dict(build(sizes[4]).named_parameters())
    torch.manual_seed(0)
    target = skeleton(sizes[4], sizes[4].backbone, TASKS)
    base, delta = (skeleton(sizes[n], sizes[n].backbone, TASKS) for n in (1, 2))
    mup.set_base_shapes(target, base, delta=delta, do_assert=False)
    checked = 0
    for name, expected in target.named_parameters():
        if name.endswith("project.weight") and "decoder" in name:
            continue  # a MuReadout would be rescaled too: not one here
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=0)
        checked += name.endswith("bias")
    assert checked >= 5


def test_outputs_start_at_zero_if_asked_and_nothing_else_changes() -> None:
    for part, name in (
        ("simmim_linear", "objective.decoder.project.weight"),
        ("linear", "head.project.weight"),
    ):
        kept = build(recipe("swin4d", part, 4)).state_dict()
        zero = build(recipe("swin4d", part, 4, readout_zero_init=True)).state_dict()
        assert not zero[name].any() and kept[name].any()
        assert all(torch.equal(kept[k], zero[k]) for k in kept if k != name)


@pytest.mark.parametrize("backbone", ["swin4d", "swin_factorized"])
def test_queries_start_at_zero_if_asked_and_nothing_else_changes(backbone: str) -> None:
    plain = build(recipe(backbone, "simmim_mlp"))
    zero = build(recipe(backbone, "simmim_mlp", query_zero_init=True))
    changed = 0
    for (name, a), b in zip(plain.named_parameters(), zero.parameters(), strict=True):
        if ".qkv." in name:
            third = len(b) // 3
            assert not b[:third].any() and torch.equal(a[third:], b[third:]), name
            changed += 1
        else:
            assert torch.equal(a, b), name
    assert changed >= 4
    with pytest.raises(RecipeError, match="query_zero_init=true is for models with attention"):
        build(recipe("neuromamba", "simmim_mlp", query_zero_init=True))


def test_stratified_heads_lie_at_even_quantiles_whatever_the_width_and_seed() -> None:
    for times in (1, 8):
        found = [
            build(recipe("neuromamba", "none", times, ssm_init="stratified"), s) for s in (0, 1)
        ]
        left, right = (f.state_dict() for f in found)
        name = "blocks.0.mixer.{}"
        for key in ("dt_bias", "A_log"):
            assert torch.equal(left[name.format(key)], right[name.format(key)])
        heads = 4 * times
        dt = torch.nn.functional.softplus(left[name.format("dt_bias")].double())
        quantile = (dt.log() - torch.tensor(1e-3).log()) / torch.tensor(100.0).log()
        even = (torch.arange(heads) + 0.5) / heads
        torch.testing.assert_close(quantile, even.double(), rtol=0, atol=1e-5)
        rate = (left[name.format("A_log")].double().exp() - 1) / 15
        gap = (rate.sort().values - even).abs().max()
        assert gap < 2 / heads, "spread over their whole range"
        if heads > 8:
            assert abs(float(torch.corrcoef(torch.stack([quantile, rate]))[0, 1])) < 0.2
    assert not torch.equal(
        left["blocks.0.mixer.conv1d.weight"], right["blocks.0.mixer.conv1d.weight"]
    )
    with pytest.raises(RecipeError, match="ssm_init=stratified is for models with Mamba mixers"):
        build(recipe("swin4d", "none", ssm_init="stratified"))


# --- multipliers --------------------------------------------------------------------------------


def multipliers(built: nn.Module) -> dict[str, float]:
    """But those of residual branches."""
    return {
        n: m.multiplier
        for n, m in built.named_modules()
        if hasattr(m, "multiplies") and m.multiplies != "branch"
    }


def test_multipliers_go_where_they_belong() -> None:
    given = {"output_mult": 3.0, "input_mult": 5.0, "attn_mult": 7.0}
    found = multipliers(build(recipe("swin4d", "simmim_mlp", 4, **given)))
    assert found.pop("objective.decoder.space_project") == 3 / 4
    assert found.pop("backbone.patch_embed") == 5
    assert len(found) == 3 and set(found.values()) == {7.0}
    complex_head = multipliers(build(recipe("swin4d", "complex", 4, **given)))
    assert {v for n, v in complex_head.items() if n.startswith("head.")} == {1.0}
    mamba = multipliers(build(recipe("neuromamba", "simmim_linear", 2, output_mult=3.0)))
    assert mamba == {"backbone.embed": 1.0, "objective.decoder.project": 1.5}
    with pytest.raises(RecipeError, match="attn_mult=7 has nothing to act on here"):
        build(recipe("neuromamba", "none", attn_mult=7.0))


@pytest.mark.parametrize(
    ("backbone", "key", "weight"),
    [
        ("swin4d", "input_mult", "backbone.patch_embed.fc.weight"),
        ("neuromamba", "input_mult", "backbone.embed.weight"),
        ("swin4d", "output_mult", "objective.decoder.space_project.weight"),
        ("neuromamba", "output_mult", "objective.decoder.space_project.weight"),
        ("swin_factorized", "output_mult", "objective.decoder.space_project.weight"),
    ],
)
def test_a_multiplier_acts_as_a_larger_weight(backbone: str, key: str, weight: str) -> None:
    """By a power of two, so rounding is the same (of means: 1e-6)."""
    plain = build(recipe(backbone, "simmim_mlp", 2))
    scaled = build(recipe(backbone, "simmim_mlp", 2, **{key: 4.0}))
    with torch.no_grad():
        plain.get_parameter(weight).mul_(4)
    assert float(plain(batch())[0].detach()) == pytest.approx(
        float(scaled(batch())[0].detach()), rel=1e-6
    )


def test_the_attention_multiplier_acts_on_the_logits() -> None:
    plain = build(recipe("swin4d", "none", 2))
    scaled = build(recipe("swin4d", "none", 2, attn_mult=4.0))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".qkv." in name:
                parameter[: len(parameter) // 3] *= 4  # the queries
    bold = batch().bold
    torch.testing.assert_close(plain(bold).values, scaled(bold).values)


@pytest.mark.parametrize("part", ["linear", "lora", "prompt"])
def test_a_heads_readout_is_divided_by_m(part: str) -> None:
    built = cast(DownstreamModel, build(recipe("swin4d", part, 4)))
    before = built.eval().outputs(batch())
    built.head.project.multiplier = 1.0  # type: ignore[union-attr]
    after = built.outputs(batch())
    values = before[:, :4], after[:, :4]  # classes and a value; cut points have their own form
    offset = built.head.project.bias[:4]  # type: ignore[union-attr,index]
    torch.testing.assert_close((values[0] - offset) * 4, values[1] - offset, rtol=1e-4, atol=1e-6)


SURVIVES: dict[str, Callable[[nn.Module], nn.Module]] = {}


def survives(change: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    SURVIVES[change.__name__] = change
    return change


@survives
def deepcopied(built: nn.Module) -> nn.Module:
    return copy.deepcopy(built)


@survives
def pickled(built: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(built, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@survives
def assigned(built: nn.Module) -> nn.Module:
    state = {k: v.clone() for k, v in built.state_dict().items()}
    built.load_state_dict(state, assign=True)
    return built


@survives
def emptied(built: nn.Module) -> nn.Module:
    state = built.state_dict()
    built.to(device="meta").to_empty(device="cpu").load_state_dict(state)
    return built


@pytest.mark.parametrize("change", SURVIVES)
@pytest.mark.parametrize("backbone", ["swin4d", "neuromamba"])
@torch.no_grad()
def test_the_multipliers_survive(backbone: str, change: str) -> None:
    built = build(recipe(backbone, "simmim_mlp", 4, input_mult=2.0, output_mult=2.0))
    expected = float(built(batch())[0].detach())
    given, groups = (
        built.parametrization,
        cast(Parametrization, built.parametrization).groups(built),
    )
    changed = SURVIVES[change](built)
    assert float(changed(batch())[0].detach()) == expected
    assert changed.parametrization == given
    assert cast(Parametrization, changed.parametrization).groups(changed) == groups


def test_a_readout_is_exported_and_compiled_with_its_multiplier() -> None:
    torch.manual_seed(0)
    layer = Readout(6, 2)
    x = torch.randn(3, 6)
    plain = layer(x)
    assert torch.equal(plain, nn.functional.linear(x, layer.weight, layer.bias))
    layer.multiplier = 0.5
    expected = layer(x)
    assert torch.equal(expected, nn.functional.linear(x * 0.5, layer.weight, layer.bias))
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
    last = TaskLinear(6, TASKS)
    last.multiplier = 0.5
    for module in (layer, last):
        for backend in ("eager", "aot_eager"):
            done: Any = torch.compile(module, backend=backend, fullgraph=True)
            assert torch.equal(done(x), module(x))
    called = torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))
    assert torch.equal(called, expected) and "multiplier=0.5" in repr(layer)


# --- the front door -----------------------------------------------------------------------------


def test_a_head_on_a_trained_encoder_scales_the_head_alone() -> None:
    made = recipe("swin4d", "lora", 4)
    torch.manual_seed(0)
    encoder = zoo.build_encoder(made)
    assert encoder.parametrization is not None
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    built = zoo.build_downstream(encoder, made, TASKS)
    after = {k.replace(".base_layer.", "."): v for k, v in encoder.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)
    whole = build(made).state_dict()
    assert all(torch.equal(v, whole[k]) for k, v in built.state_dict().items())


def test_a_new_head_at_constant_width_starts_as_at_base_width() -> None:
    """The complex head's entries: its bias has the spread of base width."""
    wide = cast(DownstreamModel, build(recipe("swin4d", "complex", 16)))
    bound = float(wide.head.get_parameter("inputs.0.bias").abs().max().detach())
    assert 0.5 * 12**-0.5 < bound <= 12**-0.5


def test_a_model_without_muP_has_no_parametrization() -> None:
    plain = build(recipe("swin4d", "simmim_linear", 2, name="sp"))
    assert isinstance(plain, PretrainingModel) and plain.parametrization is None
    assert set(multipliers(plain).values()) == {1.0}
    with torch.device("meta"):
        assert zoo.build_model(recipe("neuromamba", "linear", 4), TASKS).parametrization is not None


def test_dims_draw_no_random_numbers() -> None:
    made = recipe("neuromamba", "prompt", 2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    infer(*(lambda: skeleton(made, made.backbone, TASKS) for _ in range(3)))
    assert torch.equal(torch.get_rng_state(), state)
