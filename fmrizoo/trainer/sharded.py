"""Weights and optimizer state in files that any number of ranks and any ZeRO stage can read.

Each rank writes the parts it holds (:mod:`fmrizoo.trainer.fragments`) into a safetensors file of
its own, ``shard-00003.safetensors``, tensors named ``kind:name``. ``tensors.json`` says which
elements of which tensor are in which shard. Nothing here knows DeepSpeed.

``tensors.json``: ``{"schema", "ranks", "optimizer_steps", "tensors": {name: {"shape": [...],
"trained": bool, "aliases": [name], "kinds": {kind: dtype}, "parts": [[shard, start, numel],
...]}}}``. Parts of equal size that follow the shards' numbers (ZeRO 3) are written as one number,
``"every": size``: the list would have a line for each tensor and rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fmrizoo.errors import CheckpointError
from fmrizoo.trainer.fragments import WEIGHT, Fragment

INDEX = "tensors.json"
SCHEMA = "fmrizoo.sharded/1"

Part = tuple[int, int, int]  # shard, first element, elements


def shard_name(rank: int) -> str:
    """File name of one rank's shard."""
    return f"shard-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """A rank's parts, copied out of the training's way.

    Attributes:
        tensors: ``kind:name`` → ``(numel,)`` on the CPU.
        places: Name → start, numel, shape, trained, aliases, kinds; plain JSON.
        bytes: Of all tensors.
    """

    tensors: dict[str, Tensor]
    places: dict[str, dict[str, Any]]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def take(parts: Iterable[Fragment]) -> Snapshot:
    """Copy ``parts`` to the CPU."""
    tensors, places = {}, {}
    for part in parts:
        kinds = {}
        for kind, value in part.tensors.items():
            tensors[f"{kind}:{part.name}"] = value.detach().to("cpu", copy=True).contiguous()
            kinds[kind] = str(value.dtype).removeprefix("torch.")
        places[part.name] = {
            "start": part.start,
            "numel": part.numel,
            "shape": list(part.shape),
            "trained": part.trained,
            "aliases": list(part.aliases),
            "kinds": kinds,
        }
    return Snapshot(tensors, places)


def write_shard(path: Path, snapshot: Snapshot) -> None:
    """Write one rank's file (not atomically: the folder around it is published as a whole)."""
    from safetensors.torch import save_file

    save_file(snapshot.tensors, path, metadata={"format": "pt"})


def index_of(places: Mapping[int, dict[str, dict[str, Any]]], steps: int) -> dict[str, Any]:
    """Content of ``tensors.json`` from the ``places`` of all ranks.

    Raises:
        CheckpointError: parts that overlap, leave a gap or contradict: no such checkpoint may be
            published.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for rank, named in sorted(places.items()):
        for name, place in named.items():
            facts = {key: place[key] for key in ("shape", "trained", "aliases", "kinds")}
            known = tensors.setdefault(name, {**facts, "parts": []})
            if any(known[key] != value for key, value in facts.items()):
                raise CheckpointError(f"ranks do not agree on what {name} is")
            known["parts"].append([rank, place["start"], place["numel"]])
    for name, facts in tensors.items():
        parts = facts["parts"]
        _check_cover(name, facts["shape"], parts)
        size, whole = parts[0][2], torch.Size(facts["shape"]).numel()
        # All of that size but the last, which holds the rest and no more.
        if len(parts) > 1 and all(
            start == rank * size and numel == min(size, whole - start)
            for rank, start, numel in parts
        ):
            del facts["parts"]
            facts["every"] = size
    return {
        "schema": SCHEMA,
        "ranks": len(places),
        "optimizer_steps": steps,
        "tensors": tensors,
    }


def _check_cover(name: str, shape: list[int], parts: list[list[int]]) -> None:
    at = 0
    for _, start, numel in sorted(parts, key=lambda part: part[1]):
        if start != at:
            raise CheckpointError(
                f"elements {min(at, start)} to {max(at, start) - 1} of {name} are held by "
                f"{'no rank' if start > at else 'two ranks'}"
            )
        at += numel
    if at != (whole := torch.Size(shape).numel()):
        raise CheckpointError(f"the ranks hold {at} elements of {name}, which has {whole}")


class Sharded:
    """Reader of a checkpoint's tensors; only what is asked for is read.

    Raises:
        CheckpointError: no index, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if index["schema"] != SCHEMA:
                raise CheckpointError(f"{folder / INDEX} is {index['schema']}, not {SCHEMA}")
            self.ranks, self.steps = int(index["ranks"]), int(index["optimizer_steps"])
            self.tensors: dict[str, dict[str, Any]] = index["tensors"]
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} holds no {INDEX}: it was written by an earlier version of fmrizoo; "
                f"start a new run with init_from, or go on with that version"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX} is unreadable: {error!r}") from None
        self._open: dict[int, Any] = {}
        self._files = ExitStack()

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of shared parameters → the name that their values are kept under."""
        return {other: name for name, facts in self.tensors.items() for other in facts["aliases"]}

    def kinds(self, name: str) -> dict[str, str]:
        """Kind → dtype of what is kept of a tensor."""
        return dict(self.tensors[name]["kinds"])

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.tensors[name]["shape"])

    def _parts(self, name: str) -> Iterable[Part]:
        facts = self.tensors[name]
        if "every" not in facts:
            return [cast(Part, tuple(part)) for part in facts["parts"]]
        size, whole = facts["every"], torch.Size(facts["shape"]).numel()
        return [(at // size, at, min(size, whole - at)) for at in range(0, whole, size)]

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements ``start`` … ``start + numel - 1`` of a flattened tensor, ``(numel,)``."""
        pieces = []
        for shard, first, count in self._parts(name):
            low, high = max(start, first), min(start + numel, first + count)
            if low < high:
                stored = self._shard(shard).get_slice(f"{kind}:{name}")
                pieces.append((low, stored[low - first : high - first]))
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])])

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A whole tensor in its shape."""
        shape = torch.Size(self.shape(name))
        if not shape.numel():
            return torch.empty(shape, dtype=getattr(torch, self.kinds(name)[kind]))
        return self.read(name, kind, 0, shape.numel()).view(shape)

    def _shard(self, number: int) -> Any:
        from safetensors import SafetensorError, safe_open

        if number not in self._open:
            path = self.folder / shard_name(number)
            try:
                self._open[number] = self._files.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        return self._open[number]

    def close(self) -> None:
        """Let go of the files."""
        self._open.clear()
        self._files.close()

    def __enter__(self) -> Sharded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self, parts: Iterable[Fragment]) -> None:
        """Copy the stored values into ``parts`` of a model (:meth:`check_model` before)."""
        for part in parts:
            for kind, into in part.tensors.items():
                if kind not in self.kinds(part.name):
                    raise CheckpointError(
                        f"{self.folder} does not fit this model: it holds no {kind} of {part.name}"
                    )
                into.copy_(self.read(part.name, kind, part.start, part.numel))

    def check_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a model with other tensors than those stored.

        Args:
            shapes: Of all parameters and buffers of the model.

        Raises:
            CheckpointError: names or shapes differ (the first difference is named).
        """
        wrong = [f"it holds no {name}" for name in shapes if name not in self.tensors]
        wrong += [f"the model has no {name}" for name in self.tensors if name not in shapes]
        wrong += [
            f"{name} is {list(self.shape(name))} there and {list(shape)} in the model"
            for name, shape in shapes.items()
            if name in self.tensors and self.shape(name) != tuple(shape)
        ]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise CheckpointError(f"{self.folder} does not fit this model: {wrong[0]}{more}")
