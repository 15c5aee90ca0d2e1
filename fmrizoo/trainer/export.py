"""The finished model: ``model.safetensors`` + ``config.json``, readable without DeepSpeed.

``config.json`` holds what is needed to build the model again and to use it rightly: the recipe,
the preprocessing contract, the task, the names of all runs the weights have seen, and the SHA-256
of the weights, so that a config and weights that do not belong together are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fmrizoo import __version__
from fmrizoo.errors import CheckpointError, FmrizooError
from fmrizoo.files import publish, sha256_of, write_json
from fmrizoo.mup.stored import write_parametrization
from fmrizoo.trainer.files import writing
from fmrizoo.types import Contract, TaskSpec

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
SCHEMA = "fmrizoo.model/2"


@dataclass(frozen=True)
class ModelInfo:
    """What travels with the weights.

    Attributes:
        recipe: Plain containers of :func:`fmrizoo.config.to_dict`.
        contract: How the training data were preprocessed; data at use are compared with it.
        tasks: What the head predicts (fine-tuned models).
        seen_runs: Names of all runs whose BOLD the weights were trained on, those of the encoder
            the run started from included: what a test set must not contain.
        step: Optimizer steps behind the weights (those of the best validation, if they are kept).
        steps_taken: Optimizer steps that the run took in all.
        stopped_early: It ended because its validations no longer got better.
        parameters: Number of parameters (filled by :func:`save_model`).
        fmrizoo_version: Version that wrote the folder.
        sha256: Of the weights file (filled by :func:`save_model`).
    """

    recipe: dict[str, Any]
    contract: Contract | None = None
    tasks: tuple[TaskSpec, ...] = ()
    seen_runs: tuple[str, ...] = ()
    step: int = 0
    steps_taken: int = 0
    stopped_early: bool = False
    parameters: int = 0
    fmrizoo_version: str = __version__
    sha256: str = ""
    schema: str = field(default=SCHEMA)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["contract"] = self.contract.to_dict() if self.contract else None
        values["tasks"] = [asdict(task) for task in self.tasks]
        values["seen_runs"] = sorted(self.seen_runs)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelInfo:
        """Inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: another schema, unknown or missing fields.
        """
        if values.get("schema") != SCHEMA:
            raise CheckpointError(f"schema is {values.get('schema')!r}, expected {SCHEMA!r}")
        values = dict(values)
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise CheckpointError(f"unknown fields {unknown}")
        try:
            contract, tasks = values.pop("contract"), values.pop("tasks")
            return cls(
                **{**values, "seen_runs": tuple(values["seen_runs"])},
                contract=Contract.from_dict(contract) if contract is not None else None,
                tasks=tuple(_task(task) for task in tasks),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"a field is missing or malformed: {error}") from None


def _task(values: dict[str, Any]) -> TaskSpec:
    lists = {key: tuple(values[key]) for key in ("classes", "weights")}
    return TaskSpec(**{**values, **lists})


def save_model(
    folder: Path,
    model: nn.Module | Mapping[str, Tensor],
    info: ModelInfo,
    told: Callable[[int], object] | None = None,
) -> ModelInfo:
    """Write ``folder``/model.safetensors and then config.json, each atomically.

    Args:
        folder: Made if absent.
        model: A module, or its ``state_dict``.
        info: ``parameters`` and ``sha256`` are filled in here.
        told: Called with the size of each piece that was checksummed.

    Returns:
        The completed info.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = apart(state)
    if isinstance(model, nn.Module):
        count = sum(p.numel() for p in model.parameters())
    else:
        count = info.parameters or sum(t.numel() for t in tensors.values())
    temporary = folder / f".{WEIGHTS}.tmp"
    with writing("the model", folder):
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, nn.Module):
            write_parametrization(folder, model)
        save_file(tensors, temporary, metadata={"format": "pt"})
        done = replace(info, parameters=count, sha256=sha256_of(temporary, told))
        publish(temporary, folder / WEIGHTS)
        write_json(folder / CONFIG, done.to_dict())
    return done


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none sharing memory with another (safetensors refuses tied weights).

    Copies only what must be copied: a model of billions of weights has no room for two of it.
    """
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor
    return own


def read_info(folder: Path) -> ModelInfo:
    """Only ``config.json`` of a model folder (see :func:`read_model`)."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is no model folder: it holds no {CONFIG}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise CheckpointError("it is not a JSON object")
        return ModelInfo.from_dict(values)
    except (FmrizooError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


class Weights(Mapping[str, Tensor]):
    """Tensors of a safetensors file: each is read when it is asked for, and not kept.

    Attributes:
        shapes: By name; nothing is read for them.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        from safetensors import safe_open

        self._path, self._prefix = path, prefix
        self._file = cast(Any, safe_open(path, framework="pt"))
        every: list[str] = self._file.keys()
        names = [name for name in every if name.startswith(prefix)]
        self.shapes = {
            name.removeprefix(prefix): tuple(self._file.get_slice(name).get_shape())
            for name in names
        }

    def within(self, prefix: str) -> Weights:
        """Those whose names begin with ``prefix``, by what follows it."""
        return Weights(self._path, self._prefix + prefix)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(self._prefix + name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read_model(folder: Path) -> tuple[dict[str, Tensor], ModelInfo]:
    """All weights, and the info, that :func:`save_model` wrote (see :func:`open_model`)."""
    weights, info = open_model(folder)
    return dict(weights), info


def open_model(folder: Path) -> tuple[Weights, ModelInfo]:
    """Weights, which are not read yet, and info that :func:`save_model` wrote.

    Raises:
        CheckpointError: a file is missing or unreadable, or the weights are not those that the
            config was written with.
    """
    info = read_info(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}")
    if (found := sha256_of(path)) != info.sha256:
        raise CheckpointError(
            f"{path} is damaged or belongs to another {CONFIG}: its SHA-256 is {found[:12]}…, "
            f"{CONFIG} says {info.sha256[:12]}…; copy or export the model again"
        )
    return Weights(path), info


def check_contract(expected: Contract | None, found: Contract, model: Path, data: Path) -> None:
    """Refuse data that were preprocessed in another way than a model expects.

    Args:
        expected: The model's (None: it was saved without one).
        found: Of the data, with the normalisation that is applied at load.
        model, data: Where they are, for the message.

    Raises:
        CheckpointError: no contract, or one that differs.
    """
    if expected is None:
        raise CheckpointError(f"{model} carries no preprocessing contract")
    if differences := expected.differences(found):
        raise CheckpointError(
            f"the model in {model} was trained on data preprocessed in another way than "
            f"{data}: {'; '.join(differences)}"
        )
