"""Synthetic BOLD against what it promises: statistics, effects, ceilings, both forms, refusals."""

from __future__ import annotations

import json
import signal as signals
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from fmrizoo.config import PrepareConfig, QcConfig
from fmrizoo.data import qc
from fmrizoo.data.interrupt import Interrupted
from fmrizoo.data.prepare import prepare
from fmrizoo.data.store import Store
from fmrizoo.data.synthetic import signal
from fmrizoo.data.synthetic.anatomy import anatomy
from fmrizoo.data.synthetic.cohort import ceiling, cohort, covariance, person
from fmrizoo.data.synthetic.config import SynthConfig, load_synth_config
from fmrizoo.data.synthetic.run import MadeRun, RunId, make_run
from fmrizoo.data.synthetic.write import bold_path, synthesise
from fmrizoo.errors import DataError

SMALL = ["prepare.grid=[16,16,16]", "prepare.voxel_size=[12,12,12]"]
NOISE_ONLY = ["drift=0", "physiology=0", "motion_left=0", "spin=0", "network_amplitude=0"]


def config(*overrides: str) -> SynthConfig:
    return load_synth_config(None, [*SMALL, *overrides])


def made(settings: SynthConfig, subject: int = 0) -> MadeRun:
    return make_run(settings, person(settings, subject), RunId(subject, 0, 0))


def lag1(series: np.ndarray) -> float:
    centred = series - series.mean(0)
    return float(np.mean((centred[1:] * centred[:-1]).mean(0) / centred.var(0)))


# --- noise ----------------------------------------------------------------------------------------


def ball(side: int = 24) -> np.ndarray:
    grid = np.indices((side, side, side)) - side / 2
    return (grid**2).sum(0) < (side / 2 - 1) ** 2


def noise(frames: int, **settings: Any) -> np.ndarray:
    usual = {"fwhm": 3.19, "temporal": "ar1", "lag1": 0.37, "exponent": 0.7}
    rng = np.random.default_rng(0)
    return signal.field_noise(rng, ball(), [2.0, 2.0, 2.0], frames, **{**usual, **settings})


@pytest.mark.parametrize("fwhm", [0.0, 3.19, 6.0])
def test_neighbours_correlate_as_the_kernel_says(fwhm: float) -> None:
    mask, values = ball(), noise(60, fwhm=fwhm)
    assert values.var() == pytest.approx(1, rel=0.03)
    dense = np.zeros((60, *mask.shape), np.float32)
    dense[:, mask] = values
    sigma = fwhm / np.sqrt(8 * np.log(2))
    for axis in range(3):
        both = mask & np.roll(mask, -1, axis)
        got = (dense * np.roll(dense, -1, axis + 1))[:, both].mean()
        wanted = np.exp(-(2.0**2) / (4 * sigma**2)) if fwhm else 0.0
        assert got == pytest.approx(wanted, abs=0.025)


def test_frames_correlate_as_asked() -> None:
    assert lag1(noise(300)) == pytest.approx(0.37, abs=0.02)
    assert lag1(noise(300, temporal="white")) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_one_over_f_has_its_slope(exponent: float) -> None:
    values = noise(128, temporal="one_over_f", exponent=exponent, fwhm=0)
    power = (np.abs(np.fft.rfft(values, axis=0)) ** 2).mean(1)[1:-1]
    slope = np.polyfit(np.log(np.arange(1, len(power) + 1)), np.log(power), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.03)
    assert values.var() == pytest.approx(1, rel=0.02)


def test_band_limited_series_have_variance_one_inside_their_band() -> None:
    series = signal.band_limited(np.random.default_rng(0), 400, 200, 2.0, 0.01, 0.1)
    assert series.var() == pytest.approx(1, rel=0.05)
    power = (np.abs(np.fft.rfft(series * np.hanning(400)[:, None], axis=0)) ** 2).mean(1)
    frequency = np.fft.rfftfreq(400, 2.0)
    assert power[(frequency > 0.105) | (frequency < 0.005)].sum() < 0.02 * power.sum()


