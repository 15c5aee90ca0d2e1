"""``train.compile``: the numbers of an uncompiled run, the same names, and errors in one sentence.

The fast tests let PyTorch capture and differentiate the graphs but write no C++ of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stages_tiny import CPU, MODELS, config
from torch import Tensor, nn
from torch._dynamo.utils import counters
from trainer_tiny import clips

from fmrizoo.errors import RecipeError, TrainingError
from fmrizoo.trainer import compiling
from fmrizoo.trainer.compiling import blocks_of, set_compile
from fmrizoo.trainer.device import World, init_distributed
from fmrizoo.trainer.engine import Engine, set_checkpointing
from fmrizoo.types import Batch


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.linear(self.norm(x)).tanh()
        return added


class Stack(nn.Module):
    """Three equal blocks."""

    def __init__(self, widths: tuple[int, ...] = (6, 6, 6)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for width in widths)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = batch.bold.new_zeros(())
        for block in self.blocks:
            width = block.linear.in_features  # type: ignore[union-attr]
            loss = loss + block(batch.bold.flatten(1)[:, :width]).square().mean()
        return loss, {}


def stack() -> nn.Module:
    torch.manual_seed(2)
    return Stack()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without code, counts and limits of an earlier test."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    names = ("recompile_limit", "fail_on_recompile_limit_hit")
    before = {name: getattr(torch._dynamo.config, name) for name in names}
    yield
    for name, value in before.items():
        setattr(torch._dynamo.config, name, value)
    torch._dynamo.reset()


def run(model: nn.Module, given: Any = clips, mode: str = "none", **changes: Any) -> Any:
    """Losses of two steps, and the names of the weights."""
    init_distributed(World(), CPU)
    train = config(compile=mode, batch_size=2, accumulate=1, **changes)
    set_checkpointing(model, train.checkpointing)
    engine = Engine(model.train(), train, World(), CPU)
    losses = []
    for step in range(2):
        loss, _ = engine.accumulate(given(2 * step, 2))
        engine.step(1.0)
        losses.append(float(loss))
    names = [name for name, _ in engine.weights()]
    assert names == list(model.state_dict())
    engine.close()
    return losses, names


@pytest.mark.parametrize(
    ("stage", "mode"),
    [
        (1, "model"),
        (3, "blocks"),
        pytest.param(1, "blocks", marks=pytest.mark.slow),
        pytest.param(3, "model", marks=pytest.mark.slow),
    ],
)
def test_equals_eager(mode: str, stage: int) -> None:
    losses, names = run(stack(), zero_stage=stage)
    compiled, same = run(stack(), mode=mode, zero_stage=stage)
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled == pytest.approx(losses, abs=1e-5) and same == names


def test_equal_blocks_are_compiled_once() -> None:
    run(stack(), mode="blocks")
    assert counters["stats"]["unique_graphs"] == 1


def test_parameters_that_the_compiler_would_take_for_empty_are_refused() -> None:
    make, given = MODELS["neuromamba"]
    said = r"cannot be used at ZeRO 3 with \w+, which reads .* train\.zero_stage=2 or"
    with pytest.raises(RecipeError, match=said):
        run(make(), given, mode="blocks", zero_stage=3)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize(
    ("name", "stage"), [*(("swin4d", k) for k in range(4)), *(("neuromamba", k) for k in range(3))]
)
def test_backbones_equal_eager(name: str, stage: int, checkpointing: str) -> None:
    make, given = MODELS[name]
    same = {"zero_stage": stage, "checkpointing": checkpointing}
    losses, names = run(make(), given, **same)
    compiled, found = run(make(), given, mode="blocks", **same)
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled == pytest.approx(losses, abs=1e-5) and found == names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stack", "swin4d"])
def test_code_that_is_really_compiled_equals_eager(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    make, given = {**MODELS, "stack": (stack, clips)}[name]
    losses, _ = run(make(), given)
    assert run(make(), given, mode="blocks")[0] == pytest.approx(losses, abs=1e-5)


def test_blocks_of_the_backbones() -> None:
    assert list(blocks_of(MODELS["swin4d"][0]())) == ["layers.0.blocks.0", "layers.1.blocks.0"]
    assert list(blocks_of(MODELS["neuromamba"][0]())) == ["blocks.0", "blocks.1"]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"Linear has no list of blocks; use train"):
        set_compile(nn.Linear(2, 2), "blocks", CPU)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TrainingError, match=r"needs a C\+\+ compiler, and there is no no-such"):
        run(stack(), mode="blocks")


def test_what_fails_to_compile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(graph: Any, examples: Any) -> Any:
        raise RuntimeError("cannot do this")

    monkeypatch.setattr(compiling, "BACKEND", refuses)
    with pytest.raises(TrainingError, match=r"compile=blocks failed: .*cannot do this.*none"):
        run(stack(), mode="blocks")


def test_too_many_shapes_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch would go on uncompiled."""
    monkeypatch.setattr(compiling, "MOST_SHAPES", 1)
    with pytest.raises(TrainingError, match=r"train\.compile=blocks failed"):
        run(Stack((4, 5, 6, 7)), mode="blocks")
