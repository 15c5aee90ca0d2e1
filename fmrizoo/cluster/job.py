"""A job script for a batch system, written to be read: :func:`script`.

The recipe is composed and its batch divided over the ranks before anything is written, so that what
cannot start is refused here and not after a night in the queue.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING

from fmrizoo import __version__
from fmrizoo.cluster.schedulers import Scheduler, aurora_cores, scheduler
from fmrizoo.errors import INTERRUPTED, RecipeError

if TYPE_CHECKING:
    from fmrizoo.config import Recipe

# Command of a job → words of the command line; those of ARRAYS know --part.
COMMANDS = {
    "pretrain": ("pretrain",),
    "finetune": ("finetune",),
    "ablate": ("ablate",),
    "sweep": ("scaling", "sweep"),
    "transfer": ("mup", "transfer"),
}
ARRAYS = ("ablate", "sweep", "transfer")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,14}")


@dataclass(frozen=True)
class Job:
    """What is to run, and where.

    Attributes:
        scheduler: ``slurm``, ``pbs`` or ``aurora``.
        recipe, overrides: As on the command line.
        command: One of :data:`COMMANDS`.
        nodes: Of one job (of one part, in an array).
        ranks: Processes a node; 0: what the scheduler's machine has.
        gpus: GPUs asked for a node; None: one a rank; 0: none.
        cores: CPU cores a rank; 0: not asked for.
        walltime: ``H:MM:SS``.
        name: Of the job; at most 15 letters, digits, - and _ (PBS takes no more everywhere).
        folder: Where the run is written, seen from the folder of submission.
        account, queue: As the site calls them; empty: a line to fill in.
        warn: Seconds between the warning and the end of the walltime.
        resumes: How often a job may go on by itself.
        array: Parts of a job array; 0: no array.
        stage: Folder in each node's own memory; empty: data are read where they are.
        script: Name of the script's file, for PBS to submit it again.
    """

    scheduler: str
    recipe: str
    overrides: tuple[str, ...] = ()
    command: str = "pretrain"
    nodes: int = 1
    ranks: int = 0
    gpus: int | None = None
    cores: int = 0
    walltime: str = "1:00:00"
    name: str = "fmrizoo"
    folder: str = ""
    account: str = ""
    queue: str = ""
    warn: int = 300
    resumes: int = 20
    array: int = 0
    stage: str = ""
    script: str = ""

    def __post_init__(self) -> None:
        if self.command not in COMMANDS:
            raise RecipeError(f"--command {self.command!r}: there are {', '.join(COMMANDS)}")
        if not _NAME.fullmatch(self.name):
            raise RecipeError(
                f"--name {self.name!r}: a job's name is a letter and up to 14 letters, digits, - "
                "and _, for PBS takes no more"
            )
        if self.array and self.command not in ARRAYS:
            raise RecipeError(
                f"--array {self.array} with --command {self.command}: only {', '.join(ARRAYS)} "
                "come in parts"
            )
        if self.array == 1:
            raise RecipeError("--array 1 is no array: leave it out, or give 2 parts and more")
        least = {"nodes": 1, "cores": 0, "resumes": 0, "array": 0, "gpus": 0, "ranks": 0, "warn": 1}
        for key, low in least.items():
            value = getattr(self, key)
            if value is not None and value < low:
                raise RecipeError(f"--{key} must be ≥ {low}, got {value}")
        for key in ("account", "queue", "stage", "folder", "script"):
            if re.search(r"[\s'\"\\$`;&|<>#]", value := getattr(self, key)):
                raise RecipeError(f"--{key} {value!r}: blanks and signs of the shell do not belong")
        if self.stage and not self.stage.startswith("/"):
            raise RecipeError(f"--stage {self.stage!r}: a folder of the node, such as /dev/shm")
        if not self.per_node:
            raise RecipeError(
                f"--ranks is missing: how many processes a node of {self.scheduler} runs "
                "(one a GPU)"
            )
        if self.warn >= self.seconds:
            raise RecipeError(
                f"--warn {self.warn}: the warning must come before the end of --time "
                f"{self.walltime} ({self.seconds} s)"
            )

    @cached_property
    def system(self) -> Scheduler:
        """The batch system."""
        return scheduler(self.scheduler)

    @property
    def per_node(self) -> int:
        """Processes a node."""
        return self.ranks or self.system.ranks

    @property
    def world(self) -> int:
        """Processes of one job."""
        return self.nodes * self.per_node

    @cached_property
    def seconds(self) -> int:
        """The walltime."""
        found = re.fullmatch(r"(\d{1,4}):([0-5]\d):([0-5]\d)", self.walltime)
        if not found:
            raise RecipeError(
                f"--time {self.walltime!r}: write hours:minutes:seconds, such as 6:00:00"
            )
        hours, minutes, seconds = (int(word) for word in found.groups())
        return 3600 * hours + 60 * minutes + seconds

    @property
    def run(self) -> str:
        """The run's folder."""
        return self.folder or f"runs/{self.name}"

    @property
    def words(self) -> list[str]:
        """The command that each rank runs, without ``--part``."""
        staged = [f"data.stage={self.stage}"] if self.stage else []
        said = ["fmrizoo", *COMMANDS[self.command], self.recipe, *self.overrides, *staged]
        return [*said, "--out", self.run]


