"""Files of low-rank adapters, as the peft package writes them.

``adapter_model.safetensors`` holds ``base_model.model.<layer>.lora_A.weight`` ``(rank, in)`` and
``….lora_B.weight`` ``(out, rank)`` for every layer of the bare encoder, and a head that was trained
beside them under ``base_model.model.head.…``. ``adapter_config.json`` says the rest in peft's
words. ``fmrizoo.json``, which peft ignores and which may be missing, holds two checksums: of the
weights file, and of the encoder that the adapter belongs to.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensors_bytes
from torch import Tensor, nn

from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.files import sha256_of, write_atomic
from fmrizoo.layers.lora import LoraSettings, linear_layers, lora_layers
from fmrizoo.types import Backbone

WEIGHTS, CONFIG, FACTS = "adapter_model.safetensors", "adapter_config.json", "fmrizoo.json"
PREFIX = "base_model.model."
HEAD = "head"
# What peft can vary and this reader cannot: any other value is refused.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}


@dataclass
class AdapterFile:
    """One adapter apart from an encoder.

    Attributes:
        settings: Rank, alpha, dropout.
        weights: ``(A, B)`` by the name of the layer.
        readout: State of the head that was trained beside it, or empty.
        targets: Ends of layer names that pick just these layers, else all names.
        encoder: Checksum of the encoder, see :func:`encoder_sha256`; empty: not known.
    """

    settings: LoraSettings
    weights: dict[str, tuple[Tensor, Tensor]]
    readout: dict[str, Tensor] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    encoder: str = ""

    @classmethod
    def of(cls, encoder: Backbone, name: str, readout: nn.Module | None) -> AdapterFile:
        """The adapter ``name`` of ``encoder``."""
        layers = {path: m for path, m in lora_layers(encoder).items() if name in m.names}
        weights = {
            path: (_weight(layer.lora_A[name]), _weight(layer.lora_B[name]))
            for path, layer in layers.items()
        }
        settings = next(iter(layers.values())).settings[name]
        state = {} if readout is None else readout.state_dict()
        return cls(settings, weights, state, _targets(encoder, list(weights)))

    def tensors(self) -> dict[str, Tensor]:
        """All weights under peft's names."""
        found = {f"{PREFIX}{HEAD}.{key}": value for key, value in self.readout.items()}
        for path, (down, up) in self.weights.items():
            found[f"{PREFIX}{path}.lora_A.weight"] = down
            found[f"{PREFIX}{path}.lora_B.weight"] = up
        return {key: value.detach().cpu().contiguous() for key, value in found.items()}

    def check(self, encoder: Backbone, readout: nn.Module | None) -> None:
        """Compare with the model that it is to be loaded into.

        Raises:
            CheckpointError: names the first misfit.
        """
        layers, kind = linear_layers(encoder), type(encoder).__name__
        rank = self.settings.rank
        for path, (down, up) in self.weights.items():
            if path not in layers:
                raise CheckpointError(
                    f"the adapter is of another encoder: it has a part for {path}, and this {kind} "
                    "has no such Linear layer"
                )
            layer = layers[path]
            want = (rank, layer.in_features), (layer.out_features, rank)
            if (tuple(down.shape), tuple(up.shape)) != want:
                raise CheckpointError(
                    f"the adapter is of another encoder: its part for {path} is "
                    f"{tuple(down.shape)}, {tuple(up.shape)}; this {kind} needs {want[0]}, "
                    f"{want[1]} (rank, in), (out, rank)"
                )
        if self.encoder and self.encoder != encoder_sha256(encoder):
            raise CheckpointError(
                f"the adapter is of another encoder: it was trained on a {kind} of this shape with "
                "other weights; load those first (Recipe.init_from of its run)"
            )
        if readout is not None:
            self._check_readout(readout)

    def _check_readout(self, readout: nn.Module) -> None:
        own = {key: tuple(value.shape) for key, value in readout.state_dict().items()}
        saved = {key: tuple(value.shape) for key, value in self.readout.items()}
        for key in sorted(own.keys() | saved.keys()):
            if own.get(key) != saved.get(key):
                raise CheckpointError(
                    f"the adapter's head does not fit this one: {HEAD}.{key} is "
                    f"{saved.get(key, 'missing')} in the file, {own.get(key, 'missing')} in the "
                    "model"
                )


