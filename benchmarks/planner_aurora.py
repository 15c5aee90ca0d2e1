"""The source's scaling table of a 4.1B model on Aurora: fit on 1–16 nodes, predict 64–512.

    python benchmarks/planner_aurora.py [--trace]

The table (SCIENCE §7) tells neither the clips of a step nor those of a rank. So the prediction is
printed for several local batches. ``--trace`` counts the model's FLOPs anew (a minute) in place of
the number below. Two constants are fitted, on rows 1, 4 and 16 alone.
"""

from __future__ import annotations

import argparse

from fmrizoo.cluster.machines import load_machine
from fmrizoo.cluster.steptime import Run, fit, throughput

TABLE = ((1, 27.44), (4, 83.85), (16, 276.29), (64, 877.98), (256, 2934.31), (512, 4251.88))
FITTED = 3  # rows
# recipes/pretrain/sizes/swin4d_3B without checkpointing, as the planner traces it (--trace).
PARAMETERS, FLOPS = 4_049_670_144, 17_979_641_167_872


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", action="store_true")
    parameters, flops = PARAMETERS, FLOPS
    if parser.parse_args().trace:
        from fmrizoo.cluster.trace import trace_step
        from fmrizoo.zoo import load_recipe

        recipe = load_recipe("pretrain/sizes/swin4d_3B", ["train.checkpointing=none"])
        found = trace_step(recipe, 1)
        parameters, flops = found.trained, found.flops
    aurora = load_machine("aurora")
    print(f"{parameters / 1e9:.2f}B parameters, {flops / 1e12:.1f} TFLOP a clip")
    cases = [(clips, 0) for clips in (1, 2, 4)] + [(2, 6144), (4, 6144), (4, 12288), (8, 6144)]
    for clips, batch in cases:
        run = Run(parameters, flops, clips, batch)
        machine = fit(run, aurora, TABLE[:FITTED])
        said = f"of a batch of {batch}" if batch else "on every rank, always"
        print(
            f"\n{clips} clips {said}: {machine.rate('bf16') / 1e12:.0f} TFLOP/s a tile "
            f"({machine.efficiency['bf16']:.0%} of peak), "
            f"{machine.inter_efficiency * machine.inter_bandwidth / 1e9:.0f} GB/s a node "
            f"({machine.inter_efficiency:.0%} of the NICs)"
        )
        for number, (nodes, measured) in enumerate(TABLE):
            got = throughput(run, machine, nodes)
            role = "fitted" if number < FITTED else "predicted"
            print(
                f"  {nodes:4} nodes {measured:8.1f} clips/s, model {got:8.1f} "
                f"{got / measured - 1:+6.1%} {role}"
            )


if __name__ == "__main__":
    main()
