"""The optimizer's groups: parameters of one learning rate, one weight decay and one ε each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fmrizoo.config import TrainConfig
from fmrizoo.errors import RecipeError


def param_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups of one learning rate and one weight decay each.

    Matrices decay; vectors, and parameters with a true attribute ``_no_weight_decay`` (the mark
    that mamba-ssm uses), do not. The rate is ``train.lr`` × the factor that ``model.lr_scales()``
    gives by parameter name (1 where it names none, or the model has no such method). Groups come
    in the order of their first parameter. Frozen parameters are in none, so that the optimizer
    holds nothing for them. A model with a muP table (``model.parametrization``) has that table's
    factors on rate, decay and Adam's ε beside them.

    Raises:
        RecipeError: nothing is left to train, or factors that no parameter can have.
    """
    scales = lr_scales(model)
    parametrization = getattr(model, "parametrization", None)
    rules = None if parametrization is None else parametrization.groups(model)
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate, decay, eps = scales.get(name, 1.0), 1.0, 1.0
        decays = parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
        if rules is not None:
            rule = rules[name]
            rate, decay, eps = rate * rule.lr_scale, rule.wd_scale, rule.eps_scale
            decays = rule.decays
        groups.setdefault((rate, decay if decays else 0.0, eps), []).append(parameter)
    if not groups:
        raise RecipeError("every parameter of the model is frozen: there is nothing to train")
    return [
        {
            "params": some,
            "lr": train.lr * rate,
            "weight_decay": train.weight_decay * decay,
            "eps": train.eps * eps,
        }
        for (rate, decay, eps), some in groups.items()
    ]


def groups_sentence(groups: Sequence[dict[str, Any]], train: TrainConfig) -> str:
    """What the optimizer's groups are, for the log."""
    parts = []
    for group in groups:
        size = sum(p.numel() for p in group["params"])
        decay = f"decay {group['weight_decay']:g}" if group["weight_decay"] else "no decay"
        part = f"{size} at rate × {group['lr'] / train.lr:g}, {decay}"
        eps = group["eps"] / train.eps
        parts.append(part if eps == 1 else f"{part}, ε × {eps:g}")
    return f"{len(groups)} groups of parameters: {'; '.join(parts)}"


def lr_scales(model: nn.Module) -> dict[str, float]:
    """Factor on the learning rate by parameter name, of a model that has ``lr_scales()``.

    Raises:
        RecipeError: a name that is no parameter, or a factor that is not above 0.
    """
    ask = getattr(model, "lr_scales", None)
    if not callable(ask):
        return {}
    scales = {str(name): float(scale) for name, scale in ask().items()}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if unknown := sorted(scales.keys() - known):
        raise RecipeError(
            f"learning-rate factors for {', '.join(unknown[:3])}, which "
            f"{type(model).__name__} has no parameter of"
        )
    if bad := {n: s for n, s in scales.items() if not 0 < s < float("inf")}:
        name, scale = next(iter(bad.items()))
        raise RecipeError(
            f"the learning-rate factor of {name} is {scale:g}: it must be above 0 (freeze what "
            f"must not train)"
        )
    return scales