def check(job: Job) -> Recipe:
    """The composed recipe of a job that can start.

    Raises:
        RecipeError: the recipe cannot be composed, lacks what the command needs, or its batch
            cannot be divided over the ranks.
    """
    from fmrizoo.trainer.device import World
    from fmrizoo.trainer.zero import micro_batch
    from fmrizoo.zoo import load_recipe

    recipe = load_recipe(job.recipe, list(job.overrides))
    if job.command == "finetune" and recipe.head is None:
        raise RecipeError(f"{job.recipe} has no head: --command finetune needs one")
    if job.command == "pretrain" and recipe.objective is None:
        raise RecipeError(f"{job.recipe} has no objective: --command pretrain needs one")
    try:
        micro_batch(recipe.train, World(0, job.world))
    except RecipeError as error:
        raise RecipeError(f"{job.nodes} nodes × {job.per_node} ranks: {error}") from None
    if recipe.train.batch_size % recipe.data.divide:
        raise RecipeError(
            f"data.divide={recipe.data.divide} must divide train.batch_size="
            f"{recipe.train.batch_size}"
        )
    return recipe


def script(job: Job, call: Sequence[str] = ()) -> str:
    """The text of the script.

    Args:
        job: What is to run.
        call: Words that made it, for its first lines.

    Raises:
        RecipeError: see :func:`check`.
    """
    import jinja2

    from fmrizoo.trainer.device import World
    from fmrizoo.trainer.zero import accumulation, micro_batch

    recipe = check(job)
    folder = files("fmrizoo.cluster").joinpath("templates")
    env = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    aurora = job.scheduler == "aurora"
    cores = job.cores or (8 if aurora else 0)
    world = World(0, job.world)
    text = env.get_template(job.system.template).render(
        job=job,
        aurora=aurora,
        call=" ".join(shlex.quote(word) for word in call),
        version=__version__,
        cores=cores,
        gpus=job.per_node if job.gpus is None else job.gpus,
        threads=cores or 1,
        divide=recipe.data.divide,
        stage=job.stage or recipe.data.stage,
        batch=recipe.train.batch_size,
        micro=micro_batch(recipe.train, world),
        steps=accumulation(recipe.train, world),
        words=" ".join(shlex.quote(word) for word in job.words),
        binding=aurora_cores(job.per_node) if aurora else "",
        interrupted=INTERRUPTED,
        file=job.script or f"{job.name}.sh",
    )
    return text.rstrip("\n") + "\n"
