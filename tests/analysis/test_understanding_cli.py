"""``fmrizoo analyze similarity | attribution | lesion | spectrum`` as typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fmrizoo.cli import app
from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.pipeline import finetune, pretrain
from fmrizoo.zoo import load_recipe

Run = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """``cli("analyze", …)`` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)

    return run


@pytest.fixture(scope="module")
def runs(sample_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    given = [
        f"data.store={sample_store}", "backbone.embed_dim=8", "backbone.num_heads=[1,2]",
        "train.batch_size=4", "train.validate_every=0", "train.steps=2",
    ]  # fmt: skip
    pretrain(load_recipe("pretrain/haxby_slice", given), out / "pretrained")
    more = [f"init_from={out / 'pretrained'}", "head.train_encoder=all"]
    finetune(load_recipe("finetune/haxby_slice", [*given, *more]), out / "tuned")
    return out


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_similarity_and_forgetting(cli: Run, runs: Path) -> None:
    done = cli("analyze", "similarity", runs / "tuned", "--forgetting", "--clips", "8", "-o", "s")
    assert done.exit_code == 0
    assert "CKA stage by stage: " in done.stdout and "pretraining loss: " in done.stdout
    assert is_picture(Path("s/similarity.png"))
    assert json.loads(Path("s/similarity.json").read_text())["pretraining_loss"]
    alone = cli("analyze", "similarity", runs / "pretrained", "--clips", "8", "-o", "alone")
    assert "CKA stage" not in alone.stdout and "written: " in alone.stdout
    with pytest.raises(RecipeError, match="started from random weights"):
        cli("analyze", "similarity", runs / "pretrained", "--forgetting", "-o", "x")
    with pytest.raises(RecipeError, match="by itself: give one run"):
        cli("analyze", "similarity", runs / "tuned", runs / "tuned", "--forgetting", "-o", "x")


@pytest.mark.parametrize("atlas", [(), ("--atlas", "cubes:8")], ids=["no atlas", "atlas"])
def test_attribution(cli: Run, runs: Path, atlas: tuple[str, ...]) -> None:
    done = cli(
        "analyze", "attribution", runs / "tuned", "--clips", "2", "--sanity", "1", "--steps",
        "8", *atlas, "-o", "a",
    )  # fmt: skip
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    assert "2 clips of 1 subject: score − baseline" in text and "sum of attributions off by" in text
    assert "with a model randomised down to: head " in text
    assert is_picture(Path("a/attribution.png"))
    assert Path("a/attribution_signed.nii.gz").is_file()
    assert Path("a/parcels.tsv").is_file() == bool(atlas)
    with pytest.raises(CheckpointError, match="without a head: fine-tune it first"):
        cli("analyze", "attribution", runs / "pretrained", "-o", "x")


def test_lesion(cli: Run, runs: Path) -> None:
    done = cli("analyze", "lesion", runs / "tuned", "--atlas", "cubes:8", "--clips", "6", "-o", "l")
    assert done.exit_code == 0
    assert "regions, 6 units: worst without cube " in " ".join(done.stdout.split())
    assert is_picture(Path("l/lesion.png")) and Path("l/lesions.tsv").is_file()


def test_spectrum(cli: Run, runs: Path) -> None:
    done = cli("analyze", "spectrum", runs / "pretrained", "--band", "0.02,0.15", "-o", "w")
    assert done.exit_code == 0
    assert "slope 0.02 to 0.15 Hz: embeddings " in " ".join(done.stdout.split())
    assert is_picture(Path("w/spectrum.png"))
    found = json.loads(Path("w/spectrum.json").read_text())
    assert found["band"] == [0.02, 0.15] and found["slots"] == 120 and found["clip_slots"] == 8
    for band in ("0.1", "0.2,0.1", "a,b", "0,1"):
        with pytest.raises(RecipeError, match="--band takes LOW,HIGH"):
            cli("analyze", "spectrum", runs / "pretrained", "--band", band, "-o", "x")
