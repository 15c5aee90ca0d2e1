"""1, 2 and 4 ranks: every ZeRO stage trains as one process does, muP's groups included; bytes."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from stages_tiny import CPU, MODELS, Bytes, Layers, config, stepped
from torch import nn
from trainer_tiny import Reference, on_ranks, reference

from fmrizoo.errors import RecipeError
from fmrizoo.sections.train import TrainConfig
from fmrizoo.trainer import zero
from fmrizoo.trainer.construction import construction
from fmrizoo.trainer.device import World, init_distributed
from fmrizoo.trainer.engine import Engine, groups_sentence, param_groups

STAGES = (0, 1, 2, 3)
OFFLOADED = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
TWO = [(model, stage, "none") for model in MODELS for stage in STAGES]
TWO += [("tiny", stage, offload) for stage, offload in OFFLOADED]
FOUR = [("tiny", 3, "none")]  # in the fast tests; all others are slow
ALL = TWO + [(model, *way) for model in ("swin4d", "neuromamba") for way in OFFLOADED]

ALONE = World()
Told = dict[tuple[str, int, str], dict[str, Any]]


def trained(world: World, cases: list[tuple[str, int, str]]) -> Told:
    return {
        (model, stage, offload): stepped(world, model, config(zero_stage=stage, offload=offload))
        for model, stage, offload in cases
    }


@cache
def expected(model: str, ranks: int) -> Reference:
    """Of plain PyTorch in this process, with the micro-batches that the ranks take."""
    make, given = MODELS[model]
    return reference(config(), ranks=ranks, make=make, given=given)


def check(told: list[Told], case: tuple[str, int, str]) -> None:
    """Against plain PyTorch: the stage and the offload change no number."""
    model = case[0]
    train, want = config(), expected(model, len(told))
    groups = param_groups(MODELS[model][0](), train)
    assert len({group["lr"] for group in groups}) > 1, "rates differ, or this proves nothing"
    assert min(want.norms) < train.clip_norm < max(want.norms) or model != "tiny"
    for rank in told:
        assert rank[case]["losses"] == pytest.approx(want.losses, abs=1e-6)
        assert rank[case]["norms"] == pytest.approx(want.norms, abs=3e-6)
        assert rank[case]["groups"] == groups_sentence(groups, train)
    weights = told[0][case]["weights"]
    assert set(weights) == set(want.weights)
    for name, value in want.weights.items():
        # A bias of keys has no effect: its gradient is rounding, of which Adam makes whole steps.
        limit = train.lr * train.steps if name.endswith("qkv.bias") else 1e-5
        torch.testing.assert_close(weights[name], value, atol=limit, rtol=0, msg=name)


@pytest.mark.parametrize("case", TWO)
def test_one_rank(case: tuple[str, int, str]) -> None:
    check([trained(ALONE, [case])], case)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    return on_ranks(tmp_path_factory.mktemp("two"), trained, TWO)


@pytest.mark.parametrize("case", TWO)
def test_two_ranks(two: list[Told], case: tuple[str, int, str]) -> None:
    check(two, case)


def test_four_ranks(tmp_path: Path) -> None:
    told = on_ranks(tmp_path, trained, FOUR, size=4)
    for case in FOUR:
        check(told, case)


@pytest.mark.slow
def test_four_ranks_all_stages(tmp_path: Path) -> None:
    told = on_ranks(tmp_path, trained, ALL, size=4)
    for case in ALL:
        check(told, case)


# -- one copy of a model ---------------------------------------------------------------------------


def counted(world: World) -> dict[tuple[str, int], tuple[float, ...]]:
    """Bytes per parameter: while building, and above that while the engine is made."""
    init_distributed(world, CPU)
    zero.BUCKET = 4096  # else a bucket is as large as this model
    told = {}
    for precision in ("fp32", "bf16"):
        for stage in STAGES:
            with Bytes() as building, construction(world):
                model = Layers()
            size = sum(p.numel() for p in model.parameters())
            train = config(zero_stage=stage, precision=precision)
            with Bytes() as placing:
                made = Engine(model, train, world, CPU)
            told[precision, stage] = (building.peak / size, placing.peak / size)
            made.close()
    return told


@pytest.fixture(scope="module")
def bytes_held(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(tmp_path_factory.mktemp("bytes"), counted)


ONE = 4 / 16  # a parameter in fp32, in bytes per parameter of the model


def test_only_rank_0_builds_the_model(bytes_held: list[Any]) -> None:
    for (first, _), (second, _) in zip(*(told.values() for told in bytes_held), strict=True):
        assert first == pytest.approx(4, abs=0.01) and second == pytest.approx(ONE, abs=0.01)


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_at_stage_3_the_other_ranks_never_hold_a_whole_model(
    bytes_held: list[Any], precision: str, width: int
) -> None:
    """Half of the weights, of fp32 gradients and of master weights; one weight and its share.

    Partitions are copied into one buffer when all are there: half of the weights once more, while
    neither of the other two exists.
    """
    _, peak = bytes_held[1][precision, 3]
    assert width / 2 < peak < (width + 4 + 4) / 2 + 2 * ONE + 0.1


def test_at_stage_3_rank_0_lets_go_as_it_goes(bytes_held: list[Any]) -> None:
    """Above its own model: as the others', less what it gives away on the way."""
    _, peak = bytes_held[0]["fp32", 3]
    assert peak < bytes_held[1]["fp32", 3][1]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_bf16_rank_never_holds_the_fp32_model(bytes_held: list[Any], stage: int) -> None:
    """bf16 weights (twice while DeepSpeed lines them up), half of the master weights and sums."""
    _, peak = bytes_held[1]["bf16", stage]
    sums = 4 if stage < 2 else 2  # stage 1 (and 0, which runs as 1) adds up whole gradients
    assert peak <= max(2 + 2 + 2, 2 + 2 + sums) + ONE


