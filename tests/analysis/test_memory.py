"""Memory of a step: every number from a process of its own, failures said, files checked."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fmrizoo.analysis import memory as module
from fmrizoo.analysis.memory import MemoryRow, measure_memory, read_memory, write_memory
from fmrizoo.analysis.memory_step import build, clip_of, step
from fmrizoo.analysis.sizes import brain_of
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.model import PretrainingModel
from fmrizoo.types import Backbone, Grid
from fmrizoo.zoo import load_recipe

SMALL = [
    "backbone.img_size=[24,24,24,8]",
    "backbone.patch_size=[6,6,6,1]",
    "backbone.embed_dim=24",
    "backbone.depths=[2,2]",
    "backbone.num_heads=[2,4]",
    "train.precision=fp32",
]
ROW = MemoryRow(
    recipe="pretrain/swin4d_simmim",
    backbone="swin4d",
    objective="",
    parameters=50_916_768,
    checkpointing="none",
    frames=20,
    voxels=(96, 96, 96),
    precision="bf16",
    device="cpu",
    mb=661.5,
)


@pytest.mark.slow
@pytest.mark.skipif(not module.CLEAR.exists(), reason="needs Linux's /proc")
def test_longer_clips_need_more_and_recomputation_needs_less() -> None:
    seen = []
    rows = measure_memory(
        ["swin4d_simmim"],
        [32, 256],
        ["none", "block"],
        [*SMALL, "objective=null"],
        on_row=lambda done, total, row: seen.append((done, total, row.frames)),
    )
    assert seen == [(1, 4, 32), (2, 4, 256), (3, 4, 32), (4, 4, 256)]
    assert [(r.checkpointing, r.frames) for r in rows] == [
        ("none", 32), ("none", 256), ("block", 32), ("block", 256),
    ]  # fmt: skip
    short, long, _, spared = (r.mb for r in rows)
    assert short is not None and long is not None and spared is not None
    # 256 slots × 64 tokens × 24 features × 4 bytes = 1.6 MB for every tensor kept of stage 1.
    assert long > short + 20 and spared < 0.7 * long
    assert {(r.backbone, r.objective, r.voxels, r.note) for r in rows} == {
        ("swin4d", "", (24, 24, 24), "")
    }
    assert rows[0].parameters == sum(p.numel() for p in small_model(32).parameters())


def small_model(frames: int, more: tuple[str, ...] = ("objective=null",)) -> torch.nn.Module:
    given = [*SMALL, f"data.clip_frames={frames}", f"backbone.img_size=[24,24,24,{frames}]", *more]
    return build(load_recipe("swin4d_simmim", given), "none", "cpu", torch.float32)


@pytest.mark.parametrize("more", [("objective=null",), ()])
def test_a_step_is_a_whole_training_step(more: tuple[str, ...]) -> None:
    model = small_model(8, more)
    assert isinstance(model, PretrainingModel if not more else Backbone) and model.training
    before = [p.grad for p in model.parameters()]
    assert all(g is not None and not g.any() for g in before)
    step(model, clip_of(Grid(24, 24, 24, 8), "cpu", torch.float32))
    grads = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    assert all(g is b for (_, g), b in zip(grads, before, strict=True)), "no new gradient is made"
    moved = sum(bool(g is not None and g.any()) for _, g in grads)
    assert moved > 0.9 * len(grads)


def test_a_step_that_is_killed_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    about = {
        "backbone": "swin4d",
        "objective": "simmim",
        "parameters": 7,
        "voxels": [24, 24, 24],
        "precision": "fp32",
    }
    for code, errors, said in (
        (-9, "", "stopped by signal 9 (9: out of memory, as a rule)"),
        (1, "Traceback\n  …\nRuntimeError: no room", "RuntimeError: no room"),
        (3, "", "exit code 3"),
    ):

        def run(
            words: list[str], code: int = code, errors: str = errors, **_: object
        ) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(words, code, json.dumps(about) + "\n", errors)

        monkeypatch.setattr(module.subprocess, "run", run)
        (row,) = measure_memory(["swin4d_simmim"], [8], ["none"], SMALL)
        assert row.mb is None and row.note == said and row.parameters == 7


def test_a_model_that_cannot_be_built_stops_the_measurement() -> None:
    given = [*SMALL, "objective.mask_patch_size=[5,6,6,1]"]
    with pytest.raises(DataError, match=r"8 frames could not be built: objective\.mask"):
        measure_memory(["swin4d_simmim"], [8], ["none"], given)


def test_what_cannot_be_measured_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'swin5d'"):
        measure_memory(["swin5d"], [8])
    with pytest.raises(RecipeError, match="checkpointing must be one of"):
        measure_memory(["swin4d_simmim"], [8], ["some"])
    with pytest.raises(RecipeError, match="does not divide"):
        measure_memory(["swin4d_simmim"], [8, 9])  # patches of 2 frames
    with pytest.raises(DataError, match="on cpu or cuda, not on 'xpu'"):
        measure_memory(["swin4d_simmim"], [8], device="xpu")
    monkeypatch.setattr(module, "CLEAR", tmp_path / "none")
    with pytest.raises(DataError, match="which this system does not have: measure on Linux"):
        measure_memory(["swin4d_simmim"], [8])


def test_the_made_up_brain_meets_as_many_patches_as_a_brain() -> None:
    brain = brain_of((96, 96, 96))
    patches = brain.view(16, 6, 16, 6, 16, 6).any(5).any(3).any(1)
    assert float(patches.float().mean()) == pytest.approx(1481 / 4096, abs=0.01)
    batch = clip_of(Grid(96, 96, 96, 2), "cpu", torch.bfloat16)
    assert batch.voxels is not None and batch.voxels.values.dtype == torch.bfloat16
    assert batch.voxels.counts == (int(brain.sum()),)


def test_files_come_back_and_bad_ones_are_refused(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, frames=40, mb=None, note="stopped by signal 9")]
    path = write_memory(tmp_path / "new", rows)
    assert path.name == "memory.json" and read_memory(path) == tuple(rows)
    good = json.loads(path.read_text())
    for spoil in (
        lambda b: b.update(schema="other/1"),
        lambda b: b["rows"][0].pop("mb"),
        lambda b: b["rows"][0].update(more=1),
        lambda b: b["rows"][0].update(voxels=[1, 2]),
        lambda b: b["rows"][0].update(frames="many"),
        lambda b: b.update(rows=3),
    ):
        bad = json.loads(json.dumps(good))
        spoil(bad)
        path.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=r"memory\.json"):
            read_memory(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not readable as memory measurements"):
        read_memory(path)
