"""``fmrizoo mup check``: what it writes, prints and returns."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from fmrizoo.analysis.mup_check import read_checks
from fmrizoo.cli import app
from fmrizoo.errors import RecipeError


def run(*words: str) -> tuple[int, str, BaseException | None]:
    done = CliRunner().invoke(app, ["mup", "check", "pretrain/neuromamba_ar", *words])
    return done.exit_code, done.output, done.exception


def test_both_checks_are_written_and_the_exit_code_says_whether_mup_passed(tmp_path: Path) -> None:
    code, said, _ = run("--out", str(tmp_path), "--widths", "32,64,256", "--steps", "3")
    sp, mup = read_checks(tmp_path / "mup_check.json")
    assert (sp.widths, mup.widths, mup.steps) == ((32, 64, 256), (32, 64, 256), 3)
    assert not sp.passed and mup.passed and code == 0, said
    assert f"neuromamba autoregressive mup: {mup.says}" in said
    assert (tmp_path / "mup_check.png").read_bytes().startswith(b"\x89PNG")


def test_steps_too_small_to_prove_anything_fail(tmp_path: Path) -> None:
    words = ("--widths", "32,64", "--steps", "2", "--seeds", "1", "--lr", "1e-7")
    code, said, _ = run("--out", str(tmp_path), *words)
    assert code == 1 and "proves nothing" in said


def test_widths_must_be_numbers(tmp_path: Path) -> None:
    code, _, error = run("--out", str(tmp_path), "--widths", "32,wide")
    assert code == 1 and isinstance(error, RecipeError)
    assert "--widths takes whole numbers" in str(error)
