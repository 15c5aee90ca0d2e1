"""Tables for the terminal, made from plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fmrizoo.trainer.accounting import count, megabytes

if TYPE_CHECKING:
    from fmrizoo.analysis.heads import HeadRow
    from fmrizoo.analysis.memory import MemoryRow
    from fmrizoo.analysis.mup_transfer import Transfer
    from fmrizoo.config import TrainConfig
    from fmrizoo.evaluate.certainty import Certainty, Tables
    from fmrizoo.evaluate.results import Result
    from fmrizoo.evaluate.summary import Row
    from fmrizoo.mup import Parametrization
    from fmrizoo.mup.explain import Row as RuleRow
    from fmrizoo.pipeline.ablation.cells import Cell
    from fmrizoo.pipeline.ablation.results import Ablation, Line
    from fmrizoo.trainer.profile import Breakdown


def backbones(rows: Sequence[dict[str, Any]]) -> Group:
    """Every backbone with a table of its sizes (``None``: it cannot be built here)."""
    shown: list[RenderableType] = []
    for row in rows:
        shown.append(Text.assemble((row["name"], "bold"), "  ", row["about"]))
        if row["sizes"] is None:
            shown.append(Text("  cannot be built here: a package is missing"))
        else:
            shown += [_sizes(row["sizes"]), Text()]
    sizes = [size for row in rows for size in row["sizes"] or ()]
    said = "Parameters: of the encoder, and with what its recipe's objective adds. GFLOP: one "
    said += "forward pass of the encoder over one clip."
    if any(size["brain_tokens"] < size["tokens"] for size in sizes):
        said += " “a of b”: a is left of b without the patches outside a ball as large as "
        said += "a brain (36 % of all meet it; with data, each clip's own mask decides)."
    if any(size["recipe"] for size in sizes):
        said += " Sizes are recipes: pretrain/sizes/<name>_<size>."
    return Group(*shown, Text(said, style="dim"))


def _sizes(sizes: Sequence[dict[str, Any]]) -> Table:
    """One line per size; the same widths for every backbone, so that columns line up."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("", min_width=1)
    table.add_column("size", min_width=7)
    for name, width in (("encoder", 7), ("whole", 7), ("tokens", 16), ("GFLOP", 15)):
        table.add_column(name, justify="right", min_width=width)
    table.add_column("clip")
    for size in sizes:
        table.add_row(
            "",
            size["name"],
            _count(size["parameters"]),
            _count(size["whole"]) if size["whole"] else "",
            _of(size["brain_tokens"], size["tokens"]),
            _of(size["brain_gflop"], size["gflop"]),
            "×".join(map(str, size["clip"])),
        )
    return table


def _count(parameters: int) -> str:
    if parameters >= 1e9:
        return f"{parameters / 1e9:.2f}B"
    return f"{parameters / 1e6:.1f}M"


def _of(part: float, whole: float) -> str:
    def shown(value: float) -> str:
        return f"{value:,.1f}" if value < 100 and value != int(value) else f"{value:,.0f}"

    return shown(whole) if part >= whole else f"{shown(part)} of {shown(whole)}"


