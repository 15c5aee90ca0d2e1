"""Small models of the zoo with muP on several ranks, and the bytes that a rank holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from trainer_tiny import clips, scaled, train_config

from fmrizoo.config import TrainConfig
from fmrizoo.trainer.construction import construction
from fmrizoo.trainer.device import World, init_distributed
from fmrizoo.trainer.engine import Engine
from fmrizoo.trainer.schedule import factor
from fmrizoo.types import Batch
from fmrizoo.zoo import build_model, load_recipe

CPU = torch.device("cpu")
SIZE = (4, 4, 4, 4)
WIDE = {
    "swin4d": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": [2, 2, 2, 2],
        "patch_size": [2, 2, 2, 2],
    },
    "neuromamba": {
        "embed_dim": 16,
        "depth": 2,
        "d_state": 4,
        "head_dim": 8,
        "patch_size": [2, 2, 2, 2],
    },
}
BASE = {"swin4d": {"embed_dim": 4, "num_heads": [1, 2]}, "neuromamba": {"embed_dim": 8}}


def recordings(first: int, n: int) -> Batch:
    """Clips ``first …`` of an endless list, with the seeds that masks are drawn from."""
    bold = torch.stack(
        [
            torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(i))
            for i in range(first, first + n)
        ]
    )
    mask = torch.ones(n, *SIZE[:3], dtype=torch.bool)
    names = [f"sub-{i:03d}" for i in range(first, first + n)]
    return Batch(bold, mask, torch.full((n,), 2.0), names, names, torch.zeros(n),
                 seed=torch.arange(first, first + n))  # fmt: skip


def backbone_model(name: str) -> nn.Module:
    """At twice the base width; the same weights every time."""
    recipe = load_recipe(
        {
            "backbone": {"name": name, "img_size": list(SIZE), **WIDE[name]},
            "objective": {"name": "simmim"},
            "data": {"clip_frames": SIZE[3]},
            "parametrization": {"name": "mup", "base": BASE[name], "readout_zero_init": False},
        }
    )
    torch.manual_seed(5)
    return build_model(recipe)


def swin4d() -> nn.Module:
    return backbone_model("swin4d")


def neuromamba() -> nn.Module:
    return backbone_model("neuromamba")


# What is trained, on which clips.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Batch]]] = {
    "tiny": (scaled, clips),
    "swin4d": (swin4d, recordings),
    "neuromamba": (neuromamba, recordings),
}


def config(**changes: Any) -> TrainConfig:
    """Three steps of two micro-batches a rank; clipping acts on some."""
    return train_config(**{"steps": 3, "lr": 0.005, "clip_norm": 1.3, **changes})


def stepped(world: World, model: str, train: TrainConfig) -> dict[str, Any]:
    """Losses, norms and groups of a training, and rank 0's weights after it."""
    make, given = MODELS[model]
    init_distributed(world, CPU)
    with construction(world):
        built = make()
    engine = Engine(built.train(), train, world, CPU)
    losses, norms = [], []
    micro = train.batch_size // world.size // train.accumulate
    for step in range(train.steps):
        total = torch.zeros(())
        for part in range(train.accumulate):
            first = ((step * train.accumulate + part) * world.size + world.rank) * micro
            loss, _ = engine.accumulate(given(first, micro).to("cpu", engine.dtype))
            total += loss.float() / train.accumulate / world.size
        if world.size > 1:
            dist.all_reduce(total)
        losses.append(float(total))
        norms.append(engine.step(factor(step, train.steps, train.warmup, train.min_lr_ratio)))
    weights = {n: v.clone() for n, v in engine.weights() if world.main}
    told = {"losses": losses, "norms": norms, "weights": weights, "groups": engine.groups}
    engine.close()
    return told


class Bytes:
    """Bytes that PyTorch allocates inside: ``peak`` above the start, and ``end``.

    Counted by PyTorch's own allocator, so that the number is the same every time.
    """

    def __enter__(self) -> Bytes:
        activity = torch.profiler.ProfilerActivity.CPU
        self._profile = torch.profiler.profile(activities=[activity], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *failed: Any) -> None:
        self._profile.__exit__(*failed)
        events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        moves = [e for e in events if e.name() == "[memory]"]
        now = self.peak = 0
        for move in sorted(moves, key=lambda e: e.start_ns()):
            now += move.nbytes()
            self.peak = max(self.peak, now)
        self.end = now


class Layers(nn.Module):
    """Equal square layers: one is a sixteenth of the model."""

    def __init__(self, width: int = 192, count: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.bold.flatten()[:1].expand(1, self.layers[0].in_features)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.square().mean(), {}
