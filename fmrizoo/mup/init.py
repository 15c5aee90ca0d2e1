"""From the start that modules draw for themselves to the one that muP asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from fmrizoo.errors import RecipeError
from fmrizoo.mup.dims import Shapes
from fmrizoo.mup.partition import gathered
from fmrizoo.mup.rules import Rule

SSM_INIT = ("random", "stratified")


def init_factor(found_spread: float, rule: Rule) -> float:
    """What a fresh parameter is multiplied by: the spread it should have ÷ the one it was drawn
    with (both relative to base width). Exactly 1 where they are equal but for rounding."""
    factor = rule.init_scale / found_spread
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-12) else factor


@torch.no_grad()
def initialise(
    model: nn.Module,
    dims: Shapes,
    table: Mapping[str, Rule],
    *,
    readout_zero_init: bool = True,
    query_zero_init: bool = False,
    ssm_init: str = "random",
    only: Callable[[str], bool] = lambda name: True,
) -> None:
    """Scale freshly drawn parameters in place; nothing is drawn, so the order does not matter.

    Every parameter keeps the distribution of its own module, with this standard deviation (σ: its
    own at base width, m: width / base width)::

        parameter                     drawn by its module with   should have    × factor
        Linear, hidden                ∝ (m · in)^-½              σ · m^-½       1
        Linear, output                ∝ (m · in)^-½              σ, or 0        m^½, or 0
        bias of a Linear, in grows    ∝ (m · in)^-½              σ              m^½
        TaskLinear, output            0.01                       σ, or 0        1, or 0
        patch embedding, positions    ∝ in^-½ (in is fixed)      σ              1
        tables, mask token            0.02                       σ              1
        prompts                       ∝ (voxels + width)^-½      σ              its inverse
        conv1d and its bias           ∝ taps^-½                  σ              1
        gains, D                      1                          1              1
        dt_bias, A_log                random over the heads      the same       1, or placed evenly
        LoRA's A                      ∝ (m · in)^-½              σ · m^-½       1
        LoRA's B                      0                          0              1

    At base width all factors are 1: with ``readout_zero_init=False`` and ``ssm_init="random"`` not
    a bit changes.

    Args:
        model: Fresh from its constructor: a second call would scale again. On the meta device
            nothing is done.
        dims: Of its parameters.
        table: Rules of the same.
        readout_zero_init: Outputs start with zero weights (their biases are kept).
        query_zero_init: Queries start at zero, and with them all logits. Fresh queries and keys
            have nothing in common: under muP's 1/d the logits of heads that grow in size would
            start at d^-½ of a narrow model's, and end as large.
        ssm_init: ``stratified``: step sizes and decay rates of Mamba's heads lie at even quantiles
            of their distributions. Drawn for few heads, they differ from width to width by chance.
        only: Which parameters, by name.

    Raises:
        RecipeError: ``stratified`` for a model without Mamba mixers, zero queries for one without
            attention.
    """
    for name, parameter in model.named_parameters():
        if not only(name) or parameter.is_meta:
            continue
        factor = init_factor(dims[name].spread, table[name])
        if table[name].role == "output" and readout_zero_init:
            factor = 0.0
        if factor != 1.0:
            with gathered([parameter]):
                parameter.mul_(factor) if factor else parameter.zero_()
    if ssm_init == "stratified" and not _place(model, "init_stratified", "A_log", only):
        raise RecipeError(
            "parametrization.ssm_init=stratified is for models with Mamba mixers: take random"
        )
    if query_zero_init and not _place(model, "init_zero_queries", "qkv.weight", only):
        raise RecipeError(
            "parametrization.query_zero_init=true is for models with attention: leave it out"
        )


def _place(model: nn.Module, method: str, parameter: str, only: Callable[[str], bool]) -> bool:
    """Call ``method`` of the modules that have it and whose ``parameter`` is fresh; has any it?"""
    found = False
    for name, module in model.named_modules():
        if callable(place := getattr(module, method, None)):
            found = True
            if only(f"{name}.{parameter}"):
                with gathered(module.parameters()):
                    place()
    return found