def test_a_run_has_the_stated_tsnr() -> None:
    got = qc.signal_measures(made(config(*NOISE_ONLY)).bold)
    assert got["tsnr"] == pytest.approx(56.5, rel=0.03)
    runs = [made(config(), subject).bold for subject in range(2)]
    measures = [qc.signal_measures(bold) for bold in runs]
    assert np.mean([m["tsnr"] for m in measures]) == pytest.approx(54, rel=0.04)
    assert all(not qc.flags({**m, "fd_mean": 0.2}, QcConfig()) for m in measures)
    assert np.median(runs[0].mean(0)) == pytest.approx(8000, rel=0.01)
    assert (runs[0] == np.rint(runs[0])).all() and 0 <= runs[0].min() <= runs[0].max() <= 32767


def test_every_part_can_be_switched_off() -> None:
    bare = ["temporal=white", "smoothness=0", "tsnr=10000", "traits={}", "dropout=0", *NOISE_ONLY]
    bold = made(config(*bare)).bold
    assert bold.std(0).max() < 1.5  # of 8000: noise and rounding are left
    for part in ("drift=1", "physiology=1", "spin=10", "motion_left=1", "network_amplitude=1"):
        assert made(config(*bare, part)).bold.std(0).max() > 20, part


# --- the brain and the head -----------------------------------------------------------------------


def test_networks_lie_apart_and_in_the_same_place_on_every_grid() -> None:
    coarse, fine = anatomy(config()), anatomy(config("prepare.voxel_size=[10,10,10]"))
    for body in (coarse, fine):
        assert ((body.networks > 0).sum(0) <= 1).all() and body.networks.max(1).min() > 0.5
    for network in range(8):
        centers = []
        for body in (coarse, fine):
            right = body.points[:, 0] > 0
            weight = body.networks[network] * right
            centers.append(weight @ body.points / weight.sum())
        assert np.abs(centers[0] - centers[1]).max() < 4  # mm
    assert coarse.mask.sum() * 12**3 == pytest.approx(1.88e6, rel=0.05)  # mm³ of the MNI brain


def test_motion_has_the_stated_size_and_moves_edges() -> None:
    walk = signal.head_motion(np.random.default_rng(0), 100, 0.3)
    assert np.nanmean(signal.displacement(walk)) == pytest.approx(0.3)
    body = anatomy(config())
    shift = signal.motion_maps(body.slope, body.mean, body.points)[0]
    # A head that moves 1 mm to the right: its left edge gets darker, its right one brighter.
    outside = np.abs(body.slope[0]) > np.quantile(np.abs(body.slope[0]), 0.9)
    side = np.sign(body.points[:, 0] - body.points[:, 0].mean())
    assert (np.sign(shift[outside]) == side[outside]).mean() > 0.85


def test_a_run_with_much_motion_is_flagged(tmp_path: Path) -> None:
    settings = config("subjects=1", "frames=20", "motion=1.5", "motion_spread=0")
    synthesise(tmp_path / "s", settings, store=True)
    (run,) = Store(tmp_path / "s").runs
    assert run.qc["fd_mean"] == pytest.approx(1.5)
    assert any("framewise" in reason for reason in qc.flags(run.qc, QcConfig()))


# --- who has what ---------------------------------------------------------------------------------

TRAITS = "traits={sex: 0.8, age: 0.5, decoy: {kind: classification}}"


def test_effects_and_ceilings_are_those_of_the_latents() -> None:
    settings = config(TRAITS, "subjects=2000")
    people = cohort(settings)
    sex, age, null = (
        np.array([[p.values[name], p.latents[name]] for p in people]).T
        for name in ("sex", "age", "decoy")
    )
    apart = sex[1][sex[0] == 1], sex[1][sex[0] == 0]
    assert len(apart[0]) == len(apart[1]) == 1000
    pooled = np.sqrt((apart[0].var() + apart[1].var()) / 2)
    assert (apart[0].mean() - apart[1].mean()) / pooled == pytest.approx(0.8, abs=0.12)
    assert roc_auc_score(*sex) == pytest.approx(ceiling(settings.traits["sex"]), abs=0.03)
    assert ceiling(settings.traits["sex"]) == pytest.approx(0.71420, abs=1e-5)  # Φ(0.8/√2)
    assert np.corrcoef(*age)[0, 1] == pytest.approx(0.5, abs=0.05)
    assert roc_auc_score(*null) == pytest.approx(0.5, abs=0.035)
    assert np.abs(np.corrcoef([sex[0], age[0], null[0]]) - np.eye(3)).max() < 0.07