def write_adapter(folder: Path, file: AdapterFile, encoder: Backbone) -> None:
    """Write the three files, each whole; the checksums come last.

    Raises:
        DataError: the folder cannot be written.
    """
    content = tensors_bytes(file.tensors(), {"format": "pt"})
    config = {
        "auto_mapping": {
            "base_model_class": type(encoder).__name__,
            "parent_library": type(encoder).__module__,
        },
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": file.settings.alpha,
        "lora_dropout": file.settings.dropout,
        "modules_to_save": [HEAD] if file.readout else None,
        "peft_type": "LORA",
        "r": file.settings.rank,
        "target_modules": file.targets,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    facts = {
        "weights_sha256": hashlib.sha256(content).hexdigest(),
        "encoder": type(encoder).__name__,
        "encoder_sha256": encoder_sha256(encoder),
    }
    # Without its facts a file stands for itself: old ones must not judge new weights.
    (folder / FACTS).unlink(missing_ok=True)
    write_atomic(folder / WEIGHTS, content)
    write_atomic(folder / CONFIG, _json(config))
    write_atomic(folder / FACTS, _json(facts))


def read_adapter(folder: Path) -> AdapterFile:
    """Read what :func:`write_adapter` or peft wrote.

    Raises:
        CheckpointError: missing or damaged files, or not a plain LoRA adapter.
    """
    config = _read_json(folder / CONFIG)
    for key, known in PLAIN.items():
        if config.get(key, known[0]) not in known:
            raise CheckpointError(
                f"{folder / CONFIG} asks for {key}={config[key]!r}: only plain LoRA adapters "
                f"({key}={known[0]!r}) can be loaded"
            )
    facts = _read_json(folder / FACTS) if (folder / FACTS).is_file() else {}
    path = folder / WEIGHTS
    try:
        if facts and sha256_of(path) != facts.get("weights_sha256"):
            raise CheckpointError(f"{path} is damaged: its checksum is not the one in {FACTS}")
        tensors = read_tensors(path.read_bytes())
        settings = LoraSettings(config["r"], config["lora_alpha"], config["lora_dropout"])
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no adapter: there is no {WEIGHTS}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    except (KeyError, TypeError, RecipeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is no LoRA configuration: {error}") from None
    weights, readout = _sorted_out(tensors, path)
    return AdapterFile(settings, weights, readout, encoder=facts.get("encoder_sha256", ""))


def encoder_sha256(encoder: nn.Module) -> str:
    """Checksum of an encoder's weights without any adapter.

    Over names, shapes and values rounded to bf16: a copy in bf16 has the same.
    """
    layers = lora_layers(encoder)
    plain: dict[str, Tensor] = {f"{path}.weight": m.plain_weight for path, m in layers.items()}
    for name, parameter in encoder.named_parameters():
        path = name.rpartition(".base_layer.")[0]
        if path in layers:
            plain.setdefault(name.replace(".base_layer.", ".", 1), parameter)
        elif not any(name.startswith(f"{layer}.") for layer in layers):
            plain[name] = parameter
    digest = hashlib.sha256()
    for name in sorted(plain):
        value = plain[name].detach()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(
            value.to("cpu", torch.bfloat16).reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _sorted_out(
    tensors: dict[str, Tensor], path: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Tensors by peft's names → (A, B) by layer, and the head's state."""
    readout, halves = {}, {}
    for key, value in sorted(tensors.items()):
        layer, mark, half = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{path} is no peft adapter: {key} does not start with {PREFIX}")
        if mark and half in ("A.weight", "B.weight"):
            halves[layer, half[0]] = value
        elif layer == "" and half.startswith(f"{HEAD}."):
            readout[half.removeprefix(f"{HEAD}.")] = value
        else:
            raise CheckpointError(f"{path} holds {key}, which is no part of a LoRA adapter")
    names = dict.fromkeys(layer for layer, _ in halves)
    if not names or (odd := [n for n in names for h in "AB" if (n, h) not in halves]):
        what = f"{odd[0]} has only one of lora_A, lora_B" if names else "no lora_A in it"
        raise CheckpointError(f"{path} is not a whole adapter: {what}")
    return {name: (halves[name, "A"], halves[name, "B"]) for name in names}, readout


def _targets(encoder: Backbone, paths: list[str]) -> list[str]:
    """The encoder's own target names if they pick just ``paths``, else ``paths``."""
    linears = list(linear_layers(encoder))
    found, picked = [], set()
    for target in encoder.lora_targets():
        ends = {name for name in linears if f".{name}".endswith(f".{target}")}
        if ends <= set(paths):
            found.append(target)
            picked |= ends
    return found if picked == set(paths) else paths


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no adapter: there is no {path.name}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it is no JSON object")
    return values
