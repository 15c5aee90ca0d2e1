"""Rank discovery from launchers' environments, rendezvous, devices, random state."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fmrizoo.errors import TrainingError
from fmrizoo.trainer import device
from fmrizoo.trainer.device import (
    World,
    discover,
    first_host,
    rendezvous,
    resolve_device,
    rng_state,
    seed_everything,
    set_rng_state,
)


def listing(text: str) -> dict[str, str]:
    """The output of ``env`` as a dict."""
    return dict(line.strip().split("=", 1) for line in text.strip().splitlines())


TORCHRUN = listing(
    """
    GROUP_RANK=0
    LOCAL_RANK=1
    LOCAL_WORLD_SIZE=2
    MASTER_ADDR=localhost
    MASTER_PORT=41017
    RANK=1
    ROLE_RANK=1
    ROLE_WORLD_SIZE=2
    TORCHELASTIC_RUN_ID=4c5a
    WORLD_SIZE=2
    """
)
DEEPSPEED = listing(
    """
    CROSS_RANK=1
    CROSS_SIZE=2
    LOCAL_RANK=0
    LOCAL_SIZE=4
    MASTER_ADDR=10.0.0.7
    MASTER_PORT=29500
    RANK=4
    WORLD_SIZE=8
    """
)
SRUN = listing(
    """
    SLURMD_NODENAME=gpu004
    SLURM_JOB_ID=8812345
    SLURM_JOB_NAME=fmrizoo
    SLURM_JOB_NODELIST=gpu[003-004,017]
    SLURM_JOB_NUM_NODES=3
    SLURM_LAUNCH_NODE_IPADDR=172.16.0.1
    SLURM_LOCALID=2
    SLURM_NODEID=1
    SLURM_NTASKS=12
    SLURM_NTASKS_PER_NODE=4
    SLURM_PROCID=6
    SLURM_STEP_ID=0
    SLURM_STEP_NODELIST=gpu[003-004,017]
    SLURM_STEP_NUM_TASKS=12
    """
)
AURORA = listing(
    """
    PALS_APID=2f5b2a2e-f5a5-4be8-91a1-0db9cf6d2c3a
    PALS_LOCAL_RANKID=5
    PALS_LOCAL_SIZE=12
    PALS_NODEID=1
    PALS_RANKID=17
    PBS_ENVIRONMENT=PBS_BATCH
    PBS_JOBID=1234567.aurora-pbs-0001.hostmgmt.cm.aurora.alcf.anl.gov
    PMI_LOCAL_RANK=5
    PMI_LOCAL_SIZE=12
    PMI_RANK=17
    PMI_SIZE=24
    """
)
INTEL_MPI = listing(
    """
    MPI_LOCALNRANKS=2
    MPI_LOCALRANKID=1
    PMI_RANK=1
    PMI_SIZE=2
    """
)
OPEN_MPI = listing(
    """
    OMPI_COMM_WORLD_LOCAL_RANK=3
    OMPI_COMM_WORLD_LOCAL_SIZE=4
    OMPI_COMM_WORLD_NODE_RANK=3
    OMPI_COMM_WORLD_RANK=3
    OMPI_COMM_WORLD_SIZE=4
    PMIX_RANK=3
    """
)
HYDRA = listing(
    """
    GFORTRAN_UNBUFFERED_PRECONNECTED=y
    MPI_LOCALNRANKS=2
    MPI_LOCALRANKID=1
    PMI_FD=9
    PMI_RANK=3
    PMI_SIZE=4
    """
)
# `mpiexec --pmi=pmix` of PALS: no PMI_RANK, no PMI_SIZE, and nothing that counts the ranks.
AURORA_PMIX = listing(
    """
    PALS_APID=2f5b2a2e-f5a5-4be8-91a1-0db9cf6d2c3a
    PALS_DEPTH=1
    PALS_LOCAL_RANKID=5
    PALS_LOCAL_SIZE=12
    PALS_NODEID=1
    PALS_RANKID=17
    PBS_ENVIRONMENT=PBS_BATCH
    PBS_JOBID=1234567.aurora-pbs-0001.hostmgmt.cm.aurora.alcf.anl.gov
    PMIX_NAMESPACE=2f5b2a2e
    PMIX_RANK=17
    """
)
# srun on a Cray system (its PMI plugin adds PALS's names), and in salloc's job "interactive".
CRAY_SRUN = listing(
    """
    PALS_APID=8812345.0
    PALS_NODEID=1
    PALS_RANKID=6
    PMI_SHARED_SECRET=1234
    SLURM_JOB_ID=8812345
    SLURM_JOB_NAME=interactive
    SLURM_JOB_NODELIST=nid[001234-001235]
    SLURM_LOCALID=2
    SLURM_NTASKS=8
    SLURM_PROCID=6
    SLURM_STEPID=3
    SLURM_STEP_ID=3
    SLURM_STEP_NODELIST=nid[001234-001235]
    SLURM_STEP_NUM_TASKS=8
    """
)
MVAPICH = listing(
    """
    MV2_COMM_WORLD_LOCAL_RANK=0
    MV2_COMM_WORLD_LOCAL_SIZE=2
    MV2_COMM_WORLD_RANK=2
    MV2_COMM_WORLD_SIZE=4
    """
)


@pytest.mark.parametrize(
    ("env", "rank", "size", "local"),
    [
        (HYDRA, 3, 4, 1),
        ({**AURORA_PMIX, "WORLD_SIZE": "24"}, 17, 24, 5),
        (CRAY_SRUN, 6, 8, 2),
        ({**CRAY_SRUN, "WORLD_SIZE": "8"}, 6, 8, 2),
        ({**SRUN, **HYDRA}, 3, 4, 1),
        (MVAPICH, 2, 4, 0),
        (TORCHRUN, 1, 2, 1),
        (DEEPSPEED, 4, 8, 0),
        (SRUN, 6, 12, 2),
        (AURORA, 17, 24, 5),
        (INTEL_MPI, 1, 2, 1),
        (OPEN_MPI, 3, 4, 3),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, 3, 8, 1),
        ({}, 0, 1, 0),
    ],
)
def test_launchers(env: dict[str, str], rank: int, size: int, local: int) -> None:
    world = discover({"HOME": "/root", **env})
    assert (world.rank, world.size, world.local_rank) == (rank, size, local)
    assert world.main == (rank == 0)


def test_torchrun_inside_slurm_wins_over_the_batch_shell() -> None:
    assert discover({**SRUN, **TORCHRUN}).size == 2
    # mpirun in a batch script: every rank inherits the script's own SLURM_PROCID.
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert discover({**batch, **OPEN_MPI}).rank == 3


def test_a_shell_in_an_allocation_is_one_process(caplog: pytest.LogCaptureFixture) -> None:
    shell = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert discover({**shell, "SLURM_JOB_NAME": "interactive"}) == World()
    assert discover({**shell, "SLURM_JOB_NAME": "night"}).size == 4
    assert "start the command with srun" in caplog.text


def test_ranks_that_pals_does_not_count_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"PALS_RANKID=17 but not .* export WORLD_SIZE"):
        discover(AURORA_PMIX)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        # salloc's own shell is a step; so is srun --pty bash. Neither is one of several ranks.
        ({"SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": "4294967290"}, 1),
        ({"SLURM_JOB_NAME": "night", "SLURM_STEP_ID": "4294967290"}, 1),
        ({"SLURM_JOB_NAME": "bash", "SLURM_STEP_ID": "0"}, 1),
        # srun started in them is.
        ({"SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": "0"}, 4),
        ({"SLURM_JOB_NAME": "bash", "SLURM_STEP_ID": "1"}, 4),
    ],
)
def test_shells_and_steps_of_interactive_jobs(given: dict[str, str], size: int) -> None:
    env = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", **given}
    assert discover(env).size == size


def test_a_job_of_one_process_is_a_single_process() -> None:
    env = {"RANK": "0", "WORLD_SIZE": "1"}
    assert discover(env) == World()
    assert discover({**env, "LOCAL_RANK": "1"}) == World(local_rank=1)  # picks the second GPU


def test_a_step_smaller_than_the_job() -> None:
    env = {**SRUN, "SLURM_STEP_NUM_TASKS": "7"}
    assert discover(env).size == 7


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "rank 2 .* of 2 processes"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "none of LOCAL_RANK"),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK='one' is not a number"),
    ],
)
def test_contradictions_are_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        discover(env)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-004,017]", "gpu003"),
        ("gpu[3,5]", "gpu3"),
        ("node7", "node7"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]n[03-04]", "rack1n03"),
        ("nid[001234]-hsn", "nid001234-hsn"),
        ("x[1-2],y3", "x1"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_rendezvous(tmp_path: Path) -> None:
    assert rendezvous(DEEPSPEED, discover(DEEPSPEED)) == ("10.0.0.7", 29500)
    assert rendezvous(SRUN, discover(SRUN)) == ("gpu003", 20_000 + 8812345 % 20_000)
    nodes = tmp_path / "nodes"
    nodes.write_text("x4102c5s0b0n0.hostmgmt\nx4102c5s1b0n0.hostmgmt\n")
    env = {**AURORA, "PBS_NODEFILE": str(nodes)}
    assert rendezvous(env, discover(env)) == (
        "x4102c5s0b0n0.hostmgmt",
        20_000 + 1234567 % 20_000,
    )
    assert rendezvous(OPEN_MPI, discover(OPEN_MPI))[0] == "127.0.0.1"
    assert rendezvous(INTEL_MPI, discover(INTEL_MPI))[0] == "127.0.0.1"
    with pytest.raises(TrainingError, match="set MASTER_ADDR"):
        rendezvous(AURORA, discover(AURORA))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert resolve_device("auto", World()) == torch.device("cpu")
    with pytest.raises(TrainingError, match=r"train\.device=xpu but this PyTorch"):
        resolve_device("xpu", World())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", World(1, 2, 1)) == torch.device("cuda", 1)
    assert resolve_device("cpu", World(1, 2, 1)) == torch.device("cpu")
    with pytest.raises(TrainingError, match="local rank 2 has no cuda device: the node shows 2"):
        resolve_device("cuda", World(2, 3, 2))
    # One visible device a rank, as CUDA_VISIBLE_DEVICES or ZE_AFFINITY_MASK per rank gives.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda", World(2, 3, 2)) == torch.device("cuda", 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert resolve_device("auto", World()) == torch.device("cpu")


def draw() -> list[float]:
    return [
        random.random(),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(1).item(),
    ]


def test_random_state_round_trip(tmp_path: Path) -> None:
    seed_everything(3, 1)
    np.random.randn()  # leaves a cached normal behind, which is state too
    torch.save(rng_state(torch.device("cpu")), tmp_path / "rng.pt")
    first = draw()
    assert draw() != first
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True), torch.device("cpu"))
    assert draw() == first


def test_ranks_draw_differently_and_seeds_repeat() -> None:
    drawn = []
    for seed, rank in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_everything(seed, rank)
        drawn.append(tuple(draw()))
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3


class FakeDevices:
    """Stands in for ``torch.cuda`` or ``torch.xpu``: devices with a random state each."""

    def __init__(self) -> None:
        self.current: list[torch.device] = []
        self.states = {0: torch.tensor([1]), 1: torch.tensor([2])}

    def set_device(self, device: torch.device) -> None:
        self.current.append(device)

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return self.states[device.index].clone()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.states[device.index] = state


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_random_state_of_the_ranks_own_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, own = FakeDevices(), torch.device(kind, 1)
    monkeypatch.setattr(torch, kind, devices)
    kept = rng_state(own)
    devices.states = {0: torch.tensor([7]), 1: torch.tensor([8])}
    set_rng_state(kept, own)
    assert {n: int(s) for n, s in devices.states.items()} == {0: 7, 1: 2}
    assert "device" not in rng_state(torch.device("cpu"))


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "nccl"), ("xpu", "xccl")])
def test_ranks_meet_on_their_device_by_its_backend(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every name that DeepSpeed is given: its accelerator and its collectives are stand-ins."""
    devices, told = FakeDevices(), dict[str, Any]()
    accelerator = SimpleNamespace(communication_backend_name=lambda: backend)
    deepspeed = SimpleNamespace(
        get_accelerator=lambda: accelerator, init_distributed=lambda **given: told.update(given)
    )
    monkeypatch.setattr(torch, kind, devices)
    monkeypatch.setattr(device, "load_deepspeed", lambda _: deepspeed)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0")  # put back afterwards
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    device.init_distributed(World(5, 8, 1, "test"), torch.device(kind, 1))
    assert devices.current == [torch.device(kind, 1)]
    assert (told["dist_backend"], told["rank"], told["world_size"]) == (backend, 5, 8)
    assert told["init_method"] == "tcp://node1:29500" and not told["auto_mpi_discovery"]
    assert os.environ["LOCAL_RANK"] == "1"


def test_deepspeed_of_another_device_is_refused() -> None:
    before = os.environ["DS_ACCELERATOR"]
    device.load_deepspeed(torch.device("cpu"))
    with pytest.raises(TrainingError, match="runs on cpu in this process, cannot switch to xpu"):
        try:
            device.load_deepspeed(torch.device("xpu", 0))
        finally:
            os.environ["DS_ACCELERATOR"] = before
