"""`fmrizoo mup explain`: every parameter is shown, with the numbers that the model has."""

from __future__ import annotations

import io
import json
from typing import cast

import pytest
import torch
from mup_tiny import MOST, TASKS, model, recipe
from rich.console import Console
from typer.testing import CliRunner

from fmrizoo import screens
from fmrizoo.cli import app
from fmrizoo.errors import RecipeError
from fmrizoo.mup import Parametrization
from fmrizoo.mup.explain import collapse, explain

RECIPE = "pretrain/haxby_swin4d_simmim"
MUP = [
    "parametrization.name=mup",
    "backbone.embed_dim=48",
    "backbone.num_heads=[4,8]",
    "parametrization.base={embed_dim: 24, num_heads: [2, 4]}",
]


@pytest.mark.parametrize(("backbone", "part"), MOST)
def test_rows_are_what_the_model_has(backbone: str, part: str) -> None:
    made = recipe(backbone, part, 4)
    _, rows = explain(made, TASKS)
    torch.manual_seed(0)
    built = model(made)
    parameters = dict(built.named_parameters())
    groups = cast(Parametrization, built.parametrization).groups(built)
    assert [row.name for row in rows] == list(parameters)
    for row in rows:
        parameter, scales = parameters[row.name].detach(), groups[row.name]
        assert row.shape == tuple(parameter.shape)
        assert row.wd == (scales.wd_scale if scales.decays else 0)
        assert (row.lr, row.eps) == (scales.lr_scale, scales.eps_scale)
        if row.init_std == 0:
            assert torch.allclose(parameter, torch.tensor(row.init_mean)), row.name
        elif parameter.numel() > 400:  # a small one's s.d. is a matter of chance
            assert float(parameter.std()) == pytest.approx(row.init_std, rel=0.3), row.name


@pytest.mark.parametrize(("backbone", "part"), MOST)
def test_collapsed_rows_stand_for_all(backbone: str, part: str) -> None:
    _, rows = explain(recipe(backbone, part, 2), TASKS)
    few = collapse(rows)
    assert sum(row.count for row in few) == len(rows)
    assert len({(row.name, row.shape) for row in few}) == len(few)
    if backbone == "swin_factorized":
        assert len(few) < 0.7 * len(rows)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_the_page(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    made, rows = explain(recipe("swin_factorized", "simmim_mlp", 4))
    console.print(
        screens.mup_table(made, collapse(rows), len(rows), recipe("swin4d", "none").train, width)
    )
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    names = {line.split()[0].strip(".") for line in text.splitlines() if line.strip()}
    for row in collapse(rows):  # whole, or in two pieces that end at dots
        parts = row.name.split(".")[1:]
        cuts = [(".".join(parts[:i]), ".".join(parts[i:])) for i in range(len(parts))]
        assert any({*cut} - {""} <= names for cut in cuts), row.name
    text = " ".join(text.split())
    assert "…" not in text, "nothing is cut off"
    assert "output 0.25" in text and "hidden" in text and "4 times the base width" in text


def test_the_command_prints_the_table_and_json() -> None:
    done = CliRunner().invoke(app, ["mup", "explain", RECIPE, *MUP])
    assert done.exit_code == 0, done.output
    assert "2 times the base width (embed_dim=24, num_heads=[2, 4])" in " ".join(
        done.output.split()
    )
    done = CliRunner().invoke(app, ["mup", "explain", RECIPE, *MUP, "--json"])
    values = json.loads(done.output)
    rows = {row["name"]: row for row in values["table"]}
    assert values["m"] == 2 and len(values["sha256"]) == 64
    hidden = rows["backbone.layers.0.blocks.0.attn.qkv.weight"]
    assert (hidden["role"], hidden["lr"], hidden["wd"], hidden["m"]) == ("hidden", 0.5, 2, 2)
    assert hidden["init_std"] == pytest.approx((3 * 48) ** -0.5, rel=0.1)
    assert rows["objective.decoder.space_project.weight"]["init_std"] == 0
    every = CliRunner().invoke(app, ["mup", "explain", RECIPE, *MUP, "--every"])
    assert len(every.output.splitlines()) > len(rows)


def test_a_fine_tuning_recipe_is_explained_without_data() -> None:
    done = CliRunner().invoke(
        app,
        [
            "mup",
            "explain",
            "finetune/haxby_slice_lora",
            "--json",
            *MUP[:1],
            "parametrization.base={embed_dim: 12, num_heads: [1, 2]}",
        ],
    )
    assert done.exit_code == 0, done.output
    roles = {row["name"]: row["role"] for row in json.loads(done.output)["table"]}
    assert roles["backbone.layers.0.blocks.0.attn.qkv.lora_A.default.weight"] == "hidden"
    assert roles["head.project.weight"] == "output"


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    explain(recipe("neuromamba", "simmim_linear", 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_muP_there_is_nothing_to_explain() -> None:
    with pytest.raises(RecipeError, match=r"name=sp: add parametrization.name=mup"):
        explain(recipe("swin4d", "none", name="sp"))
