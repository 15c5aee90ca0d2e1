"""``fmrizoo scaling sweep``: what is planned, what is kept, and what is printed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import fmrizoo
import fmrizoo.pipeline.sweep as engine
from fmrizoo.analysis.scaling import Law, Points, read_points
from fmrizoo.analysis.scaling.compare import rows, sentences
from fmrizoo.analysis.scaling.outcome import analyse
from fmrizoo.cli import app
from fmrizoo.cli.shell import INTERRUPTED
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.pipeline.inputs import open_data
from fmrizoo.pipeline.scaling import Planned, plan, write_points
from fmrizoo.pipeline.sweep import Job, Outcome
from fmrizoo.zoo import list_recipes, load_recipe

Run = Callable[..., Result]
RECIPE = "scaling/haxby"
SMALL = ["sweep.widths=[16,32]", "sweep.samples=[32,64]", "sweep.seeds=1"]


@pytest.fixture
def store(sample_store: Path) -> str:
    return f"data.store={sample_store}"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["scaling", "sweep", *arguments], catch_exceptions=False)

    return run


def planted_loss(recipe: object) -> float:
    """Of the law 0.1 + 30·N^-0.4 + 4·D^-0.5 in width² and clips, 0.1 % noise by the seed."""
    width, train = recipe.backbone.embed_dim, recipe.train  # type: ignore[attr-defined]
    law = Law(0.1, 30.0, 0.4, 4.0, 0.5)
    noise = 1 + 0.001 * (-1) ** train.seed
    return float(law.loss(180.0 * width**2, train.steps * train.batch_size)) * noise


class Trainer:
    """Stands in for a training: writes the outcome that a planted law gives."""

    def __init__(self, diverge: Sequence[str] = (), stop_after: int | None = None) -> None:
        self.trained: list[str] = []
        self.diverge, self.stop_after = diverge, stop_after

    def __call__(self, job: Job, out: Path, keep_models: bool = False) -> Outcome | None:
        if self.stop_after is not None and len(self.trained) >= self.stop_after:
            return None
        self.trained.append(job.name)
        loss, bad = planted_loss(job.recipe), job.name in self.diverge
        steps = job.recipe.train.steps
        found = Outcome(loss, loss, steps, 1.0)
        if bad:
            found = Outcome(inf, inf, steps, 1.0, "the loss is\nnan at step 3")
        values = {"schema": engine.SCHEMA, **engine._plain(found)}
        (out / job.name).mkdir(parents=True, exist_ok=True)
        (out / job.name / engine.FILE).write_text(json.dumps(values))
        return found


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    monkeypatch.setattr(engine, "run_job", made)
    return made


# --- the plan -------------------------------------------------------------------------------------


def test_every_point_is_a_training_of_its_own(store: str) -> None:
    more = ["sweep.units=[0,2]", "sweep.seeds=2", "train.seed=5"]
    variants, planned = plan(RECIPE, [store, *SMALL, *more])
    assert list(variants) == [""] and len(planned) == 2 * 2 * 2 * 2
    by_name = {one.job.name: one for one in planned}
    assert len(by_name) == len(planned)
    for width in (16, 32):
        for clips in (32, 64):
            for units in (0, 2):
                for seed in (5, 6):
                    name = f"width-{width}/clips-{clips}/units-{units or 'all'}/seed-{seed}"
                    one = by_name[name]
                    recipe = one.job.recipe
                    assert recipe.train.steps * recipe.train.batch_size == clips
                    assert recipe.train.lr == 2**-7 and recipe.train.seed == seed
                    assert recipe.split.train_units == units
                    assert recipe.backbone.embed_dim == width
                    assert recipe.backbone.num_heads == [width // 8, width // 4]
                    assert recipe.parametrization.base["embed_dim"] == 16
                    assert one.tokens == 8 * 4 * 8 and one.clips == clips
    flops = [one.flops for one in planned]
    assert flops == sorted(flops, reverse=True)


def test_unique_clips_are_those_of_the_units(store: str) -> None:
    given = [store, "sweep.widths=[16]", "sweep.samples=[64,256]", "sweep.seeds=1"]
    _, planned = plan(RECIPE, [*given, "sweep.units=[0,1]"])
    found = {(one.units, one.clips): one.unique for one in planned}
    # A run of 121 frames holds 114 windows of 8 frames.
    assert found == {(0, 64): 64, (0, 256): 256, (1, 64): 64, (1, 256): 114}


@pytest.mark.parametrize(
    "changes",
    [
        ["data.windows=random"],
        ["data.balance=subject"],
        ["data.windows=random", "data.clips_per_visit=4"],
        ["data.augment.time_shift=3", "data.clip_stride=1.0"],
        ["data.divide=2"],
        ["data.windows=random", "data.divide=2"],
    ],
)
def test_unique_clips_are_those_that_a_training_reads(store: str, changes: list[str]) -> None:
    from fmrizoo.data.clips import ClipTable
    from fmrizoo.data.loader import Loader

    given = [store, "sweep.widths=[16]", "sweep.samples=[32,160,288]", "sweep.seeds=2", *changes]
    _, planned = plan(RECIPE, given)
    for one in planned:
        recipe = one.job.recipe
        data = open_data(recipe)
        table = ClipTable.windows(data.store, data.part("train"), recipe.data)
        batch = recipe.train.batch_size
        loader = Loader(table, recipe.data, batch, seed=one.seed, lanes=batch)
        read = set()
        for batches in itertools.islice(loader.batches(), recipe.train.steps):
            read |= {(s.facts.run, s.facts.start) for s in batches.samples}
        assert one.unique == len(read)
    if "data.windows=random" in changes:
        # 288 draws among the 912 starts of 8 runs: some twice, none of them counted twice.
        assert all(p.unique < p.clips for p in planned if p.clips == 288)


def test_parameters_and_flops_by_hand(store: str) -> None:
    """Width 16 on 8×4×1×8 patches of 25 voxels, one window over all, two blocks of one stage."""
    shape = ["backbone.depths=[2]", "backbone.num_heads=[2]", "backbone.window_size=[8,4,1,8]"]
    shape.append("parametrization.base={embed_dim: 16, num_heads: [2]}")
    sweep = ["sweep.widths=[16]", "sweep.samples=[48]", "sweep.seeds=1"]
    (one,) = plan(RECIPE, [store, *shape, *sweep])[1]
    tokens, width = 8 * 4 * 8, 16
    linear = 2 * tokens * (4 * width**2 + 2 * width * 4 * width)
    attention = 4 * tokens * tokens * width
    forward = 2 * tokens * 25 * width + 2 * (linear + attention)
    assert one.flops == 3 * 48 * forward
    model = fmrizoo.build(one.job.recipe)
    assert one.n == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_flops_are_three_forward_passes_per_clip(store: str) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    (one,) = plan(RECIPE, [store, "sweep.widths=[32]", "sweep.samples=[16]", "sweep.seeds=1"])[1]
    backbone = fmrizoo.build(one.job.recipe).backbone
    clip = torch.randn(1, 1, 40, 20, 1, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backbone(clip, torch.ones(1, 40, 20, 1, dtype=torch.bool)).values.sum().backward()
    # The image needs no gradient: the embedding's backward pass has one product, not two.
    assert one.flops == pytest.approx(16 * counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["parametrization.name=sp"], "needs muP, but parametrization.name=sp.*mup transfer"),
        (["sweep.samples=[]"], "sweep.samples is empty"),
        (["sweep.samples=[64,100]"], "100 clips are no whole number of steps.*take 96"),
        (["sweep.samples=[8]"], "8 clips are no whole number of steps.*take 16"),
        (["sweep.widths=[16,40]"], "40 is no multiple of the base width 16"),
        (["sweep.variants={a: [split.nonsense=1]}"], "sweep.variants.a: unknown key"),
        (["split.validation=0"], "needs validation runs, but split.validation=0"),
        (["backbone.img_size=[20,20,1,8]"], "the backbone is built for"),
        (["data.store=''"], "data.store is empty"),
    ],
)
def test_refused_before_anything_trains(
    cli: Run, store: str, trainer: Trainer, given: list[str], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        cli(RECIPE, store, *SMALL, *given, "--out", "law")
    assert not trainer.trained and not Path("law").exists()


def test_more_units_than_there_are(cli: Run, store: str, trainer: Trainer) -> None:
    with pytest.raises(DataError, match=r"split.train_units=9, but the training part"):
        cli(RECIPE, store, *SMALL, "sweep.units=[0,9]", "--out", "law")
    assert not trainer.trained


def test_options_are_checked_first(cli: Run, store: str) -> None:
    with pytest.raises(RecipeError, match="--unit takes clips or tokens, got 'voxels'"):
        cli(RECIPE, store, "--out", "law", "--unit", "voxels")
    with pytest.raises(RecipeError, match="--part takes K/N"):
        cli(RECIPE, store, "--out", "law", "--part", "3/2")


@pytest.mark.parametrize("name", list_recipes("scaling/*"))
def test_shipped_sweeps_span_what_a_fit_asks_for(store: str, name: str) -> None:
    _, planned = plan(name, [store])
    for variant in {one.variant for one in planned}:
        mine = [one for one in planned if one.variant == variant]
        for axis in ("n", "clips"):
            values = [getattr(one, axis) for one in mine]
            assert np.log10(max(values) / min(values)) > 1.5, axis
            assert len(set(values)) >= 3
    assert load_recipe(name).sweep.loss == "validation"


# --- points ---------------------------------------------------------------------------------------


def outcomes_of(planned: Sequence[Planned]) -> dict[str, Outcome]:
    return {p.job.name: Outcome(2.0, planted_loss(p.job.recipe), 1, 1.0) for p in planned}


@pytest.mark.parametrize("unit", ["clips", "tokens"])
def test_points_are_read_back(store: str, tmp_path: Path, unit: str) -> None:
    _, planned = plan(RECIPE, [store, *SMALL, "sweep.units=[0,1]", "sweep.seeds=2"])
    found = outcomes_of(planned)
    path = tmp_path / "points.csv"
    write_points(path, planned, found, unit=unit, loss="validation", about="x")
    points = read_points(path)
    size = 256 if unit == "tokens" else 1
    assert points.n is not None and points.d is not None and points.unique is not None
    assert points.flops is not None and points.seed is not None
    order = sorted(planned, key=lambda p: (p.n, p.clips, p.units, p.seed))
    assert points.n.tolist() == [p.n for p in order]
    assert points.d.tolist() == [p.clips * size for p in order]
    assert points.unique.tolist() == [p.unique * size for p in order]
    assert points.loss.tolist() == [found[p.job.name].validation for p in order]
    assert points.flops == pytest.approx([p.flops for p in order], rel=1e-9)
    # Units that give one setting (N, D, U) are repeats of it.
    assert len(np.unique(points.settings())) < len(points) / 2
    write_points(path, planned, found, unit=unit, loss="train", about="x")
    assert set(read_points(path).loss) == {2.0}


def test_diverged_runs_are_named_and_left_out(cli: Run, store: str, trainer: Trainer) -> None:
    bad = "width-32/clips-64/units-all/seed-0"
    trainer.diverge = [bad]
    done = cli(RECIPE, store, *SMALL, "--out", "law", "--only-points")
    assert done.exit_code == 0
    assert "wrote law/points.csv: 3 points; 1 of 4 trainings diverged and are left out:" in (
        done.stdout
    )
    assert f"{bad}: the loss is nan at step 3" in done.stdout
    assert len(read_points(Path("law/points.csv"))) == 3
    text = Path("law/points.csv").read_text()
    assert f"# diverged, left out: {bad}: the loss is nan at step 3\n" in text
    assert text.startswith(f"# fmrizoo scaling sweep {RECIPE} ")
    # It is over: no second try.
    cli(RECIPE, store, *SMALL, "--out", "law", "--only-points")
    assert len(trainer.trained) == 4
    assert not Path("law/scaling.json").exists()


# --- the whole command ----------------------------------------------------------------------------

WIDE = ["sweep.widths=[16,48,128]", "sweep.samples=[32,256,2048]", "sweep.seeds=2"]
FEW = ["--draws", "50"]


def test_a_planted_law_comes_back(cli: Run, store: str, trainer: Trainer) -> None:
    done = cli(RECIPE, store, *WIDE, "--out", "law", *FEW)
    assert done.exit_code == 0 and len(trainer.trained) == 18
    # 570 training clips were seen up to 3.6 times: the data-constrained form.
    assert "L(N, D, U) = E + A·N^-alpha + B·D'^-beta" in done.stdout
    assert "measured on repeated points with 9 degrees of freedom" in done.stdout
    values = json.loads(Path("law/scaling.json").read_text())
    assert values["law"] == "repeated" and values["unit_d"] == "clips"
    assert values["estimates"]["beta"]["value"] == pytest.approx(0.5, rel=0.1)
    picture = Path("law/scaling.svg").read_text()
    assert picture.count('<g id="axes_') == 3
    again = cli(RECIPE, store, *WIDE, "--out", "law", *FEW)
    assert again.exit_code == 0 and len(trainer.trained) == 18
    assert json.loads(Path("law/scaling.json").read_text()) == values


def test_an_interrupted_sweep_goes_on(
    cli: Run, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Trainer(stop_after=3), Trainer()
    monkeypatch.setattr(engine, "run_job", first)
    done = cli(RECIPE, store, *SMALL, "--out", "law", "--only-points")
    assert done.exit_code == INTERRUPTED and not Path("law/points.csv").exists()
    assert "interrupted: 3 of 4 trainings are done" in done.stderr
    monkeypatch.setattr(engine, "run_job", second)
    assert cli(RECIPE, store, *SMALL, "--out", "law", "--only-points").exit_code == 0
    assert len(second.trained) == 1 and not set(first.trained) & set(second.trained)


def test_parts_together_are_the_whole(cli: Run, store: str, trainer: Trainer) -> None:
    whole = [one.job.name for one in plan(RECIPE, [store, *WIDE])[1]]
    first = cli(RECIPE, store, *WIDE, "--out", "law", "--part", "1/2")
    assert "part 1/2: its 9 trainings are done; 9 of all 18 are left" in first.stdout
    assert not Path("law/points.csv").exists()
    second = cli(RECIPE, store, *WIDE, "--out", "law", "--part", "2/2")
    assert "nothing is left to train: run the command without --part to fit" in second.stdout
    assert sorted(trainer.trained) == sorted(whole) and len(set(whole)) == 18
    assert len(read_points(Path("law/points.csv"))) == 18
    assert not Path("law/scaling.json").exists()
    assert cli(RECIPE, store, *WIDE, "--out", "law", *FEW).exit_code == 0
    assert len(trainer.trained) == 18 and Path("law/scaling.json").exists()


def test_variants_side_by_side(cli: Run, store: str, trainer: Trainer) -> None:
    """One variant is too small for a law; that alone is no error."""
    one = "['data.select={acquisition: 1slice, run: 1|2|3}', 'sweep.widths=[16,32]']"
    several = "['data.select={acquisition: 1slice}']"
    variants = f"sweep.variants={{one: {one}, several: {several}}}"
    done = cli(RECIPE, store, *WIDE, variants, "--out", "law", *FEW)
    assert done.exit_code == 0
    assert len(trainer.trained) == 2 * 3 * 2 + 3 * 3 * 2
    assert "one/width-16/clips-32/units-all/seed-0" in trainer.trained
    for name in ("one", "several"):
        assert Path(f"law/{name}/points.csv").is_file()
    assert "wrote law/several/scaling.json" in done.stdout
    assert not Path("law/one/scaling.json").exists()
    assert "one: no law: law/one/points.csv: 6 points (12 runs, but seeds of one" in done.stdout
    # One training run of 121 frames.
    unique = read_points(Path("law/one/points.csv")).unique
    assert unique is not None and unique.max() == 114


def law_of(alpha: float, seed: int) -> Points:
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e5, 1e8, 5), np.geomspace(1e4, 1e7, 5)))
    random = np.random.default_rng(seed)
    loss = Law(0.3, 40.0, alpha, 20.0, 0.4).loss(n, d)
    return Points(loss * np.exp(0.002 * random.standard_normal(25)), n, d)


def test_tables_say_where_exponents_differ() -> None:
    found = {
        "a": analyse(law_of(0.3, 0), draws=50),
        "b": analyse(law_of(0.3, 1), draws=50),
        "c": analyse(law_of(0.45, 2), draws=50),
        "d": "c.csv: 4 points cannot determine E",
    }
    names, lines = rows(found)
    assert names == ["E", "A", "alpha", "B", "beta"]
    assert [line[:2] for line in lines] == [["a", "25"], ["b", "25"], ["c", "25"], ["d", "no law"]]
    assert lines[0][4].startswith("0.") and " to 0." in lines[0][4]
    said = sentences(found)
    assert said[0] == "d: no law: c.csv: 4 points cannot determine E"
    assert len(said) == 1 + 3 * 2
    by_pair = {(s.split(" (")[0], s.split("of ")[2][0]): s for s in said[1:]}
    assert "overlap: these points show no difference" in by_pair["alpha of a", "b"]
    assert "do not overlap: the exponents differ" in by_pair["alpha of a", "c"]
    assert "do not overlap: the exponents differ" in by_pair["alpha of b", "c"]
    assert "overlap: these points show no difference" in by_pair["beta of a", "c"]


def test_a_law_that_does_not_hold_is_compared_with_none() -> None:
    """A sudden fall, as of short trainings, is no sum of powers."""
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e5, 1e8, 4), np.geomspace(1e2, 1e4, 4)))
    n, d, sign = np.tile(n, 2), np.tile(d, 2), np.repeat([1, -1], 16)
    loss = (0.06 + 0.6 / (1 + (d / 500) ** 4)) * (1 + 0.002 * sign) * n**-0.02
    found = {"a": analyse(law_of(0.3, 0), draws=50), "b": analyse(Points(loss, n, d), draws=50)}
    (said,) = sentences(found)
    assert said.startswith("b: no law that holds: residuals are ")
    assert rows(found)[1][1][1] == "32 (law does not hold)"


def test_a_real_sweep_on_the_sample(cli: Run, store: str) -> None:
    """Four short trainings; four points carry no law, and that is said in one sentence."""
    given = [RECIPE, store, "sweep.widths=[16,32]", "sweep.samples=[16,32]", "sweep.seeds=1"]
    with pytest.raises(DataError) as refused:
        cli(*given, "--out", "law")
    said = str(refused.value)
    assert said.startswith("law/points.csv: 4 points cannot determine E, A, alpha, B, beta; a fit")
    assert said.endswith("the points are kept, and `fmrizoo scaling fit` takes them too")
    points = read_points(Path("law/points.csv"))
    assert len(points) == 4 and np.all(points.loss < 1.5)
    one = Path("law/width-16/clips-16/units-all/seed-0")
    assert (one / "outcome.json").is_file() and not (one / "checkpoints").exists()
    before = (one / "outcome.json").stat().st_mtime_ns
    with pytest.raises(DataError, match="4 points cannot determine"):
        cli(*given, "--out", "law")
    assert (one / "outcome.json").stat().st_mtime_ns == before