def heads(title: str, rows: Sequence[HeadRow]) -> Group:
    """What each head trains of one encoder, and what its optimizer holds."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for name in ("head", "trains"):
        table.add_column(name)
    for name in ("of the encoder", "adds", "frozen", "optimizer", "in bf16"):
        table.add_column(name, justify="right")
    refused: list[RenderableType] = []
    for row in rows:
        if row.fp32 is None or row.bf16 is None:
            refused.append(Text(f"{row.head}: {row.refused}", style="dim"))
            continue
        found = row.fp32
        share = f"{count(found.encoder_trained)} = {found.encoder_share:.1f} %"
        table.add_row(
            row.head,
            row.trains,
            share if found.encoder_trained else "–",
            count(found.added_trained),
            count(found.frozen),
            megabytes(found.optimizer_bytes),
            megabytes(row.bf16.optimizer_bytes),
        )
    size = next((row.fp32.encoder for row in rows if row.fp32), 0)
    said = (
        f"{title}: {count(size)} parameters. Each head with its default settings, for one target "
        "with two classes. Optimizer: AdamW's moments, and in bf16 fp32 weights; ranks share it."
    )
    return Group(Text(said, style="dim"), table, *refused)


def results(found: Sequence[Result], tables: Tables | None = None) -> Group:
    """A table for each target: one line a row name, over folds and seeds, the best first.

    Args:
        found: The results.
        tables: Predictions by row; a row without them has no interval and no p.
    """
    from itertools import groupby

    from fmrizoo.evaluate.certainty import certainty, key
    from fmrizoo.evaluate.summary import rows

    shown: list[RenderableType] = []
    for task, own in groupby(rows(found), key=lambda row: row.task):
        sure = [(row, certainty(row, (tables or {}).get(key(row), []))) for row in own]
        shown.append(_scores(task.target, sure))
    return Group(*shown)


def _scores(target: str, rows: Sequence[tuple[Row, Certainty | None]]) -> Table:
    from fmrizoo.evaluate.metrics import PRIMARY

    metric = PRIMARY[rows[0][0].task.kind].replace("_", " ")
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column(target)
    for name in (f"{metric} ± s.d.", "95 %", "p", "seeds×folds", "units", "chance"):
        table.add_column(name, justify="right")
    for row, sure in rows:
        if row.primary is None:
            table.add_row(row.name, "not applicable")
            continue
        deviation = "" if row.primary.std is None else f" ± {row.primary.std:.3f}"
        within = sure.interval if sure else None
        known = within is not None and within.low is not None and within.high is not None
        table.add_row(
            row.name,
            f"{row.primary.mean:.3f}{deviation}",
            f"{within.low:.2f}…{within.high:.2f}" if within is not None and known else "",
            f"{sure.p:.3f}" if sure and sure.p is not None else "",
            f"{row.n_seeds} × {row.n_folds}",
            str(row.n_units),
            "" if row.chance is None else f"{row.chance:.3f}",
        )
    return table


def memory(rows: Sequence[MemoryRow]) -> Table:
    """One line per measurement."""
    table = Table("recipe", "checkpointing")
    for name in ("frames", "MB"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        mb = "–" if row.mb is None else f"{row.mb:,.0f}"
        table.add_row(row.recipe, row.checkpointing, str(row.frames), mb, row.note)
    return table


def profile(found: Breakdown) -> Group:
    """Where the time of a step goes."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("phase")
    for name in ("ms a step", "share"):
        table.add_column(name, justify="right")
    for name, value in found.phases.items():
        share = value / found.step if found.step else 0.0
        table.add_row(name, f"{value:,.2f}", f"{share:.1%}", end_section=name == "other")
    table.add_row("step", f"{found.step:,.2f}", "", style="bold")
    said = (
        f"Mean of {found.measured} of {found.steps} steps from step {found.first} on, rank 0; "
        f"the slowest took {found.slowest:,.2f} ms. The first step and traced ones count only "
        "where there are no others. Validation and checkpoints are not in it."
    )
    return Group(table, Text(said, style="dim"))


def mup_table(
    made: Parametrization,
    rows: Sequence[RuleRow],
    parameters: int,
    train: TrainConfig,
    width: int = 120,
) -> Group:
    """How parameters start and learn: a line each, or for several alike.

    On pages of less than 100 columns there is no m, which the role says too.
    """
    columns = ["", "role", "shape", "m", "start", "lr", "decay", "ε"]
    lines = [dict(zip(columns, _rule_cells(row), strict=True)) for row in rows]
    if width < 100:
        columns.remove("m")
    taken = sum(2 + max(len(c), *(len(line[c]) for line in lines)) for c in columns)
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("parameter", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="left" if name == "role" else "right", no_wrap=True)
    part = ""
    for row, line in zip(rows, lines, strict=True):
        above, _, name = row.name.partition(".")
        if above in ("backbone", "objective", "head"):
            if above != part:
                table.add_row(Text(above, style="bold"))
            part = above
        else:
            name = row.name
        *first, last = _at_dots(name, width - taken)
        for piece in first:
            table.add_row(piece)
        table.add_row(last, *(line[column] for column in columns))
    base = ", ".join(f"{key}={value}" for key, value in made.base.items())
    factors = made.multipliers
    said = f"muP: {made.m:g} times the base width ({base}). {parameters} parameters. "
    said += f"Multipliers: output {factors.output / made.m:.4g}, input {factors.input:g}, "
    said += f"attention {factors.attention:g}"
    if made.attention:
        sizes = ", ".join(f"{value:.4g}" for value in dict.fromkeys(made.attention.values()))
        said += f" × {sizes} (√ of base head_dim ÷ head_dim)"
    if made.depth is not None:
        said += f", residual branches {', '.join(f'{ratio:.4g}' for ratio in made.depth.ratios)}"
    said += f". Table {made.sha256[:12]}."
    notes = "m: width of its input ÷ at base width. " if "m" in columns else ""
    notes += (
        "start: ± s.d., or the constant. lr, decay, ε: × "
        f"train.lr={train.lr:g}, × train.weight_decay={train.weight_decay:g} (–: none), × "
        f"train.eps={train.eps:g}."
    )
    return Group(Text(said), Text(), table, Text(), Text(notes, style="dim"))


