"""Which device, which rank, and how the ranks find each other."""

from __future__ import annotations

import logging
import os
import random
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmrizoo.errors import INTERRUPTED, TrainingError

log = logging.getLogger(__name__)

# Launchers from the most to the least specific: (what it is, rank, sizes, local rank candidates).
# MPI launchers come before SLURM because `mpirun` inside a SLURM job leaves the batch shell's
# SLURM_PROCID=0 in the environment of every rank. PALS by itself comes after SLURM: srun on Cray
# systems sets its PALS_RANKID too, and PALS tells no rank how many there are.
_LAUNCHERS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("torchrun or deepspeed", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK",)),
    (
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ),
    (
        "MVAPICH2",
        "MV2_COMM_WORLD_RANK",
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
    ),
    (
        "PMI",
        "PMI_RANK",
        ("PMI_SIZE",),
        ("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
    ),
    ("SLURM", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",)),
    ("PALS", "PALS_RANKID", ("WORLD_SIZE",), ("PALS_LOCAL_RANKID",)),
)
# SLURM_STEP_ID of what is no job step of srun: interactive (salloc's shell), batch, extern.
_NO_STEPS = ("4294967290", "4294967291", "4294967292")


@dataclass(frozen=True)
class World:
    """This process among those of the job.

    Attributes:
        rank: 0 .. size - 1 over all nodes.
        size: Processes of the job.
        local_rank: 0 .. on this node; picks the device.
        launcher: Who said so (for messages).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "single process"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or self.local_rank < 0:
            raise TrainingError(
                f"{self.launcher} says rank {self.rank} (local {self.local_rank}) of {self.size} "
                f"processes, which cannot be; check its environment variables"
            )

    @property
    def main(self) -> bool:
        """True on the one rank that writes files and reports."""
        return self.rank == 0


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise TrainingError(f"environment variable {name}={env[name]!r} is not a number") from None


def discover(env: Mapping[str, str] | None = None) -> World:
    """Find this process's rank from its launcher's environment.

    Known: torchrun and the deepspeed launcher (``RANK`` …), Open MPI, MVAPICH2, PMI (``mpiexec``
    of MPICH and Intel MPI), PALS (Cray's ``mpiexec``, as on Aurora; without PMI variables it needs
    ``WORLD_SIZE``), SLURM's ``srun``. Nothing of these: one process.

    Raises:
        TrainingError: a launcher's variables are incomplete or contradict.
    """
    env = os.environ if env is None else env
    for launcher, rank, sizes, locals_ in _LAUNCHERS:
        size = next((name for name in sizes if name in env), None)
        if rank not in env or (size is None and launcher != "PALS"):
            continue
        if size is None:
            # Each rank would take itself for the only one and write the same run folder.
            raise TrainingError(
                f"{launcher} gave {rank}={env[rank]} but not the number of processes: "
                f"export WORLD_SIZE (nodes × processes a node) before mpiexec"
            )
        if launcher == "SLURM" and _is_shell(env):
            continue
        world_size = _number(env, size)
        local = next((name for name in locals_ if name in env), None)
        if world_size == 1 and _number(env, rank) == 0:
            return World(local_rank=_number(env, local) if local else 0)
        if local is None:
            raise TrainingError(
                f"{launcher} gave {rank} and {size} but none of {', '.join(locals_)}: "
                f"set {locals_[0]} to the process's number on its node"
            )
        return World(_number(env, rank), world_size, _number(env, local), launcher)
    return World()


def _is_shell(env: Mapping[str, str]) -> bool:
    """An interactive shell in an allocation: SLURM's variables are there, but no ``srun``."""
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    in_step = step is not None and step not in _NO_STEPS
    # `salloc` names the job "interactive", and an srun in it is a step of several ranks all the
    # same. `srun --pty bash` names it "bash", and its shell is step 0.
    name = env.get("SLURM_JOB_NAME")
    if (name == "interactive" and not in_step) or (name == "bash" and step in (None, "0")):
        return True
    if step in _NO_STEPS[:1]:
        return True
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS"))
    if not in_step and env["SLURM_PROCID"] == "0" and tasks not in (None, "", "1"):
        log.warning(
            "SLURM_NTASKS=%s without a job step: if the start hangs here waiting for the other "
            "ranks, start the command with srun",
            tasks,
        )
    return False


def resolve_device(name: str, world: World) -> torch.device:
    """The device of this rank.

    Args:
        name: ``auto`` (an accelerator if there is one, else cpu), ``cpu``, ``cuda`` or ``xpu``;
            ``DS_ACCELERATOR`` decides for ``auto`` when it is set.
        world: Its local rank picks among the node's devices.

    Raises:
        TrainingError: the device is not there, or a node has fewer devices than ranks.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "cpu": True,
    }
    if name == "auto":
        asked = os.environ.get("DS_ACCELERATOR", "")
        name = asked or next(kind for kind, there in present.items() if there)
    if not present.get(name, False):
        raise TrainingError(
            f"train.device={name} but this PyTorch ({torch.__version__}) sees no such device; "
            f"use train.device=auto or cpu"
        )
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if name == "cuda" else torch.xpu.device_count()
    # A launcher that shows each rank only its own device leaves exactly one, numbered 0.
    index = 0 if count == 1 else world.local_rank
    if index >= count:
        raise TrainingError(
            f"local rank {world.local_rank} has no {name} device: the node shows {count}; "
            f"start at most {count} processes per node"
        )
    return torch.device(name, index)


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy and PyTorch (all devices), differently on each rank."""
    mixed = (seed * 1_000_003 + rank) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of every generator that training may draw from, as plain types and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = getattr(torch, device.type).get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of :func:`rng_state`."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state["device"], device)


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for ``device``, with its own log going through :mod:`logging`.

    Raises:
        TrainingError: DeepSpeed was already set up for another kind of device in this process.
    """
    # Chosen at its first import and then fixed; without this a machine with a GPU ignores `cpu`.
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed

    # DeepSpeed 0.19 still calls two collectives by the names that torch 2.14 renames. The filter is
    # set here, at every use, because test runners forget filters between tests.
    for old in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings(
            "ignore", rf"`torch\.distributed\.{old}` is deprecated", category=FutureWarning
        )
    found = deepspeed.get_accelerator().device_name()
    if found.split(":")[0] != device.type:
        raise TrainingError(
            f"DeepSpeed already runs on {found} in this process, cannot switch to {device.type}; "
            f"start a new process"
        )
    chatter = logging.getLogger("DeepSpeed")
    if not chatter.propagate:
        # Its handler prints to stdout, where the command line prints results.
        for handler in list(chatter.handlers):
            chatter.removeHandler(handler)
        chatter.propagate = True
        chatter.setLevel(logging.WARNING)
    from deepspeed.runtime import bf16_optimizer

    # Its constructor prints a memory report straight to stdout, whatever the log level.
    bf16_optimizer.see_memory_usage = _silent
    _skip_shm_op(deepspeed)
    return deepspeed


def _silent(message: str, force: bool = False) -> None:
    """Stands in for DeepSpeed's ``see_memory_usage``."""


def _skip_shm_op(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce (needs g++ and about a minute).

    Only its inference engine calls that operation; training uses gloo. The table of operations is
    put in place without being filled, for nothing else reads it: filling it runs the linker, which
    complains on stderr about every library that is not there.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def init_distributed(world: World, device: torch.device, *, timeout_minutes: float = 30.0) -> None:
    """Let the ranks of ``world`` find each other; a second call does nothing.

    One process needs no address: it meets itself in memory. Several take
    ``MASTER_ADDR``/``MASTER_PORT``, or find the first node from SLURM's or PBS's list of nodes.

    Raises:
        TrainingError: the address of rank 0 is unknown, or the job has another size than the
            process group that exists already.
    """
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, missing in __all__

    deepspeed = load_deepspeed(device)
    # DeepSpeed reads these from the environment and asks MPI for them when they are missing.
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.rank), str(world.size)
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    if device.type != "cpu":
        getattr(torch, device.type).set_device(device)
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.size):
            raise TrainingError(
                f"torch.distributed already runs as rank {dist.get_rank()} of "
                f"{dist.get_world_size()}, not {world.rank} of {world.size}"
            )
        method = None
    elif world.size == 1:
        dist.init_process_group(
            deepspeed.get_accelerator().communication_backend_name(),
            store=HashStore(),
            rank=0,
            world_size=1,
        )
        method = None
    else:
        address, port = rendezvous(os.environ, world)
        method = f"tcp://{address}:{port}"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            method = "env://"  # torchrun's agent already listens there
    deepspeed.init_distributed(
        dist_backend=deepspeed.get_accelerator().communication_backend_name(),
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=timeout_minutes),
        init_method=method,
        rank=world.rank,
        world_size=world.size,
    )