def test_families_sites_and_motion_confound_as_asked() -> None:
    settings = config(
        "traits={age: 0.0, sex: {effect: 0, motion: 0.6}}", "family_size=2", "subjects=1200",
        "family_correlation=0.7", "sites=3", "site_trait=sex", "site_bias=1",
    )  # fmt: skip
    people = cohort(settings)
    latents = np.array([p.latents["age"] for p in people]).reshape(-1, 2)
    assert np.corrcoef(latents.T)[0, 1] == pytest.approx(0.7, abs=0.06)
    sex = np.array([p.values["sex"] for p in people])
    within = (sex[::2] == sex[1::2]).mean()
    assert sex.mean() == 0.5 and within == pytest.approx(0.5, abs=0.06)
    assert np.corrcoef(sex, np.log([p.motion for p in people]))[0, 1] == pytest.approx(
        0.6, abs=0.06
    )
    assert np.corrcoef(sex, [p.site for p in people])[0, 1] > 0.9
    by_site = {(p.site, p.gain, p.noise) for p in people}
    assert len(by_site) == len({site for site, *_ in by_site}) and len(by_site) >= 2
    assert {p.gain for p in cohort(config())} == {1.0}


@pytest.mark.parametrize("rho", [-0.75, 0.0, 0.95])
def test_time_courses_have_the_known_connectivity(rho: float) -> None:
    settings = config()
    wanted = covariance(settings, (rho, 0.3, 0.3, 0.3))
    assert np.linalg.eigvalsh(wanted).min() > 0 and wanted[0, 1] == rho and wanted[0, 2] == 0.1
    rng = np.random.default_rng(0)
    fresh = signal.band_limited(rng, 20000, 8, 2.0, 0.01, 0.1)
    got = np.corrcoef((fresh @ np.linalg.cholesky(wanted).T).T)
    assert np.abs(got - wanted).max() < 0.07


def test_a_subject_is_the_same_in_any_cohort() -> None:
    few, many = config("subjects=3", "frames=20"), config("subjects=9", "frames=20")
    assert cohort(few) == cohort(many)[:3]
    assert (made(few, 2).bold == made(many, 2).bold).all()
    assert (made(few, 1).bold != made(many, 2).bold).mean() > 0.9
    other = config("subjects=3", "frames=20", "seed=1")
    assert cohort(other)[0].latents != cohort(few)[0].latents


# --- effects in the data --------------------------------------------------------------------------


def network_series(bold: np.ndarray, settings: SynthConfig) -> np.ndarray:
    """% signal of every network, slow courses taken out: what an observer with the maps sees."""
    weights = anatomy(settings).networks
    series = 100 * (bold / bold.mean(0) - 1) @ weights.T / (weights**2).sum(1)
    time = np.linspace(-1, 1, len(bold))
    slow = np.stack([np.ones_like(time), time, np.cos(np.pi * time), np.sin(np.pi * time)], axis=1)
    return series - slow @ np.linalg.lstsq(slow, series, rcond=None)[0]


