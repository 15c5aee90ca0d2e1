"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """``linear2(GELU(linear1(x)))`` with the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` → same shape."""
        x = F.gelu(self.linear1(x))
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        x = self.linear2(x)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
