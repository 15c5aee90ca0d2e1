"""Official SwiFT checkpoints → :class:`fmrizoo.backbones.swin4d.Swin4D`.

Released files are Lightning checkpoints: encoder keys start with ``model.``, head keys with
``output_head.``; old ones also hold ``model.head.*``. Window sizes, heads and full attention of the
last stage cannot be read off the weights: they come from the file's hyper-parameters, or from you.
"""

from __future__ import annotations

import logging
import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmrizoo.backbones.swin4d import Swin4D, Swin4DConfig
from fmrizoo.config import compose
from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.layers.positions import resize_space, resize_time

log = logging.getLogger(__name__)

# SwiFT's name → ours. The values are used as they are.
NAMES = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "num_heads",
    "window_size": "window_size",
    "first_window_size": "first_window_size",
    "last_layer_full_MSA": "last_layer_full_msa",
    "c_multiplier": "c_mult",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "patch_norm": "patch_norm",
    "drop_rate": "drop_rate",
    "attn_drop_rate": "attn_drop_rate",
    "drop_path_rate": "drop_path_rate",
}
# What the weights cannot tell.
REQUIRED = (
    "img_size",
    "patch_size",
    "embed_dim",
    "depths",
    "num_heads",
    "window_size",
    "first_window_size",
    "last_layer_full_MSA",
)
# Hyper-parameters that would change the encoder's numbers if they had other values than these.
FIXED = {"spatial_dims": 4, "to_float": None, "use_checkpoint": None, "downsample": "mergingv2"}


# What torch.load raises on files that are torn or something else.
_UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError)


@dataclass
class LoadReport:
    """Where every tensor of the file went.

    Attributes:
        matched: Names loaded into the backbone.
        missing: Backbone names that the file lacks (empty unless the final norm is unused).
        unexpected: Encoder names that the backbone has no place for (always empty on success).
        head: Names of the file's task head, left out.
        interpolated: Position tables resized to another grid or length, with both shapes.
    """

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f"{len(self.matched)} tensors matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.head)} of the task head left out"
        )
        if self.interpolated:
            text += f"; interpolated: {', '.join(self.interpolated)}"
        return text


class SwiFTEncoder(Swin4D):
    """A :class:`Swin4D` that knows where its weights came from."""

    load_report: LoadReport


def load_swift(
    checkpoint: str | Path | Mapping[str, Any],
    hyper_parameters: Mapping[str, Any] | None = None,
    *,
    interpolate: bool = False,
    trust_pickle: bool = False,
) -> SwiFTEncoder:
    """The encoder of a SwiFT checkpoint, in ``eval()`` mode; ``.load_report`` tells what was done.

    Args:
        checkpoint: A Lightning or plain ``.pt``/``.ckpt`` file, or its content, or a state dict.
        hyper_parameters: SwiFT's own names (``last_layer_full_MSA``, ``c_multiplier`` …); they win
            over the file's, and are required where the file holds none.
        interpolate: Resize position tables when ``img_size`` asks for another grid or length.
        trust_pickle: Unpickle arbitrary objects if the safe loader refuses the file. Only for
            files whose origin you trust: unpickling runs code.

    Raises:
        CheckpointError: unreadable file, hyper-parameters missing or impossible, or a tensor that
            has no place or another shape.
    """
    content = checkpoint
    if isinstance(checkpoint, (str, Path)):
        content = _read(Path(checkpoint), trust_pickle)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{_name(checkpoint)} holds no state dict")
    state = content.get("state_dict", content)
    given: dict[str, Any] = {}
    for found in (content.get("hyper_parameters"), hyper_parameters):
        values = vars(found) if isinstance(found, Namespace) else found or {}
        if not isinstance(values, Mapping):
            raise CheckpointError(
                f"the hyper-parameters of {_name(checkpoint)} are no mapping of names to values "
                f"but {type(found).__name__}"
            )
        given |= values
    encoder, head = _split(state, _name(checkpoint))
    backbone = SwiFTEncoder(_config(given, encoder, _name(checkpoint)))
    report = LoadReport(head=head)
    _fit_positions(backbone, encoder, interpolate, report)
    _place(backbone, encoder, report, _name(checkpoint))
    log.info("SwiFT weights: %s", report)
    backbone.load_report = report
    return backbone.eval()


def _name(checkpoint: Any) -> str:
    return str(checkpoint) if isinstance(checkpoint, (str, Path)) else "the state dict"


