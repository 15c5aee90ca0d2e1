"""What differs between batch systems, as far as it is known; the scripts mark the rest.

Sources: the manuals of sbatch, srun and qsub; Aurora's node from its public description: 6 GPUs of
2 tiles each, and 2 sockets of 52 cores of which the first core of each is left to the system.
"""

from __future__ import annotations

from dataclasses import dataclass

from fmrizoo.errors import RecipeError


@dataclass(frozen=True)
class Scheduler:
    """A batch system.

    Attributes:
        name: As in ``fmrizoo job NAME``.
        template: File in ``fmrizoo/cluster/templates``.
        submit: Its command.
        ranks: Processes of a node where it is known; 0: must be given.
        signal: What tells the trainer that the time is nearly over.
    """

    name: str
    template: str
    submit: str
    ranks: int
    signal: str


SCHEDULERS = {
    one.name: one
    for one in (
        Scheduler("slurm", "slurm.sh.j2", "sbatch", 0, "USR1"),
        Scheduler("pbs", "pbs.sh.j2", "qsub", 0, "TERM"),
        Scheduler("aurora", "pbs.sh.j2", "qsub", 12, "TERM"),
    )
}

AURORA_TILES = 12
_SOCKET_CORES, _SOCKET_TILES, _RANK_CORES = 52, 6, 8


def scheduler(name: str) -> Scheduler:
    """The batch system called ``name``.

    Raises:
        RecipeError: there is none.
    """
    if name not in SCHEDULERS:
        raise RecipeError(f"no scheduler {name!r}: there are {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name]


def aurora_cores(ranks: int) -> str:
    """``--cpu-bind`` list of so many ranks: 8 cores each, on the socket of the rank's tile.

    Tiles 0–5 hang on the first socket, 6–11 on the second; the first core of a socket stays free.

    Raises:
        RecipeError: more ranks than tiles.
    """
    if ranks > AURORA_TILES:
        raise RecipeError(
            f"--ranks {ranks}: a node of Aurora has {AURORA_TILES} tiles, one for each rank"
        )
    firsts = (
        _SOCKET_CORES * (rank // _SOCKET_TILES) + 1 + _RANK_CORES * (rank % _SOCKET_TILES)
        for rank in range(ranks)
    )
    return "list:" + ":".join(f"{first}-{first + _RANK_CORES - 1}" for first in firsts)
