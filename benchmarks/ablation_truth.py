"""Does an ablation find what is planted, and nothing else? On synthetic people.

    python benchmarks/ablation_truth.py [--nulls 200] [--folder DIR]

1. *What should win wins.* Two conditions, each with a response in a network of its own. Cells:
   clips at the response's peak (the reference); clips of the same blocks long after it, which hold
   almost nothing; and a twin that differs in what cannot matter.
2. *What has no effect is not called significant.* Columns of participants.tsv drawn at random, as
   many as ``--nulls``; every one is a target of its own in two cells. Counted: paired p ≤ 0.05
   between the cells, p ≤ 0.05 of a cell against chance, and of the linear baselines.

Models are tiny (tens of thousands of parameters): what is tested is the machinery around them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binomtest

if TYPE_CHECKING:
    from fmrizoo.pipeline.ablation import Found

GRID = ["prepare.grid=[16,16,16]", "prepare.voxel_size=[12,12,12]"]


def run(overrides: list[str], out: Path) -> Found:
    """``ablation/planted``, changed."""
    from fmrizoo.pipeline.ablation import ablate, plan

    found = ablate(plan("ablation/planted", overrides), out)
    assert found is not None
    return found


def planted(folder: Path) -> None:
    """Part 1."""
    from fmrizoo.data.synthetic.config import load_synth_config
    from fmrizoo.data.synthetic.write import synthesise

    design = ["conditions={house: 2.0, face: 2.0}", "pause=24", "frames=170", "subjects=24"]
    synthesise(folder / "planted", load_synth_config(None, [*GRID, *design]), store=True)
    found = run([f"data.store={folder / 'planted'}"], folder / "planted-out")
    (column,) = found.table.columns
    print("| row | accuracy | rank |\n| --- | --- | --- |")
    for line in found.table.lines:
        place = line.standing.get("all")
        score = line.score(column)
        rank = place.rank if place else ""
        print(f"| {line.name} | {'–' if score is None else f'{score:.3f}'} | {rank} |")
    for one in found.pairs:
        print(
            f"{one.first} − {one.second}: {one.gap.mean:+.3f} [{one.gap.low:+.3f}, "
            f"{one.gap.high:+.3f}], Holm's p {one.adjusted:.4f}: {one.better}"
        )


def nulls(folder: Path, count: int) -> None:
    """Part 2."""
    from fmrizoo.data.synthetic.config import load_synth_config
    from fmrizoo.data.synthetic.write import synthesise
    from fmrizoo.evaluate.statistics import permutation_p

    people = 80
    settings = [*GRID, f"subjects={people}", "frames=60", "traits={}"]
    synthesise(folder / "nulls", load_synth_config(None, settings), store=True)
    rng = np.random.default_rng(1)
    names = [f"null{k:03d}" for k in range(count)]
    columns = [rng.permutation(np.arange(people) % 2) for _ in names]
    path = folder / "nulls" / "participants.tsv"
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(
            "\t".join([line.split("\t")[0], *cells])
            for line, cells in zip(
                lines,
                [names, *(["ab"[c[k]] for c in columns] for k in range(people))],
                strict=True,
            )
        )
        + "\n"
    )
    targets = ", ".join(f"{name}: classification" for name in names)
    task = [
        f"task.targets={{{targets}}}",
        "task.source=participants",
        "task.level=subject",
    ]
    found = run(
        [
            f"data.store={folder / 'nulls'}",
            "data.clip_frames=20",
            "data.normalization=znorm_minback",
            "backbone.img_size=[16,16,16,20]",
            "ablate.axes={ISM: [znorm_minback, voxel]}",
            f"ablate.tasks.conditions.overrides={json.dumps(task)}",
        ],
        folder / "nulls-out",
    )
    shares = {"cell against cell, paired": [one.gap.p for one in found.pairs]}
    for line in found.table.lines:
        ps = [
            permutation_p(tables, "classification", "accuracy")
            for tables in line.tables.values()
            if any(tables)
        ]
        if known := [p for p in ps if p is not None]:
            shares[f"{line.name} against chance"] = known
    print("\n| null tests | n | p ≤ 0.05 | 95 % interval |\n| --- | --- | --- | --- |")
    for name, ps in shares.items():
        hits = sum(p <= 0.05 for p in ps)
        ends = binomtest(hits, len(ps)).proportion_ci()
        print(f"| {name} | {len(ps)} | {hits / len(ps):.1%} | {ends.low:.1%} – {ends.high:.1%} |")
    called = sum(one.better != "not clear" for one in found.pairs)
    print(f"called better or worse in the table: {called} of {len(found.pairs)} pairs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nulls", type=int, default=200)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.basicConfig(level="ERROR")
    folder = given.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    planted(folder)
    nulls(folder, given.nulls)


if __name__ == "__main__":
    main()