def _read(path: Path, trust_pickle: bool) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {path}")
    with path.open("rb") as file:
        start = file.read(2)
    # A zip archive, or the bare pickle that PyTorch wrote before 1.6.
    if not start.startswith((b"PK", b"\x80")):
        raise CheckpointError(f"{path} is no PyTorch checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust_pickle:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise CheckpointError(
                f"{path} holds objects that the safe loader refuses"
                f"{f' ({named[1]})' if named else ''}; if you trust its origin, load it with "
                "trust_pickle=True"
            ) from None
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} is no PyTorch checkpoint: {error}") from None
    log.warning("unpickling %s without restrictions, as asked", path)
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (*_UNREADABLE, pickle.UnpicklingError, ImportError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be unpickled: {error}") from None


def _split(state: Any, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Encoder tensors by their bare names, and the names of the task head."""
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{where} holds no state dict")
    lightning = any(str(name).startswith("model.") for name in state)
    encoder: dict[str, Tensor] = {}
    head = []
    for name, value in state.items():
        bare = str(name).removeprefix("model.")
        if str(name).startswith("output_head.") or bare.startswith("head."):
            head.append(str(name))
        elif lightning and bare == name:
            raise CheckpointError(f"{where}: no place for tensor {name!r}")
        elif not isinstance(value, Tensor):
            raise CheckpointError(
                f"{where}: entry {name!r} is no tensor but {type(value).__name__}"
            )
        else:
            encoder[bare] = value
    return encoder, head


def _config(given: Mapping[str, Any], encoder: dict[str, Tensor], where: str) -> Swin4DConfig:
    missing = [name for name in REQUIRED if name not in given]
    if missing:
        raise CheckpointError(
            f"{where} does not tell {', '.join(missing)}: pass hyper_parameters="
            "{...} with SwiFT's own names"
        )
    for name, value in FIXED.items():
        if value is not None and given.get(name, value) != value:
            raise CheckpointError(f"{where}: {name}={given[name]!r} is not supported")
    values = {ours: given[theirs] for theirs, ours in NAMES.items() if theirs in given}
    values = {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in values.items()}
    try:
        recipe = compose({"backbone": {**values, "name": "swin4d", "final_norm": False}})
    except RecipeError as error:
        raise CheckpointError(f"{where}: impossible hyper-parameters: {error}") from None
    config: Swin4DConfig = recipe.backbone
    weight = encoder.get("patch_embed.fc.weight")
    if weight is not None and weight.shape[:1] != (config.embed_dim,):
        raise CheckpointError(
            f"{where}: embed_dim={config.embed_dim} but the patch embedding's weight is "
            f"{tuple(weight.shape)}"
        )
    return config


def _fit_positions(
    backbone: Swin4D, encoder: dict[str, Tensor], interpolate: bool, report: LoadReport
) -> None:
    for name, own in backbone.state_dict().items():
        table = encoder.get(name)
        is_table = name.startswith("pos_embeds.")
        if not is_table or table is None or table.shape == own.shape or table.ndim != own.ndim:
            continue
        change = f"{name} {tuple(table.shape)} → {tuple(own.shape)}"
        if not interpolate:
            raise CheckpointError(
                f"position table of another size: {change}; pass interpolate=True to resize it, "
                "or the img_size that the weights were trained with"
            )
        if table.shape[1] != own.shape[1]:
            raise CheckpointError(f"position table of another width: {change}")
        if name.endswith("time_embed"):
            encoder[name] = resize_time(table, own.shape[-1])
        else:
            x, y, z = own.shape[2:5]
            encoder[name] = resize_space(table, (x, y, z))
        report.interpolated.append(change)


def _place(backbone: Swin4D, encoder: dict[str, Tensor], report: LoadReport, where: str) -> None:
    own = backbone.state_dict()
    report.matched = sorted(own.keys() & encoder.keys())
    report.missing = sorted(own.keys() - encoder.keys())
    report.unexpected = sorted(encoder.keys() - own.keys())
    # v1 never applies its last norm: a file without it is whole.
    needed = [name for name in report.missing if not name.startswith("norm.")]
    shapes = [n for n in report.matched if own[n].shape != encoder[n].shape]
    if needed or report.unexpected or shapes:
        parts = {"missing": needed, "unexpected": report.unexpected, "other shape": shapes}
        said = "; ".join(
            f"{what}: {', '.join(names[:5])}" for what, names in parts.items() if names
        )
        raise CheckpointError(f"{where} does not fit the hyper-parameters ({said})")
    backbone.load_state_dict({n: encoder[n] for n in report.matched}, strict=False)
