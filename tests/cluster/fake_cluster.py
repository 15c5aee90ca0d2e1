"""Stand-ins for srun, mpiexec, scontrol, qsub, timeout and fmrizoo, on a PATH of their own.

Every rank's environment ends in a file; the launchers set what the real ones set.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

# srun: SLURM's variables for every task of --nodes × --ntasks-per-node; the highest exit code.
SRUN = r"""#!/bin/bash
while [[ "$1" == --* ]]; do
  case "$1" in
    --nodes=*) nodes="${1#*=}" ;;
    --ntasks=*) tasks="${1#*=}" ;;
    --ntasks-per-node=*) each="${1#*=}" ;;
  esac
  echo "srun $1" >> "$LOG/calls"
  shift
done
started=()
for ((rank = 0; rank < tasks; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$((rank % each)) SLURM_NODEID=$((rank / each)) \
    SLURM_NTASKS=$tasks SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_ID=0 SLURM_NNODES=$nodes \
    SLURM_STEP_NODELIST="$SLURM_JOB_NODELIST" "$@" &
  started+=($!)
  echo "$!" >> "$LOG/ranks"
done
worst=0
for process in "${started[@]}"; do
  wait "$process"
  code=$?
  echo "$code" >> "$LOG/ended"
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
"""
# mpiexec of PALS with PMIx: ranks are numbered, nothing counts them. All ranks run side by side.
MPIEXEC = r"""#!/bin/bash
while [[ "$1" == -* ]]; do
  case "$1" in
    -n) ranks="$2" ;;
    --ppn) each="$2" ;;
  esac
  echo "mpiexec $1 $2" >> "$LOG/calls"
  shift 2
done
started=()
trap 'kill -TERM "${started[@]}"' TERM
for ((rank = 0; rank < ranks; rank++)); do
  PALS_RANKID=$rank PALS_LOCAL_RANKID=$((rank % each)) PALS_LOCAL_SIZE=$each \
    PALS_NODEID=$((rank / each)) PMIX_RANK=$rank "$@" &
  started+=($!)
done
worst=0
for process in "${started[@]}"; do
  wait "$process"
  code=$?
  # A signal ends `wait` before the process has ended.
  while kill -0 "$process" 2> /dev/null; do wait "$process"; code=$?; done
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "${MPIEXEC_SAYS:-$worst}"
"""
SCONTROL = r"""#!/bin/bash
case "$1" in
  show) printf 'gpu003\ngpu017\n' ;;
  requeue) echo "requeue $2" >> "$LOG/again" ;;
  *) exit 2 ;;
esac
"""
QSUB = '#!/bin/bash\necho "$2 $3" >> "$LOG/again"\n'
# Exit codes come from $LOG/codes, one line for each job; every rank of a job reads the same.
FMRIZOO = r"""#!/bin/bash
rank=${SLURM_PROCID:-$PALS_RANKID}
trap 'exit 75' TERM
env -0 > "$LOG/env.$ATTEMPT.$rank"
printf '%s\n' "$@" > "$LOG/words.$ATTEMPT.$rank"
code=$(sed -n "$((ATTEMPT + 1))p" "$LOG/codes")
if [ "$code" = waits ]; then
  touch "$LOG/ready.$rank"
  for ((i = 0; i < 300; i++)); do sleep 0.1; done
  exit 9
fi
[ "$rank" = 0 ] && [ -n "$LEAVES" ] && echo "$LEAVES" > "$FMRIZOO_EXIT_FILE"
exit "$code"
"""


# timeout without a clock: its time is over as soon as all six ranks wait.
TIMEOUT = r"""#!/bin/bash
echo "timeout $1 $2 $3" >> "$LOG/calls"
shift 3
"$@" &
while [ "$(find "$LOG" -name 'ready.*' | wc -l)" -lt 6 ]; do sleep 0.1; done
kill -TERM $!
wait $!
"""


@dataclass
class Cluster:
    """A folder with fake commands, and what they wrote."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir(parents=True)
        self.log = self.folder / "log"
        self.log.mkdir()
        (self.folder / "nodes").write_text("x41\nx41\nx41\nx52\nx52\nx52\n")
        made = {
            "srun": SRUN,
            "mpiexec": MPIEXEC,
            "scontrol": SCONTROL,
            "qsub": QSUB,
            "fmrizoo": FMRIZOO,
        }
        for name, text in made.items():
            path = self.folder / "bin" / name
            path.write_text(text)
            path.chmod(0o755)

    def start(
        self, script: Path, attempt: int = 0, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a job script as the batch shell of a job of two nodes."""
        env = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": os.environ.get("HOME", "/"),
            "LOG": str(self.log),
            "ATTEMPT": str(attempt),
            "LEAVES": "",
            **more,
        }
        return subprocess.run(
            ["bash", str(script)], env=env, cwd=self.folder, capture_output=True, text=True
        )

    def slurm(self, script: Path, attempt: int = 0, **more: str) -> int:
        """Exit code as a SLURM job that was restarted ``attempt`` times."""
        env = {
            "SLURM_JOB_ID": "8812345",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "gpu[003,017]",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "6",
            "SLURM_LOCALID": "0",
            **({"SLURM_RESTART_COUNT": str(attempt)} if attempt else {}),
            **more,
        }
        return self.start(script, attempt, **env).returncode

    def pbs(self, script: Path, attempt: int = 0, **more: str) -> int:
        """Exit code as a PBS job that was submitted again ``attempt`` times."""
        env = {
            "PBS_JOBID": "1234567[3].head",
            "PBS_NODEFILE": str(self.folder / "nodes"),
            "PBS_O_WORKDIR": str(self.folder),
            **({"FMRIZOO_RESUMED": str(attempt)} if attempt else {}),
            **more,
        }
        return self.start(script, attempt, **env).returncode

    def codes(self, *codes: object) -> None:
        """What fmrizoo exits with in the first, second … job."""
        (self.log / "codes").write_text("".join(f"{code}\n" for code in codes))

    def environments(self, attempt: int = 0) -> list[dict[str, str]]:
        """Of every fmrizoo that was started in a job."""
        found = []
        for path in sorted(self.log.glob(f"env.{attempt}.*")):
            lines = path.read_bytes().decode().rstrip("\0").split("\0")
            found.append(dict(line.split("=", 1) for line in lines))
        return found

    def words(self, attempt: int = 0) -> list[str]:
        """Arguments of rank 0's fmrizoo."""
        return (self.log / f"words.{attempt}.0").read_text().splitlines()

    def lines(self, name: str) -> list[str]:
        """Of a file of the log; none if it is not there."""
        path = self.log / name
        return path.read_text().splitlines() if path.exists() else []
