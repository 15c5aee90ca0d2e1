"""Low-rank adapters (LoRA) on any encoder: add, switch, merge, save and load them.

Several adapters can sit in one encoder, each under a name; those in use add their parts. Files are
those of the peft package (``adapter_model.safetensors``, ``adapter_config.json``), in both
directions::

    adapters.load(encoder, "runs/sex/adapter", name="sex")
    adapters.load(encoder, "runs/age/adapter", name="age")
    adapters.use(encoder, "sex")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from fmrizoo.errors import RecipeError
from fmrizoo.heads.adapter_files import AdapterFile, read_adapter, write_adapter
from fmrizoo.layers.lora import (
    LoraSettings,
    check_name,
    linear_layers,
    lora_layers,
    unwrap,
    wrap,
)
from fmrizoo.registry import suggest
from fmrizoo.types import Backbone


def add(
    encoder: Backbone,
    targets: Sequence[str] = (),
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    name: str = "default",
) -> None:
    """Put a new adapter into ``encoder`` and let it alone act. It adds nothing before it trains.

    Its parameters train; what else does is not changed.

    Args:
        encoder: Any backbone.
        targets: Ends of the names of the Linear layers that get one; none: all that
            ``Backbone.lora_targets`` allows.
        rank: Of the two matrices' product.
        alpha: Its factor is ``alpha / rank``.
        dropout: On the adapter's input.
        name: Of the adapter.

    Raises:
        RecipeError: a target that the encoder lacks, a name that is taken, a rank below 1, or
            merged adapters.
    """
    settings = LoraSettings(rank, alpha, dropout)
    chosen = target_layers(encoder, targets)
    _check_new(encoder, name)
    for layer in wrap(encoder, chosen):
        layer.add(name, settings)
    use(encoder, name)


def target_layers(encoder: Backbone, targets: Sequence[str] = ()) -> list[str]:
    """Names of the Linear layers of ``encoder`` whose names end in one of ``targets``.

    Raises:
        RecipeError: no layer ends like that; names those that exist.
    """
    allowed = encoder.lora_targets()
    linears = [name for name in linear_layers(encoder) if _ends(name, allowed)]
    for target in targets:
        if not any(_ends(name, [target]) for name in linears):
            known = suggest(target, sorted({*allowed, *_tails(allowed)}))
            raise RecipeError(
                f"low-rank adapters have no target {target!r} in {type(encoder).__name__}.{known}"
            )
    return [name for name in linears if _ends(name, targets or allowed)]


def _ends(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _tails(targets: Sequence[str]) -> set[str]:
    return {target.rsplit(".", 1)[-1] for target in targets}


def names(encoder: nn.Module) -> tuple[str, ...]:
    """Names of all adapters in ``encoder``, in the order they came."""
    return tuple(dict.fromkeys(n for layer in lora_layers(encoder).values() for n in layer.names))


def active(encoder: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act."""
    return tuple(dict.fromkeys(n for layer in lora_layers(encoder).values() for n in layer.active))


def use(encoder: nn.Module, name: str | Sequence[str] | None) -> None:
    """Let one adapter act, or several together, or none (None: the plain encoder).

    Raises:
        RecipeError: no such adapter, or merged adapters.
    """
    chosen = [] if name is None else [name] if isinstance(name, str) else list(name)
    for one in chosen:
        _check_known(encoder, one)
    _check_plain(encoder)
    for layer in lora_layers(encoder).values():
        layer.use(chosen)


def remove(encoder: nn.Module, name: str) -> None:
    """Take an adapter out; without any left, the encoder is what it was before the first.

    Raises:
        RecipeError: no such adapter, or merged adapters.
    """
    _check_known(encoder, name)
    _check_plain(encoder)
    for layer in lora_layers(encoder).values():
        if name in layer.names:
            layer.drop(name)
    unwrap(encoder, empty_only=True)


def merge(encoder: nn.Module) -> None:
    """Add the adapters in use to the weights: the same outputs (fp32: ≤ 1e-6), no cost.

    A copy of the weights is kept for :func:`unmerge`. While merged, the encoder cannot be saved or
    trained further.
    """
    for layer in lora_layers(encoder).values():
        layer.merge()


def unmerge(encoder: nn.Module) -> None:
    """Undo :func:`merge`: every weight comes back bit by bit."""
    for layer in lora_layers(encoder).values():
        layer.unmerge()


def merge_and_unload(encoder: nn.Module) -> None:
    """Merge for good: plain layers that hold the adapters in use; all others are gone."""
    merge(encoder)
    unwrap(encoder)


def save(
    encoder: Backbone, folder: str | Path, name: str = "default", readout: nn.Module | None = None
) -> None:
    """Write one adapter alone, as peft would, so that peft loads it into the bare encoder.

    Args:
        encoder: Holds the adapter.
        folder: Gets ``adapter_model.safetensors``, ``adapter_config.json`` and ``fmrizoo.json``
            (checksums of the file and of the encoder that it belongs to), each written whole.
        name: Of the adapter; it is not in the files.
        readout: What was trained beside it: goes in as ``head``, one of peft's
            ``modules_to_save``.

    Raises:
        RecipeError: no such adapter.
        DataError: the folder cannot be written.
    """
    _check_known(encoder, name)
    write_adapter(Path(folder), AdapterFile.of(encoder, name, readout), encoder)


def load(
    encoder: Backbone,
    folder: str | Path,
    name: str = "default",
    readout: nn.Module | None = None,
    *,
    trainable: bool = False,
) -> None:
    """Put a saved adapter (of fmrizoo or of peft) into ``encoder`` and let it alone act.

    Args:
        encoder: The encoder that it was trained on.
        folder: Where :func:`save` wrote.
        name: What it is called here.
        readout: Gets the weights of the head that was trained beside it.
        trainable: Whether its parameters train further.

    Raises:
        CheckpointError: damaged or missing files, an adapter of another kind or of another
            encoder (names the first misfit), or no readout where one is asked for.
        RecipeError: the name is taken, or merged adapters.
    """
    _check_new(encoder, name)
    file = read_adapter(Path(folder))
    file.check(encoder, readout)
    for layer, path in zip(wrap(encoder, list(file.weights)), file.weights, strict=True):
        layer.add(name, file.settings)
        for table, value in zip((layer.lora_A, layer.lora_B), file.weights[path], strict=True):
            table[name].load_state_dict({"weight": value})
            table[name].requires_grad_(trainable)
    if readout is not None:
        readout.load_state_dict(file.readout)
    use(encoder, name)


def _check_new(encoder: nn.Module, name: str) -> None:
    check_name(name)
    _check_plain(encoder)
    if name in names(encoder):
        raise RecipeError(
            f"the encoder already has an adapter {name!r}: take another name, or remove it"
        )


def _check_plain(encoder: nn.Module) -> None:
    if any(layer.merged for layer in lora_layers(encoder).values()):
        raise RecipeError("the adapters are merged into the weights: unmerge them first")


def _check_known(encoder: nn.Module, name: str) -> None:
    if name not in (known := names(encoder)):
        raise RecipeError(f"the encoder has no adapter {name!r}.{suggest(name, list(known))}")
