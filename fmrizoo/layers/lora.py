"""Low-rank adapters around a Linear layer.

Source: Hu et al. 2022, "LoRA": ``y = W x + b + (alpha / rank) · B A x`` with A ``(rank, in)`` drawn
and B ``(out, rank)`` zero at the start. Names and initialisation (A: Kaiming uniform with a = √5)
are those of the peft package; what an adapter adds is summed inside the matrix product, so results
agree with peft's to rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fmrizoo.errors import CheckpointError, RecipeError


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter is: ``rank``, ``alpha``, and ``dropout`` on its input.

    Raises:
        RecipeError: a rank below 1, an alpha that is not positive, or dropout outside [0, 1).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise RecipeError(
                "low-rank adapters need rank ≥ 1, alpha > 0 and dropout in [0, 1), got rank "
                f"{self.rank}, alpha {self.alpha}, dropout {self.dropout}"
            )

    @property
    def scale(self) -> float:
        """Factor on what the adapter adds."""
        return self.alpha / self.rank


class _Adapted(torch.autograd.Function):
    """``x Wᵀ + b + s · x Aᵀ Bᵀ`` with W and b frozen: nothing as large as x or y is formed twice.

    ``x (rows, in)`` → ``(rows, out)``, no view of anything: what follows may overwrite it (rotary
    positions do). Kept for the backward pass: x and ``x Aᵀ``, as the composed operations do.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        low = x @ a.t()
        out = F.linear(x, weight, bias)
        out.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, low, weight, a, b = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_low = d @ b * ctx.scale if wanted[0] or wanted[3] else None
        d_x = d_a = d_b = None
        if wanted[0]:
            d_x = (d @ weight).addmm_(d_low, a)
        if wanted[3]:
            assert d_low is not None
            d_a = d_low.t() @ x
        if wanted[4]:
            d_b = (d.t() @ low) * ctx.scale
        return d_x, None, None, d_a, d_b, None