def test_an_observer_who_knows_the_place_reaches_the_ceiling_and_finds_no_null() -> None:
    settings = config(
        "subjects=120", "frames=240", "network_amplitude=2",
        "traits={sex: {effect: 1.2, gain: 0.6}, age: {effect: 0.7, gain: 0.6}, "
        "decoy: {kind: classification, gain: 0.6}}",
    )  # fmt: skip
    values, seen = [], []
    for someone in cohort(settings):
        run = make_run(settings, someone, RunId(someone.number, 0, 0))
        series = network_series(run.bold, settings)
        r = np.corrcoef(series.T)
        amplitude = np.log(series[:, settings.places()["age"][0]].std())
        null = settings.places()["decoy"]
        seen.append([np.arctanh(r[0, 1]), amplitude, np.arctanh(r[null])])
        values.append([someone.values[name] for name in ("sex", "age", "decoy")])
    (sex, age, null), (coupling, amplitude, other) = np.array(values).T, np.array(seen).T
    assert roc_auc_score(sex, coupling) == pytest.approx(ceiling(settings.traits["sex"]), abs=0.07)
    assert np.corrcoef(age, amplitude)[0, 1] == pytest.approx(0.7, abs=0.1)
    for label, feature in ((null, other), (null, coupling), (sex, other), (sex, amplitude)):
        assert roc_auc_score(label, feature) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("design", ["block", "event"])
def test_a_glm_finds_the_percent_signal_change(tmp_path: Path, design: str) -> None:
    from nilearn.glm.first_level import FirstLevelModel
    from nilearn.maskers import NiftiMasker

    settings = config(
        "conditions={house: 1.5, face: -0.8}", f"design={design}", "frames=300", "subjects=1",
        "network_amplitude=0", "tsnr=150", "pause=10",
    )  # fmt: skip
    synthesise(tmp_path / "out", settings)
    path = bold_path(tmp_path / "out", settings, RunId(0, 0, 0))
    stem = str(path).partition("_space-")[0]
    mask = nib.load(str(path).replace("preproc_bold", "brain_mask"))
    model = FirstLevelModel(
        t_r=2.0, hrf_model="spm", mask_img=NiftiMasker(mask).fit(), signal_scaling=0,
        noise_model="ols", smoothing_fwhm=None,
    )  # fmt: skip
    model.fit(nib.load(path), events=pd.read_csv(f"{stem}_events.tsv", sep="\t"))
    weights = anatomy(settings).networks
    inside = np.asarray(mask.dataobj) > 0
    for name, change in settings.conditions.items():
        found = model.compute_contrast(name, output_type="effect_size").get_fdata()[inside]
        mine = weights[settings.condition_networks()[name]]
        slope = found @ mine / (mine @ mine)
        assert slope == pytest.approx(change, abs=0.15)
        elsewhere = found @ weights[0] / (weights[0] @ weights[0])
        assert elsewhere == pytest.approx(0, abs=0.15)


# --- both forms -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[SynthConfig, Path, Store, Store]:
    """One cohort as files, as a store made of them, and straight as a store."""
    root = tmp_path_factory.mktemp("synth")
    settings = config(
        "subjects=2", "sessions=2", "runs=2", "frames=24", "conditions={a: 1, b: 2}", "pause=2"
    )
    synthesise(root / "files", settings)
    prepare(root / "files", root / "prepared", settings.prepare)
    synthesise(root / "store", settings, store=True)
    return settings, root, Store(root / "prepared"), Store(root / "store")


def test_both_forms_hold_the_same(both: tuple[SynthConfig, Path, Store, Store]) -> None:
    _, root, prepared, straight = both
    assert len(prepared.runs) == 8
    assert [r.name for r in prepared.runs] == [r.name for r in straight.runs]
    for a, b in zip(prepared.runs, straight.runs, strict=True):
        one, other = prepared.open(a), straight.open(b)
        assert (one.read_compact(0, 24) == other.read_compact(0, 24)).all()
        for part in ("offset", "scale", "mean", "std"):
            assert (getattr(one.decoder, part) == getattr(other.decoder, part)).all()
        for field in ("events", "affine", "grid", "tr", "contract", "statistics", "kind", "n_vox"):
            assert getattr(a, field) == getattr(b, field), field
        assert len(a.events) > 0 and a.qc.keys() == b.qc.keys()
        for key in a.qc:
            assert a.qc[key] == (
                b.qc[key] if isinstance(b.qc[key], str) else pytest.approx(b.qc[key])
            )
    for name in ("participants.tsv", "truth.tsv", "networks.nii.gz"):
        assert (root / "files" / name).read_bytes() == (root / "store" / name).read_bytes()
    assert straight.verify() == []


