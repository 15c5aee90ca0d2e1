"""A small residual network whose muP is written out by hand, to test the checks without recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

BASE = 16
LR = 2e-2
INPUTS, OUTPUTS = 12, 6


class Small(nn.Module):
    """Input → hidden (residual) → readout, with a token that is added to every row."""

    def __init__(self, width: int, divide: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(INPUTS, width)
        self.token = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU())
        self.back = nn.Linear(2 * width, width)
        self.leave = nn.Linear(width, OUTPUTS)
        self.multiplier = BASE / width if divide else 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) + self.token
        x = x + self.back(self.hidden(self.norm(x)))
        out: Tensor = self.leave(x * self.multiplier)
        return out


@dataclass(frozen=True)
class Rules:
    """What of muP is done: ``rates`` by parameter are exponents of ``1/m``."""

    init: bool = True
    divide: bool = True
    zero: bool = True
    rates: Mapping[str, float] = field(
        default_factory=lambda: {"hidden.0.weight": 1.0, "back.weight": 1.0}
    )


SP = Rules(init=False, divide=False, zero=False, rates={})


def make(
    width: int, seed: int, rules: Rules, lr: float = LR
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model at ``width``; the rates are in its optimizer's groups."""
    torch.manual_seed(seed)
    model, m = Small(width, rules.divide), width / BASE
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0 if name == "norm.weight" else 0.0)
                continue
            inputs = p.shape[1]
            hidden = name not in ("enter.weight", "leave.weight")
            # SP draws the readout and the hidden weights at one width-free s.d., as many codes do.
            scaled = rules.init if hidden else name == "enter.weight"
            p.normal_(std=(inputs if scaled else inputs / m) ** -0.5)
        if rules.zero:
            model.leave.weight.zero_()
        model.token.normal_(std=0.02)
    groups = [
        {"params": [p], "lr": lr * m ** -rules.rates.get(name, 0.0), "name": name}
        for name, p in model.named_parameters()
    ]
    return model, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Rate of every parameter by name."""
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def loss(model: nn.Module) -> Tensor:
    """L1 on one fixed batch that can be learned."""
    drawn = torch.Generator().manual_seed(5)
    x = torch.randn(64, INPUTS, generator=drawn)
    y = torch.tanh(x @ torch.randn(INPUTS, OUTPUTS, generator=drawn))
    out: Tensor = (model(x) - y).abs().mean()
    return out
