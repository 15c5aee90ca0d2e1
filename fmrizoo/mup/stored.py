"""``parametrization.json`` beside weights: the rules that they were trained by, compared at use.

A muP model whose multipliers or rates are lost on the way (at a resume, in fine-tuning) computes
other numbers without any error; so the file travels with every checkpoint and exported model.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from fmrizoo.errors import CheckpointError
from fmrizoo.files import write_json
from fmrizoo.mup.parametrization import FILE, Parametrization

WAY_OUT = ", or make them plain weights with `fmrizoo mup fold`"


def write_parametrization(folder: Path, model: nn.Module) -> None:
    """Write the file, if ``model`` has a muP table."""
    own: Parametrization | None = getattr(model, "parametrization", None)
    if own is not None:
        write_json(folder / FILE, own.to_dict())


def read_parametrization(folder: Path) -> Parametrization | None:
    """What the weights in ``folder`` were trained by; None: PyTorch's own.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    try:
        return Parametrization.from_dict(values)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def check_parametrization(folder: Path, model: nn.Module) -> None:
    """Refuse weights that were trained by other rules than ``model`` is built by.

    Raises:
        CheckpointError: says what differs.
    """
    stored = read_parametrization(folder)
    own: Parametrization | None = getattr(model, "parametrization", None)
    if (stored is None) != (own is None):
        had, has = ("mup", "sp") if stored is not None else ("sp", "mup")
        way = WAY_OUT if stored is not None else ""
        raise CheckpointError(
            f"the weights in {folder} were trained with parametrization.name={had}, this model is "
            f"built with {has}: use the recipe that they were trained with{way}"
        )
    if stored is not None and own is not None and (said := stored.differences(own)):
        raise CheckpointError(
            f"the weights in {folder} have another muP parametrization than this model: "
            f"{'; '.join(said)}; use the recipe that they were trained with{WAY_OUT}"
        )


def check_encoder(folder: Path, backbone: nn.Module) -> None:
    """Refuse an encoder whose forward multipliers are not those of ``backbone``.

    Raises:
        CheckpointError: says what differs.
    """
    stored = read_parametrization(folder)
    own: Parametrization | None = getattr(backbone, "parametrization", None)
    if stored is None and own is None:
        return
    facts = [None if p is None else _forward(p) for p in (stored, own)]
    if facts[0] != facts[1]:
        had, has = ("sp" if f is None else f"mup ({f})" for f in facts)
        way = WAY_OUT if stored is not None else ""
        raise CheckpointError(
            f"the encoder in {folder} was trained with parametrization {had}, this one is built "
            f"with {has}: give the recipe the parametrization that it was trained with{way}"
        )


def _forward(made: Parametrization) -> str:
    """What the outputs of an encoder depend on."""
    said = f"m {made.m:g}, base {dict(made.base)}, {made.multipliers}"
    factors = dict.fromkeys(made.attention.values())
    return said + (f", attention × {', '.join(map(repr, factors))}" if factors else "")
