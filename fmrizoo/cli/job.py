"""``fmrizoo job``: a script for a batch system, to read before it is submitted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fmrizoo.cli.shell import Overrides, RecipeName, app, err

Command = Annotated[
    str, typer.Option(help="pretrain, finetune, ablate, sweep (scaling) or transfer (mup).")
]
Ranks = Annotated[
    int, typer.Option(help="Processes a node: one a GPU; Aurora's 12 tiles if not given.")
]
Script = Annotated[
    Path | None, typer.Option("--out", "-o", help="File to write; else stdout.", show_default=False)
]


@app.command(no_args_is_help=True)
def job(
    scheduler: Annotated[str, typer.Argument(help="slurm, pbs or aurora.")],
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    nodes: Annotated[int, typer.Option(help="Of one job.")],
    ranks: Ranks = 0,
    time: Annotated[str, typer.Option(help="Walltime, hours:minutes:seconds.")] = "1:00:00",
    command: Command = "pretrain",
    gpus: Annotated[
        int | None, typer.Option(help="A node; one a rank if not given.", show_default=False)
    ] = None,
    cores: Annotated[int, typer.Option(help="CPU cores a rank; 0: a line to fill in.")] = 0,
    account: Annotated[str, typer.Option(help="Who pays.")] = "",
    queue: Annotated[str, typer.Option(help="Queue or partition.")] = "",
    array: Annotated[int, typer.Option(help="Parts of a job array (--part K/N).")] = 0,
    stage: Annotated[str, typer.Option(help="Node memory to copy runs to: /dev/shm.")] = "",
    warn: Annotated[int, typer.Option(help="Seconds to save in, before the end.")] = 300,
    resumes: Annotated[int, typer.Option(help="How often it may go on by itself.")] = 20,
    name: Annotated[str, typer.Option(help="Of the job.")] = "fmrizoo",
    folder: Annotated[
        str, typer.Option(help="Of the run; runs/NAME if not given.", show_default=False)
    ] = "",
    script: Script = None,
) -> None:
    """Write a job script that saves before its time is over and queues itself again."""
    from fmrizoo.cluster.job import Job
    from fmrizoo.cluster.job import script as write

    wanted = Job(
        scheduler,
        recipe,
        tuple(overrides or ()),
        command=command,
        nodes=nodes,
        ranks=ranks,
        gpus=gpus,
        cores=cores,
        walltime=time,
        name=name,
        folder=folder,
        account=account,
        queue=queue,
        warn=warn,
        resumes=resumes,
        array=array,
        stage=stage,
        script=script.name if script else "",
    )
    text = write(wanted, ["fmrizoo", *sys.argv[1:]])
    if script is None:
        sys.stdout.write(text)
        return
    script.write_text(text, encoding="utf-8")
    err.print(
        f"wrote {script}: fill in the lines marked FILL IN, read those marked CHECK, then "
        f"{wanted.system.submit} it from its folder",
        soft_wrap=True,
    )