class LoraLinear(nn.Module):
    """A frozen Linear and what any number of adapters, by name, add to its output.

    Dropout acts on each adapter's input. Who wants the map as a matrix may ask for its effect on
    the unit vectors (``layer(torch.eye(in_features))``, as the Mamba-2 mixer does): dropout then
    leaves out whole input channels of the adapter, the same for all tokens of that pass.

    There is no ``weight`` on purpose: code that would read it, and so pass the adapters by, fails.

    Attributes:
        base_layer: The Linear.
        lora_A, lora_B: Bias-free Linears ``in → rank`` and ``rank → out`` by name of the adapter.
        lora_dropout: By name.
        active: Names of the adapters that act.
        settings: Rank, alpha and dropout by name.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.settings: dict[str, LoraSettings] = {}
        # The weight before a merge: it comes back with every bit.
        self._plain: Tensor | None
        self.register_buffer("_plain", None, persistent=False)
        self.train(base.training)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.base_layer.out_features

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters here."""
        return tuple(self.lora_A)

    @property
    def merged(self) -> bool:
        """Whether the active adapters are part of the weight."""
        return self._plain is not None

    @property
    def plain_weight(self) -> Tensor:
        """The Linear's weight without any adapter."""
        return self.base_layer.weight if self._plain is None else self._plain

    def add(self, name: str, settings: LoraSettings) -> None:
        """Put in a new adapter, which adds nothing yet, and make it the active one.

        Raises:
            RecipeError: a name that is taken or cannot be one, or the adapters are merged.
        """
        check_name(name)
        self._check_plain()
        if name in self.names:
            raise RecipeError(f"the encoder already has an adapter {name!r}: take another name")
        weight = self.base_layer.weight
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        inward = nn.Linear(self.in_features, settings.rank, bias=False, **options)  # Kaiming, √5
        outward = nn.Linear(settings.rank, self.out_features, bias=False, **options)
        nn.init.zeros_(outward.weight)
        self.lora_A[name] = inward.train(self.training)
        self.lora_B[name] = outward.train(self.training)
        self.lora_dropout[name] = nn.Dropout(settings.dropout).train(self.training)
        self.settings[name] = settings
        self.active = (name,)

    def drop(self, name: str) -> None:
        """Take an adapter out.

        Raises:
            RecipeError: the adapters are merged.
        """
        self._check_plain()
        for table in (self.lora_A, self.lora_B, self.lora_dropout):
            del table[name]
        del self.settings[name]
        self.active = tuple(n for n in self.active if n != name)

    def use(self, names: Sequence[str]) -> None:
        """Let those of ``names`` act that are here; none of the others.

        Raises:
            RecipeError: the adapters are merged.
        """
        self._check_plain()
        self.active = tuple(name for name in names if name in self.settings)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, in)`` → ``(…, out)``."""
        if len(self.active) == 1 and self._plainly(x):
            (name,) = self.active
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            weight, bias, scale = self.base_layer.weight, self.base_layer.bias, self._scale(name)
            rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
            adapted: Tensor = _Adapted.apply(rows, weight, bias, down, up, scale)
            return adapted if x.ndim == 2 else adapted.view(*x.shape[:-1], -1)
        out: Tensor = self.base_layer(x)
        if self.merged:
            return out
        for name in self.active:
            low = self.lora_A[name](self.lora_dropout[name](x))
            out = out + self.lora_B[name](low) * self._scale(name)
        return out

    def _scale(self, name: str) -> float:
        return self.settings[name].scale

    def _plainly(self, x: Tensor) -> bool:
        """Whether the one active adapter can be summed inside the matrix product."""
        base = self.base_layer
        parts = [base.weight] if base.bias is None else [base.weight, base.bias]
        frozen = not torch.is_grad_enabled() or not any(part.requires_grad for part in parts)
        dropout = cast(nn.Dropout, self.lora_dropout[self.active[0]])
        drops = dropout.training and dropout.p > 0  # a frozen encoder's own modules are in eval()
        # Autocast chooses dtypes operation by operation.
        kind = x.device.type
        mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return frozen and not self.merged and not drops and not mixed

    @torch.no_grad()
    def merge(self) -> None:
        """Add the active adapters to the weight (in fp64, rounded once); keep a copy of it."""
        if self.merged or not self.active:
            return
        weight = self.base_layer.weight
        self._plain = weight.detach().clone()
        exact = weight.double()
        for name in self.active:
            down, up = (cast(Tensor, t[name].weight) for t in (self.lora_A, self.lora_B))
            exact = exact + self.settings[name].scale * (up.double() @ down.double())
        weight.copy_(exact)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The weight from before :meth:`merge`, bit by bit."""
        if self._plain is not None:
            self.base_layer.weight.copy_(self._plain)
            self._plain = None

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply weight, bias and what all adapters add by ``factor``."""
        scale_output(self.base_layer, factor)
        for up in self.lora_B.values():
            cast(nn.Linear, up).weight.mul_(factor)
        if self._plain is not None:
            self._plain.mul_(factor)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"active={list(self.active)}, merged={self.merged}"

    def _check_plain(self) -> None:
        if self.merged:
            raise RecipeError("the adapters are merged into the weights: unmerge them first")

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_file("saved")
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_file("loaded")
        super()._load_from_state_dict(*args, **kwargs)

    def _check_file(self, what: str) -> None:
        if self.merged:
            # The weight holds the adapters, and they would be there a second time beside it.
            raise CheckpointError(
                f"an encoder with merged adapters cannot be {what}: unmerge them first"
            )


@torch.no_grad()
def scale_output(layer: nn.Module, factor: float) -> None:
    """Multiply what ``layer`` puts out by ``factor``, in its weights.

    Raises:
        RecipeError: neither a Linear nor a :class:`LoraLinear`.
    """
    if isinstance(layer, LoraLinear):
        layer.scale_output(factor)
    elif isinstance(layer, nn.Linear):
        for parameter in layer.parameters():
            parameter.mul_(factor)
    else:
        raise RecipeError(
            f"a multiplier can be put into the weights of a Linear or a LoraLinear, not of a "
            f"{type(layer).__name__}: take adapters of other packages off first"
        )


def check_name(name: str) -> None:
    """:class:`RecipeError` for what cannot name an adapter (it becomes part of parameter names)."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or hasattr(nn.ModuleDict, name):
        raise RecipeError(
            f"{name!r} cannot name an adapter: take letters, digits, _ and -, and no word like "
            "'keys' that PyTorch uses itself"
        )


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """All Linears of ``model`` that carry adapters, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


def wrap(model: nn.Module, names: Sequence[str]) -> Iterator[LoraLinear]:
    """Make the Linears ``names`` of ``model`` able to carry adapters, and give them one by one."""
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, LoraLinear):
            layer = LoraLinear(cast(nn.Linear, layer))
            _put(model, name, layer)
        yield layer


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | LoraLinear]:
    """All Linears of ``model`` by name, whether they carry adapters or not; not the adapters'."""
    found: dict[str, nn.Linear | LoraLinear] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | LoraLinear) and not name.startswith(inside or ("\0",)):
            found[name] = module
            if isinstance(module, LoraLinear):
                inside = (*inside, f"{name}.")
    return found


def unwrap(model: nn.Module, *, empty_only: bool = False) -> None:
    """Put plain Linears, with the weights as they are now, in the place of :class:`LoraLinear`.

    ``empty_only``: only where no adapter is left.
    """
    for name, layer in lora_layers(model).items():
        if not (empty_only and layer.names):
            _put(model, name, layer.base_layer)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    above, _, last = name.rpartition(".")
    setattr(model.get_submodule(above), last, layer)