def _rule_cells(row: RuleRow) -> tuple[str, ...]:
    return (
        f"×{row.count}" if row.count > 1 else "",
        row.role,
        "×".join(map(str, row.shape)),
        f"{row.m:g}",
        f"{row.init_mean:.2g}" if not row.init_std else f"± {row.init_std:.2g}",
        f"{row.lr:.4g}",
        f"{row.wd:.4g}" if row.wd else "–",
        f"{row.eps:.4g}",
    )


def _at_dots(name: str, width: int) -> list[str]:
    """``name`` in lines of at most ``width``, broken before dots; what goes on is indented."""
    found, line = [], ""
    for number, word in enumerate(name.split(".")):
        piece = f".{word}" if number else word
        if line and len(line) + len(piece) > width:
            found.append(line)
            line = "  "
        line += piece
    return [*found, line]


def transfer_table(found: Transfer) -> Table:
    """Best learning rate and what the base width's costs, a line per width."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column(found.name, justify="right")
    for name in ("best rate", f"{found.which} loss", "at the base's rate", "regret"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(
            str(row.width),
            f"2^{row.log2:.2f}{' (edge)' if row.edge else ''}".replace("-", "−"),
            f"{row.loss:.4f}",
            f"{row.at_base_rate:.4f}",
            f"{row.regret:.1%}",
        )
    return table


def cells(found: Sequence[Cell]) -> Table:
    """What an ablation will compare, and what its encoders cost."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("cell")
    for name in ("encoder", "GFLOP/clip", "tokens/clip", "clips seen"):
        table.add_column(name, justify="right")
    for cell in found:
        clips = f"{cell.size.clips:,}" if cell.pretraining else "–"
        gflop = f"{cell.size.flops / 1e9:,.3g}"
        table.add_row(cell.name, count(cell.size.parameters), gflop, f"{cell.size.tokens:,}", clips)
    return table


def ablation(found: Ablation) -> Group:
    """Mean ± s.d. per task, sums of z-scores and ranks, and cost; then what was trained beside."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("")
    for column in found.columns:
        table.add_column(f"{column.name}\n{column.metric}", justify="right")
    for subset in found.subsets:
        table.add_column(f"z-sum\n{subset}", justify="right")
        table.add_column("rank", justify="right")
    table.add_column("encoder", justify="right")
    table.add_column("pretrain s", justify="right")
    ranked = sorted(
        found.of("cell"), key=lambda line: line.standing["all"].rank or len(found.lines)
    )
    groups = (ranked, found.of("control"), found.of("baseline"))
    for lines in groups:
        for line in lines:
            table.add_row(*_ablated(found, line), end_section=line is lines[-1])
    notes = [
        Text(f"{line.name}, {column}: {gap}", style="yellow")
        for line in found.lines
        for column, gap in line.gaps.items()
    ]
    return Group(table, *notes)


def _ablated(found: Ablation, line: Line) -> list[str]:
    cells = [line.name]
    for column in found.columns:
        row = line.rows.get(column.name)
        spread = row.spreads[column.metric] if row else None
        shown = "–"
        if spread is not None:
            shown = f"{spread.mean:.3f}"
            shown += "" if spread.std is None else f" ± {spread.std:.3f}"
        cells.append(shown + ("*" if column.name in line.gaps else ""))
    for subset in found.subsets:
        place = line.standing.get(subset)
        known = place is not None and place.total is not None
        cells += [f"{place.total:+.2f}", str(place.rank)] if place and known else ["", ""]
    cost = line.cost
    cells.append(count(cost.parameters) if cost else "")
    cells.append(f"{cost.pretraining:.0f}" if cost and cost.pretraining is not None else "")
    return cells
