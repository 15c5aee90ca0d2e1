"""The main jobs on the shipped sample: the whole chain, its guards, and going on after a stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fmrizoo import pipeline
from fmrizoo.config import Recipe
from fmrizoo.data.splits import Split
from fmrizoo.data.store import Store
from fmrizoo.errors import CheckpointError, CorruptStoreError, DataError, RecipeError
from fmrizoo.evaluate.predictions import read_predictions
from fmrizoo.evaluate.results import Result
from fmrizoo.inspection import describe
from fmrizoo.trainer.export import read_model, save_model
from fmrizoo.trainer.inputs import StepEvent
from fmrizoo.zoo import load_recipe

SMALL = ["backbone.embed_dim=8", "backbone.num_heads=[1,2]", "backbone.depths=[1,1]"]
SHORT = ["train.steps=4", "train.batch_size=4", "train.validate_every=2"]


def pretraining(store: Path, *more: str) -> Recipe:
    given = [f"data.store={store}", *SMALL, *SHORT, *more]
    return load_recipe("pretrain/haxby_slice", given)


def finetuning(store: Path, *more: str) -> Recipe:
    given = [f"data.store={store}", *SMALL, *SHORT, *more]
    return load_recipe("finetune/haxby_slice", given)


@dataclass(frozen=True)
class Chain:
    """A store, an encoder pretrained on fold 0 and a head fine-tuned from it."""

    store: Path
    pretrained: Path
    finetuned: Path
    result: Result


@pytest.fixture(scope="module")
def chain(sample_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    first, second = root / "pretrained", root / "finetuned"
    done = pipeline.pretrain(pretraining(sample_store), first)
    assert done.step == 4 and not done.interrupted and not done.already_finished
    result = pipeline.finetune(finetuning(sample_store, f"init_from={first}"), second)
    assert result is not None
    return Chain(sample_store, first, second, result)


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def losses(run: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in rows]


def damaged(store: Path, to: Path, runs: list[str]) -> Path:
    """A copy of a one-file store in which every frame of ``runs`` has one flipped bit."""
    shutil.copytree(store, to)
    (file,) = to.glob("*.h5")
    file.chmod(0o644)
    with h5py.File(file) as opened:
        places = [(opened[run]["bold"].id.get_offset(), opened[run]["bold"].shape) for run in runs]
    data = bytearray(file.read_bytes())
    for offset, (frames, row) in places:
        for frame in range(frames):
            data[offset + frame * row + 7] ^= 0x10
    file.write_bytes(data)
    return to


# --- the chain ----------------------------------------------------------------------------------


def test_a_run_folder_holds_all_that_the_readme_names(chain: Chain) -> None:
    common = {"recipe.yaml", "env.json", "metrics.jsonl", "split.json", "store.json"}
    common |= {"checkpoints", "model"}
    assert {p.name for p in chain.pretrained.iterdir()} == common | {"reconstruction.npz"}
    assert {p.name for p in chain.finetuned.iterdir()} == common | {
        "results.json",
        "predictions.tsv",
    }
    assert load_recipe(chain.pretrained / "recipe.yaml") == pretraining(chain.store)


def test_the_split_is_one_and_its_parts_share_no_run(chain: Chain) -> None:
    first = Split.load(chain.pretrained / "split.json")
    second = Split.load(chain.finetuned / "split.json")
    assert first.sha == second.sha
    parts = [set(names) for names in first.parts().values()]
    assert [len(p) for p in parts] == [5, 1, 3] and len(set.union(*parts)) == 9
    weights, info = read_model(chain.finetuned / "model")
    assert weights and set(info.seen_runs) == parts[0]
    assert read_model(chain.pretrained / "model")[1].seen_runs == tuple(sorted(first.train))


def test_the_result_is_that_of_the_predictions_on_the_test_runs(chain: Chain) -> None:
    result = chain.result
    rows = read_predictions(chain.finetuned / "predictions.tsv")[0]
    test = set(Split.load(chain.finetuned / "split.json").test)
    assert len(rows) == result.n_test == 24 and {r.run for r in rows} == test
    right = [int(np.argmax(r.scores) == r.target) for r in rows]
    assert result.metrics["accuracy"] == pytest.approx(sum(right) / 24)
    assert result.chance == pytest.approx(1 / 8)
    assert (result.init, result.train_encoder) == ("pretrained", "none")
    assert result.parameters is not None
    # 16 features at 4×2×1 places, pooled over time only, to 8 classes.
    assert result.parameters.trainable == 16 * 4 * 2 * 8 + 8
    weights, info = read_model(chain.finetuned / "model")
    encoder = sum(w.numel() for n, w in weights.items() if n.startswith("backbone."))
    assert result.parameters.frozen == encoder == info.parameters - result.parameters.trainable


def test_a_frozen_encoder_is_the_pretrained_one_to_the_bit(chain: Chain) -> None:
    before, _ = read_model(chain.pretrained / "model")
    after, _ = read_model(chain.finetuned / "model")
    names = [n for n in before if n.startswith("backbone.")]
    assert names and all(torch.equal(before[n], after[n]) for n in names)


def test_evaluating_again_gives_equal_results(chain: Chain, tmp_path: Path) -> None:
    run = shutil.copytree(chain.finetuned, tmp_path / "run")
    before = (run / "predictions.tsv").read_bytes()
    again = pipeline.evaluate(run, name=chain.result.name)
    assert (run / "predictions.tsv").read_bytes() == before
    assert replace(again, seconds=0.0) == replace(chain.result, seconds=0.0)


def test_reconstruction_shows_one_held_out_clip(chain: Chain) -> None:
    with np.load(chain.pretrained / "reconstruction.npz") as arrays:
        assert arrays["truth"].shape == arrays["predicted"].shape == (40, 20, 1, 8)
        masked, mask = arrays["masked"], arrays["mask"]
        assert masked.dtype == bool and mask.sum() == 530
        assert (masked == masked[..., :1]).all() and 0.5 < masked.mean() < 0.75
        assert arrays["voxel_size"].tolist() == [3.1, 3.75, 3.75] and arrays["tr"] == 2.5


def test_the_report_shows_both_runs(chain: Chain, tmp_path: Path) -> None:
    from fmrizoo.report.html import write_report

    page = tmp_path / "report.html"
    summary = write_report([chain.pretrained.parent], page)
    text = page.read_text()
    assert chain.result.name in text
    assert text.count("<svg") + text.count("data:image") >= 2, "curves and the reconstruction"
    assert len(summary.lines) == 3


# --- inspect ------------------------------------------------------------------------------------


def test_every_artefact_can_be_inspected(chain: Chain) -> None:
    store = describe(chain.store, verify=True)
    assert (store["kind"], store["runs"], store["faults"]) == ("store", 18, [])
    run = describe(chain.pretrained, verify=True)
    assert (run["kind"], run["steps"], run["faults"]) == ("pretraining run", "4 of 4", [])
    assert run["checkpoints"] == ["step-000004"] and run["last"]["step"] == 4
    tuned = describe(chain.finetuned)
    assert tuned["kind"] == "fine-tuning run" and tuned["result"]["n_test"] == 24
    point = describe(chain.pretrained / "checkpoints/step-000004")
    assert (point["kind"], point["faults"]) == ("checkpoint", [])
    assert (point["state"]["step"], point["state"]["world_size"]) == (4, 1)
    model = describe(chain.finetuned / "model", verify=True)
    assert model["kind"] == "model" and model["tasks"][0]["kind"] == "classification"
    assert model["tensors"] > 10 and len(model["seen_runs"]) == 5
    split = describe(chain.finetuned / "split.json")
    assert (split["kind"], len(split["test"])) == ("split", 3)
    json.dumps([store, run, tuned, point, model, split])


def test_inspect_finds_damage_and_strangers(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        describe(tmp_path / "gone")
    for stranger in (tmp_path, chain.pretrained / "checkpoints/latest"):
        with pytest.raises(DataError, match="is no store, run folder"):
            describe(stranger)
    first = Store(chain.store).runs[0].name
    faults = describe(damaged(chain.store, tmp_path / "store", [first]), verify=True)["faults"]
    assert faults and all(first in f for f in faults)
    point = shutil.copytree(chain.pretrained / "checkpoints/step-000004", tmp_path / "point")
    (point / "state.json").write_text("{}")
    assert describe(point)["state"] is None
    assert "state.json has 2 bytes" in describe(point)["faults"][0]
    model = shutil.copytree(chain.pretrained / "model", tmp_path / "model")
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        describe(model, verify=True)


# --- guards -------------------------------------------------------------------------------------


def test_an_encoder_that_saw_the_test_runs_is_refused(chain: Chain, tmp_path: Path) -> None:
    recipe = finetuning(chain.store, f"init_from={chain.pretrained}", "split.fold=1")
    with pytest.raises(DataError, match=r"the encoder has seen \S+_run-\d\d in pretraining"):
        pipeline.finetune(recipe, tmp_path / "run")
    again = pretraining(chain.store, f"init_from={chain.pretrained}", "split.fold=1")
    with pytest.raises(DataError, match="the test part"):
        pipeline.pretrain(again, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_acquisition_of_a_test_run_is_the_same_run(chain: Chain, tmp_path: Path) -> None:
    """An encoder that saw the 25 mm images of a recording has seen that recording."""
    weights, info = read_model(chain.pretrained / "model")
    split = Split.load(chain.pretrained / "split.json")
    for part, refused in (("train", False), ("validation", True), ("test", True)):
        seen = tuple(n.replace("acq-1slice", "acq-25mm") for n in split.parts()[part])
        save_model(tmp_path / part, weights, replace(info, seen_runs=seen))
        recipe = finetuning(chain.store, f"init_from={tmp_path / part}")
        if refused:
            with pytest.raises(DataError, match=f"is in the {part} part"):
                pipeline.finetune(recipe, tmp_path / "run")
            assert not (tmp_path / "run").exists()
        else:
            assert pipeline.finetune(recipe, tmp_path / "run2") is not None
    seen = read_model(tmp_path / "run2" / "model")[1].seen_runs
    assert len(seen) == 10, "the encoder's runs and the head's runs"


def test_data_preprocessed_in_another_way_are_refused(chain: Chain, tmp_path: Path) -> None:
    other = "data.normalization=minmax"
    recipe = finetuning(chain.store, f"init_from={chain.pretrained}", other)
    said = "preprocessed in another way .*normalization: expected voxel, found minmax"
    with pytest.raises(CheckpointError, match=said):
        pipeline.finetune(recipe, tmp_path / "run")
    again = pretraining(chain.store, f"init_from={chain.pretrained}", other)
    with pytest.raises(CheckpointError, match=said):
        pipeline.pretrain(again, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = shutil.copytree(chain.finetuned, tmp_path / "copy")
    changed = load_recipe(run / "recipe.yaml")
    changed.data.normalization = "minmax"
    with pytest.raises(CheckpointError, match=said):
        pipeline.evaluate(run, changed)


def test_test_runs_are_not_opened_before_the_evaluation(chain: Chain, tmp_path: Path) -> None:
    """With every test frame damaged, pretraining and fine-tuning go the same way to their ends."""
    split = Split.load(chain.pretrained / "split.json")
    store = damaged(chain.store, tmp_path / "store", split.test)
    pipeline.pretrain(pretraining(store), tmp_path / "pre")
    assert losses(tmp_path / "pre") == losses(chain.pretrained)
    recipe = finetuning(store, f"init_from={chain.pretrained}")
    with pytest.raises(CorruptStoreError, match=split.test[0]):
        pipeline.finetune(recipe, tmp_path / "fine")
    assert losses(tmp_path / "fine") == losses(chain.finetuned)
    assert not (tmp_path / "fine/results.json").exists()
    assert not (tmp_path / "fine/predictions.tsv").exists()


def test_only_fine_tuned_runs_are_evaluated(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without a head: fine-tune it first"):
        pipeline.evaluate(chain.pretrained)
    run = shutil.copytree(chain.finetuned, tmp_path / "run")
    body = json.loads((run / "split.json").read_text())
    body["test"], body["train"] = body["train"], body["test"]
    (run / "split.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match="was changed after it was written"):
        pipeline.evaluate(run)


def test_recipes_that_do_not_fit_the_job(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs an objective"):
        pipeline.pretrain(finetuning(chain.store), tmp_path / "run")
    with pytest.raises(RecipeError, match="needs a head"):
        pipeline.finetune(pretraining(chain.store), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"data.store is empty"):
        pipeline.pretrain(load_recipe("pretrain/haxby_slice"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_small_grid_is_padded_and_it_is_said(
    chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = pretraining(chain.store, "backbone.patch_size=[6,6,1,1]", "train.steps=1")
    with caplog.at_level("INFO", "fmrizoo"):
        pipeline.pretrain(recipe, tmp_path / "run")
    assert "clips of 40×20×1×8 are padded with background to 48×24×1×8" in caplog.text


def test_the_encoder_of_the_same_seed_and_fold_is_found(chain: Chain, tmp_path: Path) -> None:
    recipe = finetuning(chain.store, "split.fold=0", "train.seed=3")
    for where in ("seed-3/fold-0", "fold-0"):
        root = tmp_path / where.replace("/", "-")
        shutil.copytree(chain.pretrained / "model", root / where / "model")
        recipe.init_from = str(root)
        assert pipeline.encoder_folder(recipe) == root / where / "model"
    recipe.init_from = str(tmp_path / "fold-0" / "fold-{fold}")
    assert pipeline.encoder_folder(recipe) == tmp_path / "fold-0/fold-0/model"
    recipe.init_from = str(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="holds no exported model"):
        pipeline.encoder_folder(recipe)


# --- again, and on after a stop -----------------------------------------------------------------


def test_a_finished_run_is_left_alone(chain: Chain) -> None:
    before = content(chain.pretrained) | content(chain.finetuned)
    again = pipeline.pretrain(pretraining(chain.store), chain.pretrained)
    assert again.already_finished and again.step == 4
    result = pipeline.finetune(
        finetuning(chain.store, f"init_from={chain.pretrained}"), chain.finetuned
    )
    assert result == chain.result
    assert content(chain.pretrained) | content(chain.finetuned) == before


def test_a_folder_keeps_its_recipe_and_split(chain: Chain) -> None:
    before = content(chain.pretrained)
    for change, said in (("train.lr=0.5", "train.lr"), ("split.seed=4", "another split")):
        with pytest.raises(RecipeError, match=said):
            pipeline.pretrain(pretraining(chain.store, change), chain.pretrained)
    assert content(chain.pretrained) == before


def test_a_start_that_failed_does_not_hold_the_folder(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="batch_size"):
        pipeline.pretrain(pretraining(chain.store, "train.accumulate=3"), tmp_path / "run")
    done = pipeline.pretrain(
        pretraining(chain.store, "split.seed=4", "train.steps=1"), tmp_path / "run"
    )
    assert done.step == 1
    assert Split.load(tmp_path / "run/split.json").config.seed == 4


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(chain: Chain, tmp_path: Path) -> None:
    def stop(event: StepEvent) -> None:
        if event.step == 1:  # the signal arrives after this step, so the next one is the last
            os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "run"
    first = pipeline.pretrain(pretraining(chain.store), run, on_step=stop)
    assert first.interrupted and first.step == 2 and not (run / "model").exists()
    second = pipeline.pretrain(pretraining(chain.store), run)
    assert second.resumed_from == 2 and not second.interrupted
    assert losses(run) == losses(chain.pretrained)
    ours, theirs = (read_model(p / "model")[0] for p in (run, chain.pretrained))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
