"""Checks of what computes: PyTorch, its device, threads, and who started this process."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from fmrizoo.cluster.doctor.line import Line, broken, ok, warning

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, ARM


@dataclass(frozen=True)
class Torch:
    """What PyTorch says of itself.

    Attributes:
        version: Its own.
        built: What it was built for: ``cuda 13.0``, ``cpu`` …
        devices: Devices it sees: ``{"cuda": 4, "xpu": 0}``.
        bf16: Kinds of device among those that compute in bf16.
        capability: Instructions its CPU kernels use: ``DEFAULT``, ``AVX2``, ``AVX512`` …
        threads: That one operation uses.
    """

    version: str
    built: str
    devices: Mapping[str, int]
    bf16: frozenset[str]
    capability: str
    threads: int


def look_at_torch(cpu_flags: frozenset[str]) -> Torch | str:
    """What PyTorch says of itself, or why it cannot be imported."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    devices = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
    }
    able = {"cpu"} if cpu_flags & BF16_FLAGS else set()
    able |= {"cuda"} if devices["cuda"] and torch.cuda.is_bf16_supported() else set()
    able |= {"xpu"} if devices["xpu"] else set()
    kinds = {"cuda": torch.version.cuda, "rocm": torch.version.hip, "xpu": torch.version.xpu}
    built = [f"{kind} {version}" for kind, version in kinds.items() if version]
    return Torch(
        torch.__version__,
        ", ".join(built) or "cpu",
        devices,
        frozenset(able),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
    )


def chosen(found: Torch, asked: str) -> str:
    """The kind of device that ``train.device=auto`` takes; ``asked`` is ``DS_ACCELERATOR``."""
    return asked or next((kind for kind, count in found.devices.items() if count), "cpu")


def imports(found: Torch | str) -> Line:
    """Does PyTorch import."""
    if isinstance(found, str):
        fix = "pip install --force-reinstall 'torch>=2.6'"
        return broken("PyTorch", f"cannot be imported: {found}", fix)
    return ok("PyTorch", f"{found.version}, built for {found.built}")


def device(found: Torch, asked: str, hardware: Mapping[str, bool]) -> Line:
    """Which device training takes.

    Args:
        found: PyTorch.
        asked: ``DS_ACCELERATOR``.
        hardware: Is there a device node of the system's driver, by kind.
    """
    kind, name = chosen(found, asked), "device"
    if kind not in ("cpu", *found.devices):
        return broken(name, f"DS_ACCELERATOR={kind} is unknown", "unset DS_ACCELERATOR")
    if kind != "cpu":
        if not found.devices[kind]:
            return broken(name, f"DS_ACCELERATOR={kind}, none is seen", "unset DS_ACCELERATOR")
        return ok(name, f"{kind}, {found.devices[kind]} on this node")
    for other, count in found.devices.items():
        if count:
            said = f"cpu by DS_ACCELERATOR, though there are {count} {other}"
            return warning(name, said, "unset DS_ACCELERATOR")
        if hardware.get(other) and not asked:
            said = f"cpu: a device of {other} is here but PyTorch (built for {found.built}) "
            fix = f"install a PyTorch built for {other} and this driver (pytorch.org)"
            return warning(name, said + "sees none", fix)
    return ok(name, "cpu")


def cpu_kernels(found: Torch, machine: str) -> Line:
    """Vector instructions of PyTorch's CPU kernels."""
    name = "CPU instructions"
    if found.capability in ("DEFAULT", "NO AVX") and machine == "x86_64":
        fix = "unset ATEN_CPU_CAPABILITY, or use a machine with AVX2"
        return warning(name, f"{found.capability}: no AVX2, several times slower", fix)
    return ok(name, found.capability)


def bf16(found: Torch, kind: str) -> Line:
    """Does the device compute in bf16; else it is emulated."""
    if kind in found.bf16:
        return ok("bf16", f"native on {kind}")
    said = f"emulated on {kind}: right, but slower than fp32"
    return warning("bf16", said, "train.precision=fp32")


def threads(count: int, cores: float, local_ranks: int) -> Line:
    """PyTorch's threads of all ranks of the node against its cores.

    Args:
        count: Threads of one rank.
        cores: That the node's processes may use (a quota can make it a fraction).
        local_ranks: Ranks of this node.
    """
    name = "threads"
    said = f"{count} × {local_ranks} ranks on {cores:g} cores"
    if count * local_ranks > max(1.0, cores):
        fix = f"export OMP_NUM_THREADS={max(1, int(cores / local_ranks))}"
        return warning(name, f"{said}: they take turns", fix)
    return ok(name, said)


def waiting(policy: str) -> Line:
    """``OMP_WAIT_POLICY``: how threads without work wait."""
    if policy.lower() == "passive":
        return ok("OMP_WAIT_POLICY", policy)
    said = f"{policy or 'not set'}: waiting threads spin"
    return warning("OMP_WAIT_POLICY", said, "export OMP_WAIT_POLICY=passive")


def launcher(env: Mapping[str, str]) -> tuple[Line, int]:
    """Who this process is among the ranks, and how many ranks the node has."""
    from fmrizoo.errors import TrainingError
    from fmrizoo.trainer.device import discover, rendezvous

    name = "launcher"
    try:
        world = discover(env)
    except TrainingError as error:
        fix = "start with torchrun, srun or mpiexec, or unset the variable named"
        return broken(name, str(error), fix), 1
    if world.size == 1:
        tasks = env.get("SLURM_NTASKS", "1")
        if "SLURM_JOB_ID" in env and tasks not in ("", "1"):
            said = f"one process, in a SLURM allocation for {tasks}"
            return warning(name, said, "start the command with srun"), 1
        return ok(name, "one process"), 1
    try:
        address, port = rendezvous(env, world)
    except TrainingError as error:
        fix = "export MASTER_ADDR=<host name of the first node>"
        return broken(name, str(error), fix), _local_ranks(env)
    said = f"{world.launcher}, rank {world.rank} of {world.size}, rank 0 at {address}:{port}"
    return ok(name, said), _local_ranks(env)


def _local_ranks(env: Mapping[str, str]) -> int:
    """Ranks of this node as the launcher tells; 1 where it does not."""
    names = (
        "LOCAL_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "PALS_LOCAL_SIZE",
        "MPI_LOCALNRANKS",
        "SLURM_NTASKS_PER_NODE",
    )
    told = next((env[name] for name in names if env.get(name, "").isdigit()), "1")
    return max(1, int(told))
