"""``fmrizoo doctor``: is this machine ready, and what is to be done where it is not.

:func:`examine` gathers what is there and hands it to the checks, which are functions of values.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from fmrizoo.cluster.doctor import compute, machine, software
from fmrizoo.cluster.doctor.line import STATES as STATES
from fmrizoo.cluster.doctor.line import Line as Line

SHM = Path("/dev/shm")


def examine(store: Path | None = None, out: Path | None = None) -> list[Line]:
    """Every check, in the order of the table.

    Args:
        store: A store to look at too.
        out: Where runs would be written; None: the working folder.
    """
    env = dict(os.environ)
    bounds, required = software.declared()
    lines = [software.python(bounds, software.python_version())]
    lines += software.packages(required, software.installed)
    found = compute.look_at_torch(cpu_flags(Path("/proc/cpuinfo")))
    lines.append(compute.imports(found))
    if not isinstance(found, str):  # without PyTorch the rest of these could only fail with it
        lines += _computing(found, env)
        lines += _package()
    lines += [software.fast_libraries(software.installed)]
    lines += software.extras(required, software.installed)
    lines += _machine(store, out or Path.cwd(), env)
    return lines


def worst(lines: list[Line]) -> str:
    """The gravest state among them."""
    return max((line.state for line in lines), key=STATES.index, default="ok")


def cpu_flags(file: Path) -> frozenset[str]:
    """Features of the CPU from ``/proc/cpuinfo``; empty where there is no such file."""
    if not file.is_file():
        return frozenset()
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, words = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return frozenset()


def _computing(found: compute.Torch, env: Mapping[str, str]) -> list[Line]:
    from fmrizoo.backbones.mamba2_kernels import KERNELS

    asked = env.get("DS_ACCELERATOR", "")
    kind = compute.chosen(found, asked)
    # Nothing as sure for xpu: /dev/dri is there for every display too.
    nodes = {"cuda": Path("/dev/nvidiactl").exists()}
    probes = {
        name: software.probe(f"import {name}; print(1)", env) if find_spec(name) else None
        for name in KERNELS
    }
    launched, ranks = compute.launcher(env)
    allowed, quota = _cores()
    usable = float(allowed) if quota is None else min(quota, allowed)
    return [
        compute.device(found, asked, nodes),
        compute.cpu_kernels(found, platform.machine()),
        compute.bf16(found, kind),
        machine.cores(allowed, quota),
        compute.threads(found.threads, usable, ranks),
        compute.waiting(env.get("OMP_WAIT_POLICY", "")),
        launched,
        # As training does it: fmrizoo tells DeepSpeed the device.
        software.deepspeed(
            software.probe(software.ASK_DEEPSPEED, {**env, "DS_ACCELERATOR": kind}), kind
        ),
        software.mamba(probes, kind),
    ]


def _package() -> list[Line]:
    from fmrizoo import zoo
    from fmrizoo.data.sample import sample_path

    counts = {
        "backbones": len(zoo.list_backbones()),
        "objectives": len(zoo.list_objectives()),
        "heads": len(zoo.list_heads()),
    }
    return software.integrity(len(zoo.list_recipes()), counts, sample_path().exists())


def _machine(store: Path | None, out: Path, env: Mapping[str, str]) -> list[Line]:
    lines = []
    if find_spec("h5py"):
        import h5py

        version = h5py.version
        locks = env.get("HDF5_USE_FILE_LOCKING")
        lines.append(software.hdf5(version.version, version.hdf5_version, locks))
    if store is not None:
        lines.append(machine.store(store))
        lines.append(machine.store_disk(machine.look_at_disk(store)))
    lines.append(machine.output(machine.look_at_disk(out)))
    for place in dict.fromkeys([store, out]):
        where = machine.look_at_disk(place) if place is not None else ""
        if isinstance(where, machine.Disk):  # what cannot be looked at has its line already
            lines.append(machine.locking(where.path, machine.try_lock(where.path)))
    usage = shutil.disk_usage(SHM) if SHM.is_dir() else None
    lines.append(machine.shared_memory(usage and usage.free, usage.total if usage else 0))
    lines.append(machine.open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)))
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines.append(machine.memory(installed, machine.memory_limit(_groups())))
    return lines


def _groups() -> str:
    file = Path("/proc/self/cgroup")
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _cores() -> tuple[int, float | None]:
    """(cores this process may run on, a quota of them)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return allowed or 1, machine.cpu_quota(_groups())
