"""What heads train of an encoder, as `fmrizoo list heads --backbone` prints it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from typer.testing import CliRunner

import fmrizoo
from fmrizoo.analysis.heads import TWO_CLASSES, backbone_section, heads_of
from fmrizoo.cli import app
from fmrizoo.config import compose
from fmrizoo.errors import RecipeError
from fmrizoo.registry import BACKBONES, HEADS
from fmrizoo.trainer.engine import param_groups

SMALL = {"img_size": [8, 8, 8, 4], "embed_dim": 12, "patch_size": [2, 2, 2, 2]}


@pytest.mark.parametrize("name", BACKBONES.list())
def test_rows_count_what_an_optimizer_gets(name: str) -> None:
    rows = heads_of(backbone_section(name)[1])
    assert len(rows) == sum(len(HEADS[h].factory.variants) for h in HEADS.list()) >= 6
    assert {row.trains for row in rows} == {"none", "last_block", "all", "lora", "prompts"}
    whole = next(row.fp32 for row in rows if row.trains == "all")
    assert whole is not None
    # The v1 form of swin4d carries a norm (2 × 288) that no one ever trains.
    assert whole.encoder - whole.encoder_trained == (576 if name == "swin4d" else 0)
    for row in rows:
        assert row.fp32 is not None and row.bf16 is not None
        assert row.fp32.encoder == whole.encoder
        assert row.fp32.optimizer_bytes == 8 * row.fp32.trained
        assert row.bf16.optimizer_bytes == 12 * row.fp32.trained


def test_counts_are_those_of_a_built_model() -> None:
    section = {"name": "swin4d", **SMALL, "depths": [2, 2], "num_heads": [1, 2]}
    for row in heads_of(compose({"backbone": section}).backbone):
        settings = dict(text.split("=") for text in row.settings.split(", ") if text)
        model = fmrizoo.build(
            backbone=section, head={"name": row.head, **settings}, task=TWO_CLASSES
        )
        train = compose({"train": {}}).train
        given = sum(p.numel() for group in param_groups(model, train) for p in group["params"])
        assert row.fp32 is not None and row.fp32.trained == given, row.head


def test_the_last_block_of_the_51M_models_is_about_30_percent() -> None:
    for name in ("swin4d", "swin_factorized"):
        section = backbone_section(f"pretrain/sizes/{name}_51M")[1]
        (row,) = (r for r in heads_of(section, "linear") if r.trains == "last_block")
        assert row.fp32 is not None and 27 < row.fp32.encoder_share < 31


def test_a_head_that_the_encoder_cannot_have_is_listed_with_the_reason() -> None:
    @dataclass
    class PickyConfig(HEADS["linear"].config):  # type: ignore[misc, name-defined]
        """A head that wants wings."""

        name: str = "picky"

    class Picky(HEADS["linear"].factory):  # type: ignore[misc, name-defined]
        needs = frozenset({"wings"})
        variants = ({},)

    HEADS.register("picky", PickyConfig)(Picky)
    try:
        (row,) = heads_of(backbone_section("swin4d")[1], "picky")
        assert row.fp32 is None and "takes wings" in str(row.refused)
        done = CliRunner().invoke(app, ["list", "heads", "picky", "--backbone", "swin4d"])
        assert done.exit_code == 0 and "picky: head 'picky' needs a backbone" in done.output
    finally:
        del HEADS._entries["picky"]


def test_the_table_and_its_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    given = ["list", "heads", "--backbone", "pretrain/sizes/swin4d_51M"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0 and max(map(len, done.output.splitlines())) <= 80
    assert "14.2 M = 27.9 %" in done.output and "…" not in done.output
    rows = json.loads(CliRunner().invoke(app, [*given, "--json"]).output)
    assert {row["head"] for row in rows} == set(HEADS.list())
    assert rows[0]["fp32"]["encoder"] > 50_000_000


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("swin4", "neither a backbone nor a recipe. Did you mean 'swin4d'"),
        ("finetune/haxby_slce", "Did you mean 'finetune/haxby_slice'"),
    ],
)
def test_unknown_backbones_are_refused(name: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        backbone_section(name)