def end_rank(code: int, *, together: bool = True) -> None:
    """End this process now if it is one of several ranks; return otherwise.

    ``together=False``: not all ranks are there any more, so none may be waited for.

    The process group's threads can outlive the interpreter: a rank that has done its work then ends
    with SIGABRT, and its launcher calls the whole job failed. So a rank leaves without taking the
    interpreter down piece by piece.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if together and code in (0, INTERRUPTED):
        # All ranks are here: none may close its connections while another still talks to it, and
        # none may end before rank 0 has: launchers kill the others of a rank that ends with 75.
        dist.barrier()
        dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rendezvous(env: Mapping[str, str], world: World) -> tuple[str, int]:
    """Host name and port on which rank 0 listens.

    Raises:
        TrainingError: nothing in the environment tells the host.
    """
    address = env.get("MASTER_ADDR") or _first_node(env)
    if address is None:
        raise TrainingError(
            f"{world.launcher} started {world.size} processes but not where rank 0 runs: set "
            f"MASTER_ADDR to the host name of the first node"
        )
    if "MASTER_PORT" in env:
        return address, _number(env, "MASTER_PORT")
    # The same on every rank and different between jobs that share a node.
    job = re.search(r"\d+", env.get("SLURM_JOB_ID") or env.get("PBS_JOBID") or "0")
    return address, 20_000 + int(job.group() if job else 0) % 20_000


def _first_node(env: Mapping[str, str]) -> str | None:
    if nodes := env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST"):
        return first_host(nodes)
    if (listed := env.get("PBS_NODEFILE")) and Path(listed).is_file():
        lines = Path(listed).read_text().split()
        return lines[0] if lines else None
    local, size = env.get("OMPI_COMM_WORLD_LOCAL_SIZE"), env.get("OMPI_COMM_WORLD_SIZE")
    local = local or env.get("PALS_LOCAL_SIZE") or env.get("MPI_LOCALNRANKS")
    size = size or env.get("PMI_SIZE")
    return "127.0.0.1" if local is not None and local == size else None


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: ``gpu[003-007,9],login1`` → ``gpu003``."""
    name = ""
    for part in re.split(r"(\[[^\]]*\])", nodes):
        if part.startswith("["):
            name += re.split(r"[,-]", part[1:-1])[0]
        else:
            name += part.split(",")[0]
            if "," in part:
                break
    return name


def environment() -> dict[str, Any]:
    """Versions and machine, for ``env.json``."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {}
    for package in ("fmrizoo", "torch", "deepspeed", "numpy", "h5py", "nibabel", "nilearn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "argv": list(sys.argv),
        "threads": torch.get_num_threads(),
    }
