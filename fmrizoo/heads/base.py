"""What all heads of this package share: losses, predictions, and freezing of the encoder."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, nn

from fmrizoo.errors import RecipeError
from fmrizoo.heads.losses import all_scores, total_loss
from fmrizoo.registry import suggest
from fmrizoo.types import Backbone, Head, TaskSpec


class TaskHead(Head):
    """A head with the losses of :mod:`fmrizoo.heads.losses`. Freezes the encoder by default."""

    def __init__(self, tasks: Sequence[TaskSpec]) -> None:
        super().__init__()
        if not tasks:
            raise RecipeError("a head needs at least one target")
        self.tasks = tuple(tasks)
        self._frozen: set[str] = set()  # what attach froze, and release may train again

    def attach(self, backbone: Backbone) -> None:
        """Freeze the whole encoder."""
        self._freeze(backbone)

    def release(self, backbone: Backbone) -> None:
        """Let train again what :meth:`attach` froze."""
        for name, parameter in backbone.named_parameters():
            if name in self._frozen:
                parameter.requires_grad_(True)
        self._frozen.clear()

    def _freeze(self, backbone: Backbone, keep: Collection[str] = ()) -> None:
        """Freeze every parameter whose name is not in ``keep``."""
        for name, parameter in backbone.named_parameters():
            if name not in keep and parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.add(name)

    def encoder_trains(self) -> bool:
        """False: the encoder is frozen."""
        return False

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Scalar, see :func:`fmrizoo.heads.losses.total_loss`."""
        return total_loss(self.tasks, outputs, target)

    def scores(self, outputs: Tensor) -> Tensor:
        """``(b, Σ TaskSpec.scores)``, see :func:`fmrizoo.heads.losses.all_scores`."""
        return all_scores(self.tasks, outputs)


def parameter_layers(backbone: Backbone) -> dict[str, int]:
    """Entry of ``Backbone.layer_names`` in which each parameter lies.

    Raises:
        RecipeError: a parameter lies in none.
    """
    entry = {n: number for number, names in enumerate(backbone.layer_names()) for n in names}
    found = {}
    for name, _ in backbone.named_parameters():
        parts = name.split(".")
        above = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        layer = next((entry[prefix] for prefix in above if prefix in entry), None)
        if layer is None:
            raise RecipeError(
                f"{type(backbone).__name__}.layer_names() does not say which layer {name} is in"
            )
        found[name] = layer
    return found


def modules_named(backbone: Backbone, names: Iterable[str]) -> tuple[nn.Module, ...]:
    """The modules among ``names``, which may be of parameters too."""
    modules = dict(backbone.named_modules())
    return tuple(modules[name] for name in names if name in modules)


def check_choice(key: str, value: str, known: Sequence[str]) -> None:
    """:class:`RecipeError` unless ``value`` of ``head.<key>`` is one of ``known``."""
    if value not in known:
        raise RecipeError(f"head.{key}={value!r} is not known.{suggest(value, list(known))}")


def check_share(key: str, value: float) -> None:
    """:class:`RecipeError` unless ``0 <= value < 1``."""
    if not 0 <= value < 1:
        raise RecipeError(f"head.{key} is a share in [0, 1), got {value}")


def check_count(key: str, value: int, least: int = 1) -> None:
    """:class:`RecipeError` unless ``value >= least``."""
    if value < least:
        raise RecipeError(f"head.{key} must be ≥ {least}, got {value}")
