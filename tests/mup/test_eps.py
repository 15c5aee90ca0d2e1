"""Adam's ε goes with the gradient: measured sizes of gradients over widths, and steps under an ε
as large as they are."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from mup_tiny import TASKS, model, recipe
from torch import nn

from fmrizoo.analysis.mup_check import slope
from fmrizoo.analysis.mup_recipe import made_up_batch
from fmrizoo.config import TrainConfig
from fmrizoo.model import DownstreamModel
from fmrizoo.mup import Parametrization
from fmrizoo.mup.parametrization import make
from fmrizoo.trainer.engine import param_groups
from fmrizoo.types import Batch, Grid

TIMES = (2, 4, 8, 16)  # base widths; the narrowest models have a few heads only
# The powers that occur are ½ apart: half of that decides between them.
TOLERANCE = 0.25
slow = partial(pytest.param, marks=pytest.mark.slow)
# (backbone, part, seeds, widths). A small readout sees few numbers, few heads of Mamba make most
# of its gradients of dt and A: more seeds, wider encoders.
CASES = [
    ("swin4d", "simmim_mlp", 2, TIMES),
    ("swin_factorized", "simmim_linear", 2, TIMES),
    ("neuromamba", "simmim_mlp", 6, (2, 4, 8, 16, 32)),
    slow("neuromamba", "autoregressive_linear", 6, (2, 4, 8, 16, 32)),
    ("swin4d", "lora", 2, TIMES),
    slow("neuromamba", "lora", 6, TIMES),
    ("swin4d", "prompt", 2, TIMES),
    ("swin4d", "complex", 6, (4, 8, 16, 32)),
]


def built(backbone: str, part: str, times: int, seed: int) -> nn.Module:
    """With a readout that is not 0, or nothing below it has a gradient."""
    more = {"ssm_init": "stratified"} if backbone == "neuromamba" else {}
    torch.manual_seed(seed)
    return model(recipe(backbone, part, times, **more))


def batch_of(trained: nn.Module) -> Batch:
    batch = made_up_batch(Grid(8, 8, 4, 4))
    if isinstance(trained, DownstreamModel):
        return replace(batch, target=torch.tensor([[0.0, 30.0, 1.0], [2.0, 50.0, 2.0]]))
    return batch


def backward(trained: nn.Module) -> None:
    trained.zero_grad()
    torch.manual_seed(1)
    trained(batch_of(trained))[0].backward()


def gradients(trained: nn.Module) -> dict[str, float]:
    """Mean |gradient| of every parameter; of LoRA's A after a small step of B, at first 0."""
    backward(trained)
    if any(".lora_B." in name for name, _ in trained.named_parameters()):
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if ".lora_B." in name:
                    parameter.sub_(1e-4 * cast(torch.Tensor, parameter.grad).sign())
        backward(trained)
    return {
        name: float(parameter.grad.abs().mean())
        for name, parameter in trained.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(("backbone", "part", "seeds", "widths"), CASES)
def test_gradients_shrink_with_the_width_as_epsilon_does(
    backbone: str, part: str, seeds: int, widths: tuple[int, ...]
) -> None:
    """Log-log slope of mean |gradient| for every kind of parameter, within ¼ of its ε's."""
    sizes: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for times in widths:
        for seed in range(seeds):
            for name, size in gradients(built(backbone, part, times, seed)).items():
                sizes[name][times].append(size)
    table = make(recipe(backbone, part, widths[-1]), TASKS)[0].table
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for name, by_width in sizes.items():
        if not all(size > 0 for line in by_width.values() for size in line):
            continue  # the complex head's mixer starts as nothing
        means = [math.exp(sum(map(math.log, by_width[w])) / seeds) for w in widths]
        power = math.log(table[name].eps_scale) / math.log(widths[-1])
        found[re.sub(r"\d+", "#", name), power].append(slope(widths, means))
    for (kind, power), slopes in found.items():
        assert sum(slopes) / len(slopes) == pytest.approx(power, abs=TOLERANCE), kind
    powers = {round(power, 6) for _, power in found}
    expected = {"complex": {0, -0.5}}.get(part, {0, -1})
    assert powers == expected, "every case is there to tell powers apart"


def first_steps(trained: nn.Module, eps: float, scales: Mapping[str, float]) -> dict[str, float]:
    """Mean |first AdamW step| ÷ its rate, in the trainer's groups, ε × ``scales`` by name."""
    train = TrainConfig(lr=1e-4, weight_decay=0.0, eps=eps)
    named = {id(p): n for n, p in trained.named_parameters()}
    groups: list[dict[str, Any]] = [
        {**group, "params": [p], "eps": eps * scales[named[id(p)]]}
        for group in param_groups(trained, train)
        for p in group["params"]
    ]
    before = {n: p.detach().clone() for n, p in trained.named_parameters()}
    optimizer = torch.optim.AdamW(groups)
    backward(trained)
    optimizer.step()
    return {
        name: float((parameter.detach() - before[name]).abs().mean()) / group["lr"]
        for group in groups
        for parameter in group["params"]
        for name in (named[id(parameter)],)
    }


@pytest.mark.parametrize("backbone", ["swin4d", "swin_factorized", "neuromamba"])
def test_under_a_large_epsilon_first_steps_are_equal_at_all_widths(backbone: str) -> None:
    """ε: the gradients' typical size at base width. An eighth of the gradient would be a quarter
    of the step; a rule that scales ε with the rate loses most steps of all but hidden weights."""
    part, low, high = "simmim_linear", 2, 16
    sizes = gradients(built(backbone, part, low, 0))
    eps = low * math.exp(sum(math.log(s) for s in sizes.values() if s > 0) / len(sizes))
    steps: dict[str, list[dict[str, float]]] = {"ours": [], "as the rate": []}
    for times in (low, high):
        table = cast(Parametrization, built(backbone, part, times, 0).parametrization).table
        scales = {
            "ours": {name: rule.eps_scale for name, rule in table.items()},
            "as the rate": {name: rule.lr_scale for name, rule in table.items()},
        }
        for rule, chosen in scales.items():
            steps[rule].append(first_steps(built(backbone, part, times, 0), eps, chosen))
    off = {
        rule: [n for n in base if base[n] and not 2 / 3 < wide[n] / base[n] < 3 / 2]
        for rule, (base, wide) in steps.items()
    }
    assert 0.05 < sorted(steps["ours"][0].values())[len(sizes) // 2] < 0.9, "ε matters"
    assert len(off["ours"]) <= 0.1 * len(sizes), off["ours"]
    assert len(off["as the rate"]) > 0.5 * len(sizes)


@pytest.mark.parametrize("backbone", ["swin4d", "neuromamba"])
def test_the_trainers_groups_have_the_tables_epsilon(backbone: str) -> None:
    for part in ("simmim_mlp", "linear", "lora", "prompt", "complex"):
        trained = built(backbone, part, 4, 0)
        groups = param_groups(trained, TrainConfig(eps=1e-8))
        assert len(groups) <= 6
        table = cast(Parametrization, trained.parametrization).table
        named = {id(p): n for n, p in trained.named_parameters()}
        for group in groups:
            for parameter in group["params"]:
                assert group["eps"] == 1e-8 * table[named[id(parameter)]].eps_scale
