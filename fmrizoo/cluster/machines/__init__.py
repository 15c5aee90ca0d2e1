"""Descriptions of clusters: how much memory, how fast, over which links.

A description is a YAML file; ``aurora``, ``frontier``, ``perlmutter`` and ``laptop`` are shipped.
Every number in them says where it comes from: declared, measured, fitted or assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fmrizoo.errors import RecipeError

SHIPPED = Path(__file__).parent
ALGORITHMS = ("ring", "tree")
DEVICES = ("cpu", "gpu")


@dataclass(frozen=True)
class Machine:
    """A cluster of equal nodes.

    Attributes:
        name: For the tables.
        device: ``cpu`` or ``gpu`` (any accelerator).
        ranks_per_node: One rank a device.
        device_memory, device_base: Bytes of a device, and those of them that are not for tensors.
        peak_flops: FLOP/s of a device by precision.
        efficiency: Share of the peak that training reaches, by precision.
        intra_bandwidth, intra_latency: Of a rank to its neighbour in the node, bytes/s and s a hop.
        inter_bandwidth, inter_latency: Of a node to the others, bytes/s and s a hop.
        inter_efficiency: Share of ``inter_bandwidth`` that collectives reach.
        inter_algorithm: ``ring`` or ``tree``: how an all-reduce crosses the nodes.
        host_memory, host_bandwidth: Bytes of a node, bytes/s of a rank to it (offload).
        storage_bandwidth, storage_opens: Of the file system, for all nodes together.
    """

    name: str
    device: str
    ranks_per_node: int
    device_memory: float
    device_base: float
    peak_flops: Mapping[str, float]
    efficiency: Mapping[str, float]
    intra_bandwidth: float
    intra_latency: float
    inter_bandwidth: float
    inter_efficiency: float
    inter_latency: float
    inter_algorithm: str
    host_memory: float
    host_bandwidth: float
    storage_bandwidth: float
    storage_opens: float

    def rate(self, precision: str) -> float:
        """FLOP/s that a rank reaches."""
        return self.peak_flops[precision] * self.efficiency[precision]


def shipped() -> list[str]:
    """Names of the descriptions that come with fmrizoo."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_machine(name: str | Path) -> Machine:
    """A shipped description, or that of a YAML file.

    Raises:
        RecipeError: there is none, or a key is missing, unknown or no positive number.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{name}.yaml"
        if str(name) not in shipped():
            raise RecipeError(
                f"unknown cluster {str(name)!r}: give one of {', '.join(shipped())}, or a "
                ".yaml file"
            )
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path} is no YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise RecipeError(f"{path} describes no cluster: it must be a YAML mapping")
    return _machine({str(key): value for key, value in found.items()}, path)


def _machine(found: dict[str, Any], path: Path) -> Machine:
    known = [field.name for field in fields(Machine)]
    if missing := [key for key in known if key not in found]:
        raise RecipeError(
            f"{path} lacks {', '.join(missing)}: a cluster is described by all of them"
        )
    if unknown := sorted(set(found) - set(known)):
        raise RecipeError(f"{path} has keys that no cluster has: {', '.join(map(str, unknown))}")
    values = dict(found)
    for key in ("peak_flops", "efficiency"):
        given = values[key] if isinstance(values[key], dict) else dict.fromkeys(_WORDS, values[key])
        if set(given) != set(_WORDS):
            raise RecipeError(f"{path}: {key} needs a number for {' and '.join(_WORDS)}")
        values[key] = {word: _number(path, key, given[word]) for word in _WORDS}
    for key in known:
        if key not in ("name", "device", "inter_algorithm", "peak_flops", "efficiency"):
            values[key] = _number(path, key, values[key])
    for key, allowed in (("device", DEVICES), ("inter_algorithm", ALGORITHMS)):
        if values[key] not in allowed:
            raise RecipeError(f"{path}: {key} is one of {', '.join(allowed)}, got {values[key]!r}")
    if values["ranks_per_node"] != int(values["ranks_per_node"]):
        raise RecipeError(
            f"{path}: ranks_per_node is a whole number, got {values['ranks_per_node']}"
        )
    return Machine(**{**values, "ranks_per_node": int(values["ranks_per_node"])})


_WORDS = ("bf16", "fp32")


def _number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise RecipeError(f"{path}: {key} must be a number above 0, got {value!r}")
    return float(value)
