"""``fmrizoo analyze …`` and ``fmrizoo list backbones`` as typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import fmrizoo
from fmrizoo import screens
from fmrizoo.analysis import memory
from fmrizoo.analysis.memory import MemoryRow, read_memory
from fmrizoo.cli import app
from fmrizoo.errors import FmrizooError, RecipeError
from fmrizoo.pipeline import pretrain
from fmrizoo.zoo import load_recipe

Run = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """``cli("list", "backbones")`` in this process, in an empty folder, 80 columns wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)

    return run


def test_autocorrelation_of_runs_as_typed(cli: Run, sample_store: Path, tiny: list[str]) -> None:
    given = [f"data.store={sample_store}", *tiny, "train.steps=1", "train.validate_every=0"]
    pretrain(load_recipe("pretrain/haxby_slice", given), Path("runs/[a]"))
    done = cli("analyze", "autocorrelation", "runs/[a]", "--clips", "3")
    assert done.exit_code == 0
    assert done.stdout.startswith("runs/[a]: ") and done.stdout.count("\n") == 1
    assert "at multiples of the window, 4 slots = 10 s: " in done.stdout
    found = json.loads(Path("runs/[a]/analysis.json").read_text())
    assert found["schema"] == "fmrizoo.analysis/1"
    assert found["autocorrelation"]["clips"] == 3
    with pytest.raises(FmrizooError, match="gone holds no exported model"):
        cli("analyze", "autocorrelation", "gone")


def test_memory_as_typed(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def one(recipe: str, mode: str, frames: int, sized: list[str], device: str) -> MemoryRow:
        asked.append((recipe, mode, frames, sized[0]))
        failed = "stopped by signal 9" if frames == 40 else ""
        mb = None if failed else 1234.5
        words = ("swin4d", "simmim", 7, mode, frames, (96, 96, 96), "bf16", device, mb, failed)
        return MemoryRow(recipe, *words)

    monkeypatch.setattr(memory, "_in_a_process", one)
    done = cli(
        "analyze", "memory", "swin4d_simmim", "train.precision=fp32", "--frames", "20,40",
        "--checkpointing", "none,block", "--out", "measured",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert asked == [
        ("swin4d_simmim", mode, frames, "train.precision=fp32")
        for mode in ("none", "block")
        for frames in (20, 40)
    ]
    assert "1,234" in done.stdout and "stopped by signal 9" in done.stdout
    rows = read_memory(Path("measured/memory.json"))
    assert [(r.frames, r.mb) for r in rows] == [(20, 1234.5), (40, None)] * 2
    for frames in ("20,x", "", "0"):
        with pytest.raises(RecipeError, match="--frames takes positive numbers"):
            cli("analyze", "memory", "swin4d_simmim", "--frames", frames, "--out", "other")
    assert not Path("other").exists()


def test_backbones_are_listed_with_their_sizes(cli: Run) -> None:
    text = cli("list", "backbones").stdout
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.splitlines()]
    for name in fmrizoo.list_backbones():
        assert any(line[:1] == [name] for line in lines)
    assert ["51M", "50.9M", "138.3M", "40,960", "105", "96×96×96×20"] in lines
    assert ["default", "4.3M", "81,920", "21.1", "96×96×96×20"] in lines
    assert any("of" in line and line[0] == "3.1M" for line in lines), "brain patches of all"
    rows = json.loads(cli("list", "backbones", "swin4d", "--json").stdout)
    (row,) = rows
    assert row["sizes"][0]["parameters"] == 4_315_212
    assert [s["name"] for s in row["sizes"]][-1] == "13.4B"


def test_a_backbone_that_cannot_be_built_here_is_listed_all_the_same() -> None:
    console = Console(width=80, record=True, file=StringIO())
    console.print(screens.backbones([{"name": "other", "about": "It needs more.", "sizes": None}]))
    text = console.export_text()
    assert "other  It needs more." in text and "cannot be built here" in text
    assert "Sizes are recipes" not in text
