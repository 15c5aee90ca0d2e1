"""Settings of synthetic cohorts: refusals in one sentence, files, the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fmrizoo.cli import app
from fmrizoo.config import PrepareConfig
from fmrizoo.data.prepare import prepare
from fmrizoo.data.store import Store
from fmrizoo.data.synthetic.config import SynthConfig, load_synth_config, prepare_arguments
from fmrizoo.data.synthetic.write import synthesise
from fmrizoo.errors import DataError, RecipeError

SMALL = ["prepare.grid=[16,16,16]", "prepare.voxel_size=[12,12,12]"]


def config(*overrides: str) -> SynthConfig:
    return load_synth_config(None, [*SMALL, *overrides])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["traits.age.effect=1.2"], r"traits\.age\.effect=1\.2: a correlation lies between -1"),
        (["traits.sex.effect=-0.5"], r"traits\.sex\.effect=-0\.5: Cohen's d lies between 0"),
        (["traits={iq: 0.3}"], r"traits\.iq\.kind is missing"),
        (["traits.sex=high"], r"write traits=\{sex: 0\.8\}"),
        (["traits.sex.networks=[0,9]"], r"there is no network 9, they are 0 to 7"),
        (["traits.sex.networks=[1]"], r"needs 2 for where=coupling, got \[1\]"),
        (["traits.sex.where=colour"], r"traits\.sex\.where='colour' is not known"),
        (
            ["traits={a: {kind: regression, networks: [0,1]}, b: {kind: regression, "
             "networks: [1,2]}}"],
            r"traits a and b both change the coupling of network 1",
        ),
        (["networks=2"], r"traits\.age finds no free network among 2"),
        (["traits.sex.motion=0.9", "traits.age.motion=0.9"], r"add up to more than 1"),
        (["traits={site: {kind: regression}}"], r"'site' becomes a column"),
        (["tr=0"], r"tr must be between 0\.05 and 30, got 0"),
        (["tr=20", "low=0.03"], r"no band below the 0\.025 Hz"),
        (["frames=4"], r"frames must be ≥ 8, got 4"),
        (["subjects=0"], r"subjects must be ≥ 1"),
        (["temporal=brown"], r"temporal='brown' is not known"),
        (["tsnr=nan"], r"tsnr must be between"),
        (["site_trait=iq"], r"site_trait='iq' is no trait"),
        (["prepare.space=native"], r"prepare\.space='native' does not fit"),
        (["prepare.dummy_scans=2"], r"prepare\.dummy_scans=2: synthetic runs are written"),
        (["coupling=-0.9"], r"coupling=-0\.9 must lie between"),
        (["subject=3"], r"unknown key 'subject'\. Did you mean 'subjects'"),
        (["traits.sex.levels=[a b, c]"], r"levels needs two names of letters"),
        (["conditions={a: .nan}"], r"conditions: 'a': nan: give a name"),
        (["conditions={a: 1, b: 1}", "networks=1", "traits={}"], r"2 conditions need a network"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_sentence(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        config(*overrides)


def test_bad_grids_and_folders_are_one_sentence(tmp_path: Path) -> None:
    far = config("prepare.center=[900,0,0]")
    with pytest.raises(DataError, match="no brain voxel lies on the grid"):
        synthesise(tmp_path / "far", far)
    half = config("prepare.center=[0,0,140]")
    with pytest.raises(DataError, match=r"network \d has no voxel on the grid"):
        synthesise(tmp_path / "far", half)
    assert not (tmp_path / "far").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="not empty and holds no synthetic cohort"):
        synthesise(tmp_path / "full", config())
    with pytest.raises(DataError, match="is a file"):
        synthesise(tmp_path / "full" / "mine.txt", config())
    with pytest.raises(DataError, match="with --store"):
        synthesise(tmp_path / "far", config(), jobs=2)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "synth.json").write_text("[]")
    with pytest.raises(DataError, match="does not describe a synthetic cohort"):
        synthesise(tmp_path / "odd", config())


def test_a_description_is_prepared_only_as_it_says(tmp_path: Path) -> None:
    synthesise(tmp_path / "s", config("subjects=1", "frames=8"), store=True)
    with pytest.raises(DataError, match=r"describes runs of prepare\.grid"):
        prepare(tmp_path / "s" / "synth.json", tmp_path / "other", PrepareConfig())


def test_settings_from_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("subjects: 7\ntraits: {sex: 0.3, iq: {kind: regression, effect: 0.2}}\n")
    got = load_synth_config(file, ["frames=50", "traits.iq=0.4"])
    assert (got.subjects, got.frames, list(got.traits)) == (7, 50, ["sex", "iq"])
    assert (got.traits["iq"].effect, got.traits["iq"].kind) == (0.4, "regression")
    assert got.traits["sex"].levels == ["F", "M"]
    assert list(load_synth_config(file, ["traits={age: 0.1}"]).traits) == ["age"]
    assert load_synth_config(None, ["traits={}"]).traits == {}
    assert prepare_arguments(config()) == [
        "prepare.grid=[16,16,16]", "prepare.voxel_size=[12.0,12.0,12.0]"
    ]  # fmt: skip


def test_the_command_says_what_comes_next(tmp_path: Path) -> None:
    run: Callable[..., Any] = CliRunner().invoke
    done = run(app, ["synth", str(tmp_path / "out"), *SMALL, "subjects=2", "frames=8"])
    assert done.exit_code == 0, done.output
    for text in ("2 subjects, 2 runs (0 kept) of 8 frames", "d = 0.8", "AUROC 0.714", "truth.tsv"):
        assert text in done.output
    command = done.output.strip().splitlines()[-1].split()
    assert command[:2] == ["fmrizoo", "prepare"]
    command[3] = str(tmp_path / "store")
    assert run(app, command[1:]).exit_code == 0
    assert len(Store(tmp_path / "store").runs) == 2
