"""Every line of the doctor, on machines that are described to it, and on this one."""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fmrizoo.cli import app
from fmrizoo.cluster import doctor
from fmrizoo.cluster.doctor import compute, machine, software
from fmrizoo.cluster.doctor.compute import Torch
from fmrizoo.cluster.doctor.line import Line, broken, ok, warning
from fmrizoo.cluster.doctor.machine import Disk
from fmrizoo.cluster.doctor.software import Probe
from fmrizoo.data import store as store_module
from fmrizoo.data.sample import sample_path

CPU = Torch("2.14.1", "cpu", {"cuda": 0, "xpu": 0}, frozenset({"cpu"}), "AVX2", 2)
GPU = replace(CPU, built="cuda 13.0", devices={"cuda": 4, "xpu": 0}, bf16=frozenset({"cuda"}))
NONE: Mapping[str, bool] = {}
GB = 10**9
DISK = Disk(Path("/data"), 100 * GB, 10**6, False, True)


def test_a_line_has_a_fix_exactly_when_it_is_not_ok() -> None:
    with pytest.raises(ValueError, match="is broken and its fix is ''"):
        Line("x", "broken", "y")
    with pytest.raises(ValueError, match="is ok and its fix is 'do'"):
        Line("x", "ok", "y", "do")
    with pytest.raises(ValueError, match="'bad'"):
        Line("x", "bad", "y", "do")


def test_the_worst_line_decides() -> None:
    lines = [ok("a", "b"), broken("a", "b", "c"), warning("a", "b", "c")]
    assert doctor.worst(lines) == "broken" and doctor.worst(lines[::2]) == "warning"
    assert doctor.worst([]) == doctor.worst(lines[:1]) == "ok"