# -- the same values ---------------------------------------------------------------------------


class Marked(nn.Module):
    """A tied weight, a mark, a frozen weight, a real buffer, values drawn by the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.table = nn.Parameter(torch.zeros(2, 3))
        self.table._no_weight_decay = True  # type: ignore[attr-defined]
        self.a.bias.requires_grad_(False)
        self.register_buffer("steps", torch.arange(4))
        self.blocks = nn.ParameterList([nn.Parameter(torch.randn(2))])
        nn.init.trunc_normal_(self.table)


def test_what_is_withheld_keeps_everything_but_its_values() -> None:
    with construction(World(1, 2, 1, "test")):
        held = Marked()
    torch.manual_seed(0)
    plain = Marked()
    assert all(p.is_meta for p in held.parameters()) and held.b.weight is held.a.weight
    facts = [
        {n: (p.shape, p.dtype, p.requires_grad, p.__dict__) for n, p in m.named_parameters()}
        for m in (held, plain)
    ]
    assert facts[0] == facts[1]
    assert torch.equal(held.steps, torch.arange(4))  # type: ignore[arg-type]
    assert not nn.Linear(2, 2).weight.is_meta, "outside nothing is withheld"


def test_rank_0_is_left_alone() -> None:
    torch.manual_seed(0)
    with construction(World(0, 2, 0, "test")):
        built = Marked()
    torch.manual_seed(0)
    for a, b in zip(built.parameters(), Marked().parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": "optimizer", "zero_stage": 0}, r"needs train\.zero_stage 1, 2 or 3, got 0"),
        ({"offload": "parameters", "zero_stage": 2}, r"needs train\.zero_stage=3, got 2"),
        ({"offload": "disk"}, r"train\.offload"),
        ({"compile": "all"}, r"train\.compile"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainConfig(**changes)


def test_layers_count() -> None:
    sizes = {p.numel() for p in Layers().parameters()}
    assert len(sizes) == 1 and math.isclose(4 / len(list(Layers().parameters())), ONE)