def test_files_are_what_others_read(both: tuple[SynthConfig, Path, Store, Store]) -> None:
    settings, root, _, _ = both
    path = bold_path(root / "files", settings, RunId(1, 0, 1))
    assert path.name == (
        "sub-0002_ses-01_task-synth_run-2_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
    )
    image = nib.load(path)
    assert image.shape == (16, 16, 16, 24) and image.header.get_zooms()[3] == 2
    assert image.get_data_dtype() == np.int16 and image.header["sform_code"] == 4
    run = make_run(settings, person(settings, 1), RunId(1, 0, 1))
    assert (run.bold == np.asarray(image.dataobj)[anatomy(settings).mask].T).all()
    people = pd.read_csv(root / "files" / "participants.tsv", sep="\t")
    assert list(people.columns) == ["participant_id", "sex", "age", "site", "family"]
    assert set(people.sex) == {"F", "M"}
    truth = pd.read_csv(root / "files" / "truth.tsv", sep="\t")
    assert truth.age_latent[1] == pytest.approx(person(settings, 1).latents["age"])
    planted = json.loads((root / "files" / "synth.json").read_text())["planted"]
    assert planted["traits"]["age"]["ceiling"] == 0.5
    assert planted["conditions"]["b"]["contrast_to_noise"] == pytest.approx(2 * 0.565)


def test_confounds_can_be_regressed_out(tmp_path: Path) -> None:
    settings = config("subjects=1", "frames=80", "motion=0.4", "motion_left=0.5")
    synthesise(tmp_path / "files", settings)
    stores = {}
    for strategy in (None, "simple"):
        grid = PrepareConfig(grid=[16] * 3, voxel_size=[12.0] * 3, confounds=strategy)
        prepare(tmp_path / "files", tmp_path / str(strategy), grid)
        stores[strategy] = Store(tmp_path / str(strategy)).runs[0].qc["tsnr"]
    assert stores["simple"] > 1.3 * stores[None]


@pytest.mark.parametrize("store", [False, True])
def test_a_cohort_goes_on_and_grows(tmp_path: Path, store: bool) -> None:
    out = tmp_path / "out"
    first = synthesise(out, config("subjects=1", "frames=8"), store=store)
    assert (first.runs, first.kept) == (1, 0)
    more = synthesise(out, config("subjects=3", "frames=8"), store=store)
    assert (more.runs, more.kept) == (3, 1)
    assert len((out / "truth.tsv").read_text().splitlines()) == 4
    for wrong, said in (
        (config("subjects=2", "frames=8"), "may only grow"),
        (config("subjects=3", "frames=9"), "frames"),
        (config("subjects=3", "frames=8", "traits.sex.effect=0.5"), "traits"),
    ):
        with pytest.raises(DataError, match=said):
            synthesise(out, wrong, store=store)
    with pytest.raises(DataError, match="form"):
        synthesise(out, config("subjects=3", "frames=8"), store=not store)


@pytest.mark.parametrize("store", [False, True])
def test_an_interrupted_cohort_goes_on(tmp_path: Path, store: bool) -> None:
    settings = config("subjects=3", "frames=8")

    def stop(done: int, total: int, run: str) -> None:
        assert total == 3 and run == f"sub-000{done}_task-rest"
        if done == 2:
            signals.raise_signal(signals.SIGINT)

    with pytest.raises(Interrupted):
        synthesise(tmp_path / "out", settings, store=store, on_progress=stop)
    done = synthesise(tmp_path / "out", settings, store=store)
    assert (done.runs, done.kept) == (3, 1 if store else 2)  # a store keeps finished subjects
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.slow
def test_processes_change_no_value(tmp_path: Path) -> None:
    settings = config("subjects=3", "frames=8")
    for jobs in (1, 2):
        synthesise(tmp_path / str(jobs), settings, store=True, jobs=jobs)
    one, two = (Store(tmp_path / str(jobs)) for jobs in (1, 2))
    for a, b in zip(one.runs, two.runs, strict=True):
        assert (one.open(a).read_compact(0, 8) == two.open(b).read_compact(0, 8)).all()