# Every line that is not ok: (line, its state, what it says, its fix).
FAULTS = {
    "python": (
        software.python(">=3.11", "3.10.4"),
        "broken",
        "3.10.4, needs >=3.11",
        "make an environment with Python 3.12",
    ),
    "torch": (
        compute.imports("libcudart.so.13: cannot open shared object file"),
        "broken",
        "cannot be imported: libcudart.so.13",
        "pip install --force-reinstall 'torch>=2.6'",
    ),
    "device unknown": (
        compute.device(CPU, "tpu", NONE),
        "broken",
        "DS_ACCELERATOR=tpu is unknown",
        "unset DS_ACCELERATOR",
    ),
    "device not there": (
        compute.device(CPU, "cuda", NONE),
        "broken",
        "DS_ACCELERATOR=cuda, none is seen",
        "unset DS_ACCELERATOR",
    ),
    "device unused": (
        compute.device(GPU, "cpu", NONE),
        "warning",
        "though there are 4 cuda",
        "unset DS_ACCELERATOR",
    ),
    "device unseen": (
        compute.device(CPU, "", {"cuda": True}),
        "warning",
        "a device of cuda is here but PyTorch (built for cpu) sees none",
        "install a PyTorch built for cuda and this driver (pytorch.org)",
    ),
    "no AVX2": (
        compute.cpu_kernels(replace(CPU, capability="DEFAULT"), "x86_64"),
        "warning",
        "DEFAULT: no AVX2",
        "unset ATEN_CPU_CAPABILITY, or use a machine with AVX2",
    ),
    "bf16": (
        compute.bf16(replace(CPU, bf16=frozenset()), "cpu"),
        "warning",
        "emulated on cpu",
        "train.precision=fp32",
    ),
    "threads": (
        compute.threads(8, 16, 4),
        "warning",
        "8 × 4 ranks on 16 cores",
        "export OMP_NUM_THREADS=4",
    ),
    "threads of a fraction": (
        compute.threads(2, 0.5, 1),
        "warning",
        "on 0.5 cores",
        "export OMP_NUM_THREADS=1",
    ),
    "waiting": (
        compute.waiting("ACTIVE"),
        "warning",
        "ACTIVE: waiting threads spin",
        "export OMP_WAIT_POLICY=passive",
    ),
    "waiting, not set": (
        compute.waiting(""),
        "warning",
        "not set",
        "export OMP_WAIT_POLICY=passive",
    ),
    "launcher": (
        compute.launcher({"PMI_RANK": "1", "PMI_SIZE": "4"})[0],
        "broken",
        "PMI gave PMI_RANK and PMI_SIZE but none of PALS_LOCAL_RANKID",
        "start with torchrun, srun or mpiexec, or unset the variable named",
    ),
    "launcher's address": (
        compute.launcher({"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1"})[0],
        "broken",
        "but not where rank 0 runs",
        "export MASTER_ADDR=<host name of the first node>",
    ),
    "no srun": (
        compute.launcher({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"})[0],
        "warning",
        "one process, in a SLURM allocation for 8",
        "start the command with srun",
    ),
    "deepspeed": (
        software.deepspeed(Probe(1, "ModuleNotFoundError: No module named 'deepspeed'"), "cpu"),
        "broken",
        "cannot be imported: ModuleNotFoundError",
        "pip install 'deepspeed>=0.19'",
    ),
    "deepspeed elsewhere": (
        software.deepspeed(Probe(0, "0.19.8 cpu"), "cuda"),
        "warning",
        "0.19.8 takes cpu, the device is cuda",
        "export DS_ACCELERATOR=cuda",
    ),
    "mamba": (
        software.mamba({"mamba_ssm": None, "causal_conv1d": Probe(0, "1")}, "cuda"),
        "warning",
        "scan backend torch: mamba_ssm not installed",
        "pip install --no-build-isolation 'fmrizoo[mamba]'",
    ),
    "mamba for another torch": (
        software.mamba(
            {"mamba_ssm": Probe(0, "1"), "causal_conv1d": Probe(1, "undefined symbol")}, "cuda"
        ),
        "broken",
        "causal_conv1d cannot be imported: undefined symbol",
        "pip install --force-reinstall --no-build-isolation causal-conv1d",
    ),
    "zlib": (
        software.fast_libraries({"isal": "1.9"}.get),
        "warning",
        "zlib stands in for deflate",
        "pip install deflate",
    ),
    "old hdf5": (
        software.hdf5("3.1", "1.10.6", None),
        "warning",
        "1.10.6, h5py 3.1: older",
        "pip install --force-reinstall h5py",
    ),
    "no recipes": (
        software.integrity(0, {"heads": 4}, True)[0],
        "broken",
        "none found",
        software.REINSTALL,
    ),
    "nothing registered": (
        software.integrity(9, {"heads": 0, "backbones": 0}, True)[0],
        "broken",
        "no heads and no backbones",
        software.REINSTALL,
    ),
    "no sample": (
        software.integrity(9, {"heads": 4}, False)[0],
        "broken",
        "its files are missing",
        software.REINSTALL,
    ),
    "output gone": (
        machine.output("/net/x: Permission denied"),
        "broken",
        "/net/x: Permission denied",
        "give another folder with --out",
    ),
    "output read-only": (
        machine.output(replace(DISK, read_only=True)),
        "broken",
        "/data is on a read-only file system",
        "give another folder with --out",
    ),
    "output of another": (
        machine.output(replace(DISK, writable=False)),
        "broken",
        "you may not write to /data",
        "give another folder with --out",
    ),
    "no inodes": (
        machine.output(replace(DISK, inodes=3)),
        "broken",
        "100.0 GB free, 3 files left",
        "give another folder with --out",
    ),
    "disk full": (
        machine.output(replace(DISK, free=GB // 2)),
        "broken",
        "0.5 GB free",
        "make room, or give another folder with --out",
    ),
    "disk nearly full": (
        machine.output(replace(DISK, free=5 * GB)),
        "warning",
        "5.0 GB free: few checkpoints fit",
        "make room, or set train.keep=1",
    ),
    "store's disk gone": (
        machine.store_disk("/net/x: Stale file handle"),
        "broken",
        "Stale file handle",
        "ask whoever runs this file system",
    ),
    "no store": (
        machine.store(Path("/nowhere/store")),
        "broken",
        "/nowhere/store is not a store",
        "give --store the folder that `fmrizoo prepare` wrote",
    ),
    "no locks": (
        machine.locking(Path("/net"), "Function not implemented"),
        "warning",
        "/net: Function not implemented",
        "run one `fmrizoo prepare` at a time on this file system",
    ),
    "no shm": (
        machine.shared_memory(None, 0),
        "warning",
        "is not there",
        "mount -t tmpfs tmpfs /dev/shm",
    ),
    "shm of a container": (
        machine.shared_memory(64 << 20, 64 << 20),
        "warning",
        "0.1 of 0.1 GB free: small",
        "start the container with --shm-size=8g",
    ),
    "shm full": (
        machine.shared_memory(10, 8 * GB),
        "warning",
        "0.0 of 8.0 GB free: full",
        "remove what is left there: ls -l /dev/shm",
    ),
    "few files": (machine.open_files(512, 2048), "warning", "512, at most 2048", "ulimit -n 2048"),
    "very few files": (machine.open_files(64, -1), "broken", "64, at most -1", "ulimit -n 4096"),
    "files capped": (
        machine.open_files(512, 512),
        "warning",
        "512, at most 512",
        "raise nofile in /etc/security/limits.conf",
    ),
    "memory": (
        machine.memory(6 * GB, None),
        "warning",
        "6.0 GB",
        "use a machine with more memory",
    ),
    "memory of the job": (
        machine.memory(64 * GB, GB),
        "broken",
        "1.0 GB of 64.0 (cgroup)",
        "ask for more memory: --mem=32G",
    ),
    "quota": (
        machine.cores(64, 4.0),
        "warning",
        "64 allowed, but a quota of 4",
        "export OMP_NUM_THREADS=4",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_has_its_sentence_and_its_fix(name: str) -> None:
    line, state, said, fix = FAULTS[name]
    assert line.state == state and said in line.found and line.fix == fix


WELL = [
    (software.python(">=3.11", "3.13.0"), "3.13.0"),
    (compute.imports(CPU), "2.14.1, built for cpu"),
    (compute.device(CPU, "", {"cuda": False}), "cpu"),
    (compute.device(CPU, "cpu", {"cuda": True}), "cpu"),  # asked for
    (compute.device(GPU, "", NONE), "cuda, 4 on this node"),
    (compute.cpu_kernels(replace(CPU, capability="DEFAULT"), "aarch64"), "DEFAULT"),
    (compute.bf16(GPU, "cuda"), "native on cuda"),
    (compute.threads(4, 16, 4), "4 × 4 ranks on 16 cores"),
    (compute.waiting("PASSIVE"), "PASSIVE"),
    (compute.launcher({})[0], "one process"),
    (software.deepspeed(Probe(0, "0.19.8 cuda"), "cuda"), "0.19.8, accelerator cuda"),
    (software.mamba({"mamba_ssm": None}, "cpu"), "scan backend torch on cpu"),
    (software.mamba({"mamba_ssm": Probe(1, "no CUDA")}, "xpu"), "kernels not used"),
    (software.mamba({"mamba_ssm": Probe(0, "1")}, "cuda"), "scan backend mamba_ssm"),
    (software.fast_libraries({"isal": "1.9", "deflate": "0.9"}.get), "isal 1.9, deflate 0.9"),
    (software.hdf5("3.16", "2.0.0", "TRUE"), "HDF5_USE_FILE_LOCKING=TRUE"),
    (software.integrity(52, {"heads": 4}, True)[0], "52 recipes, 4 heads"),
    (machine.output(replace(DISK, inodes=-1)), "/data, 100.0 GB free"),
    (machine.store_disk(replace(DISK, read_only=True)), "read-only (enough to train from)"),
    (machine.locking(Path("/data"), ""), "work on /data"),
    (machine.shared_memory(8 * GB, 16 * GB), "8.0 of 16.0 GB free"),
    (machine.open_files(4096, 4096), "4096"),
    (machine.open_files(-1, -1), "no limit"),
    (machine.memory(64 * GB, 1 << 62), "64.0 GB"),
    (machine.cores(8, None), "8 allowed"),
    (machine.cores(2, 4.0), "2 allowed"),
]


@pytest.mark.parametrize(("line", "said"), WELL, ids=[line.check for line, _ in WELL])
def test_what_is_well(line: Line, said: str) -> None:
    assert line.state == "ok" and said in line.found and not line.fix


NEEDS = [
    "torch>=2.6",
    'deepspeed>=0.19; sys_platform == "linux"',
    'pywin32; sys_platform == "win32"',
    'captum>=0.8; extra == "understand"',
    'mup>=1.0; extra == "mup"',
    'mamba-ssm>=2.3.1; (sys_platform == "linux") and extra == "mamba"',
    'pytest>=8; extra == "dev"',
]


def test_packages_against_their_bounds() -> None:
    good = {"torch": "2.8.0+cu128", "deepspeed": "0.19.8"}
    assert software.packages(NEEDS, good.get) == [ok("packages", "2 within pyproject's bounds")]
    fits, old = software.packages(NEEDS, {**good, "torch": "2.5.1"}.get)
    assert fits.found.startswith("1 within")
    assert old == broken("torch", "2.5.1, needs >=2.6", "pip install 'torch>=2.6'")
    _, gone = software.packages(NEEDS, {"torch": "2.8"}.get)
    assert gone == broken(
        "deepspeed", "not installed, needs >=0.19", "pip install 'deepspeed>=0.19'"
    )
    (bare,) = software.packages([], good.get)
    assert bare.state == "broken" and bare.fix == "pip install fmrizoo"


def test_optional_packages_may_be_missing_but_not_wrong() -> None:
    found, old = software.extras(NEEDS, {"captum": "0.7", "mup": "1.0.0"}.get)
    assert found == ok("optional packages", "mup 1.0.0; not installed: mamba-ssm [mamba]")
    assert old == warning("captum", "0.7, needs >=0.8", "pip install 'captum>=0.8'")
    assert "pytest" not in found.found


def test_bounds_are_those_of_the_checkout_else_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        textwrap.dedent("""
        [project]
        name = "fmrizoo"
        requires-python = ">=3.11"
        dependencies = ["torch>=2.6"]
        [project.optional-dependencies]
        mup = ["mup>=1.0"]
        mamba = ["mamba-ssm>=2.3.1; sys_platform == 'linux'"]
        """)
    )
    bounds, needs = software.declared(tmp_path)
    assert bounds == ">=3.11" and needs[0] == "torch>=2.6"
    _, wrong = software.extras(needs, {"mamba-ssm": "1"}.get)
    assert wrong.check == "mamba-ssm"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')

    def gone(name: str) -> None:
        raise software.metadata.PackageNotFoundError(name)

    assert software.declared(tmp_path)[0]  # of the installed package
    monkeypatch.setattr(software.metadata, "metadata", gone)
    monkeypatch.setattr(software.metadata, "version", gone)
    assert software.declared(tmp_path) == ("", []) and software.installed("torch") is None


def test_launchers_and_ranks_of_a_node() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n0"}
    line, ranks = compute.launcher({**torchrun, "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "4"})
    assert line.state == "ok" and ranks == 4
    assert line.found == "torchrun or deepspeed, rank 5 of 8, rank 0 at n0:1"
    srun = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    line, ranks = compute.launcher({**srun, "SLURM_STEP_NODELIST": "gpu[3-4]"})
    assert "SLURM, rank 1 of 2, rank 0 at gpu3" in line.found and ranks == 1


def test_probes_survive_what_they_import() -> None:
    env = dict(os.environ)
    assert software.probe("print('noise'); print('1.0 cpu')", env) == Probe(0, "1.0 cpu")
    failed = software.probe("import no_such_package_at_all", env)
    assert failed.code == 1 and failed.said.startswith("ModuleNotFoundError")
    killed = software.probe("import os; os.kill(os.getpid(), 11)", env)
    assert killed.code == -11 and "exit code -11" in killed.said
    assert "no answer within" in software.probe("import time; time.sleep(60)", env, 0.2).said


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert compute.look_at_torch(frozenset()) == "libcudart.so.13: cannot open shared object file"


def test_doctor_lives_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compute, "look_at_torch", lambda flags: "no torch")
    lines = doctor.examine(out=tmp_path)
    assert [line.check for line in lines if line.state == "broken"] == ["PyTorch"]
    assert "memory" in [line.check for line in lines]


def test_what_torch_says_here(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = compute.look_at_torch(frozenset({"avx512_bf16"}))
    assert isinstance(found, Torch) and found.version == torch.__version__
    assert "cpu" in found.bf16 and compute.chosen(found, "xpu") == "xpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 12)
    both = compute.look_at_torch(frozenset())
    assert isinstance(both, Torch) and both.devices == {"cuda": 3, "xpu": 12}
    assert both.bf16 == {"xpu"} and compute.chosen(both, "") == "cuda"


def test_cpu_flags(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2 amx_bf16\n\nflags : x\n")
    assert doctor.cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "amx_bf16"}
    assert doctor.cpu_flags(tmp_path / "gone") == frozenset()


def test_limits_of_cgroups_of_both_versions(tmp_path: Path) -> None:
    """The tightest of the group and those above counts; paths of the host are passed over."""
    (tmp_path / "job/step").mkdir(parents=True)
    (tmp_path / "job/memory.max").write_text("5000\n")
    (tmp_path / "job/step/memory.max").write_text("max\n")
    (tmp_path / "job/cpu.max").write_text("150000 100000\n")
    (tmp_path / "job/step/cpu.max").write_text("max 100000\n")
    assert machine.memory_limit("0::/job/step\n", tmp_path) == 5000
    assert machine.cpu_quota("0::/job/step\n", tmp_path) == 1.5
    assert machine.memory_limit("0::/elsewhere/of/host\n", tmp_path) is None
    old = tmp_path / "old"
    for name in ("memory/slurm", "cpu/slurm"):
        (old / name).mkdir(parents=True)
    (old / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.memory_limit("4:memory:/slurm\n0::/\n", old) is None
    (old / "memory/slurm/memory.limit_in_bytes").write_text("7000\n")
    assert machine.memory_limit("4:memory:/slurm\n0::/\n", old) == 7000
    (old / "cpu/slurm/cpu.cfs_quota_us").write_text("-1\n")
    (old / "cpu/slurm/cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_quota("1:cpu,cpuacct:/slurm\n", old) is None
    (old / "cpu/slurm/cpu.cfs_quota_us").write_text("50000\n")
    assert machine.cpu_quota("1:cpu,cpuacct:/slurm\n", old) == 0.5
    assert machine.memory_limit("", tmp_path) is machine.cpu_quota("", tmp_path) is None


def test_disks_and_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.look_at_disk(tmp_path / "not" / "there")
    assert isinstance(found, Disk) and found.path == tmp_path and found.writable
    usage = shutil.disk_usage(tmp_path)
    assert 0 < found.free <= usage.total and not found.read_only
    assert machine.try_lock(tmp_path) == "" and list(tmp_path.iterdir()) == []
    assert machine.try_lock(tmp_path / "gone") == os.strerror(errno.ENOENT)

    def answer(number: int) -> None:
        def flock(file: int, how: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    answer(errno.ENOLCK)
    assert machine.try_lock(tmp_path) == os.strerror(errno.ENOLCK)
    answer(errno.EWOULDBLOCK)  # BlockingIOError: somebody holds it
    assert machine.try_lock(tmp_path) == ""

    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "statvfs", stale)
    assert machine.look_at_disk(tmp_path) == f"{tmp_path}: {os.strerror(errno.ESTALE)}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("doctor") / "store"
    done = CliRunner().invoke(
        app, ["prepare", str(sample_path()), str(made), "prepare.space=native"]
    )
    assert done.exit_code == 0, done.output
    return made


def test_store_whole_and_with_a_file_missing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = machine.store(store)
    assert whole.state == "ok" and "runs" in whole.found
    with monkeypatch.context() as patch:
        patch.setattr(store_module.Store, "__init__", lambda self, path: setattr(self, "runs", ()))
        empty = machine.store(store)
    assert empty == broken("store", f"{store} holds no run", f"fmrizoo prepare <data> {store}")
    torn = tmp_path / "torn"
    shutil.copytree(store, torn)
    victim = next(torn.rglob("*.h5"))
    victim.unlink()
    line = machine.store(torn)
    assert line.state == "broken" and f"such as {victim.relative_to(torn)}" in line.found
    assert line.fix == f"fmrizoo repair {torn} <what it was prepared from>"


def test_command(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(machine, "memory_limit", lambda groups: 10**9)
    monkeypatch.setattr(software, "probe", lambda *_: Probe(0, "0.19.8 cpu"))
    asked = ["doctor", "--store", str(store), "--out", str(tmp_path)]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 1
    assert "→ ask for more memory: --mem=32G" in shown.output and "1 broken" in shown.output
    told = CliRunner().invoke(app, [*asked, "--json"])
    lines = [Line(**line) for line in json.loads(told.stdout)]
    assert told.exit_code == 1 and [x.check for x in lines if x.state == "broken"] == ["memory"]
    assert {"store", "store's file system", "output folder"} <= {line.check for line in lines}
    assert [line.check for line in lines].count("file locks") == 2
    monkeypatch.setattr(machine, "memory_limit", lambda groups: 32 * 10**9)
    well = CliRunner().invoke(app, [*asked, "--json"])
    gone = [line["check"] for line in json.loads(well.stdout) if line["state"] == "broken"]
    # This machine may have too little of something else: the code says so either way.
    assert well.exit_code == bool(gone) and "memory" not in gone
