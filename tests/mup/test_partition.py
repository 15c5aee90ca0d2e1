"""muP models built inside ``deepspeed.zero.Init()``, where every parameter has the shape (0,)."""

from __future__ import annotations

import subprocess
import sys
from typing import cast

import pytest
import torch
from mup_tiny import model, recipe
from torch import nn

from fmrizoo.mup import Parametrization
from fmrizoo.mup.partition import gathered, whole_modules
from fmrizoo.trainer.device import World, init_distributed, load_deepspeed

CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}  # fp32
CPU = torch.device("cpu")


def pair(backbone: str, part: str, **more: object) -> tuple[nn.Module, nn.Module]:
    """At 4 times the base width, heads of another size: plainly built, and partitioned."""
    if backbone != "neuromamba":
        more["base"] = {"embed_dim": 12, "num_heads": [1, 4]}
    made = recipe(backbone, part, 4, output_mult=3.0, **more)
    init_distributed(World(), CPU)
    zero = load_deepspeed(CPU).zero
    torch.manual_seed(0)
    plain = model(made)
    torch.manual_seed(0)
    with zero.Init(config_dict_or_path=CONFIG):
        built = model(made)
        assert nn.Linear(2, 2).weight.shape == (0,), "the context goes on after the skeletons"
    return plain, built


CASES = [
    ("neuromamba", "simmim_linear", {"ssm_init": "stratified", "readout_zero_init": True}),
    ("swin_factorized", "simmim_linear", {}),
    ("swin_factorized", "linear", {}),
]


@pytest.mark.parametrize(("backbone", "part", "more"), CASES)
def test_all_comes_out_as_without(backbone: str, part: str, more: dict[str, object]) -> None:
    """Starts to the bit (1e-5 where zero.Init makes fp32 of what is placed in fp64)."""
    plain, built = pair(backbone, part, **more)
    assert {p.shape for p in built.parameters()} == {(0,)}
    ours, theirs = (cast(Parametrization, m.parametrization) for m in (built, plain))
    assert ours == theirs and ours.groups(built) == theirs.groups(plain)
    found = [
        {n: m.multiplier for n, m in one.named_modules() if hasattr(m, "multiplies")}
        for one in (built, plain)
    ]
    assert found[0] == found[1] and set(found[0].values()) != {1.0}
    parameters = dict(built.named_parameters())
    tolerance = 1e-5 if "ssm_init" in more else 0
    for name, expected in plain.named_parameters():
        with gathered([parameters[name]]):
            torch.testing.assert_close(
                parameters[name].detach(), expected.detach(), rtol=tolerance, atol=0, msg=name
            )
    assert {p.shape for p in built.parameters()} == {(0,)}


def test_without_deepspeed_nothing_is_imported() -> None:
    code = (
        "import sys, torch; from fmrizoo.mup.partition import gathered, whole_modules\n"
        "with whole_modules(), gathered([torch.nn.Parameter(torch.ones(2))]): pass\n"
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_outside_the_context_nothing_happens() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with whole_modules(), gathered([parameter]), torch.no_grad():
        parameter.mul_(2)
        assert nn.Linear(2, 2).weight.shape == (2, 2)
    assert torch.equal(parameter, torch.full((2,), 2.0))
