"""Official SwiFT files in every form they come in, and what must be refused."""

from __future__ import annotations

import argparse
import logging
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from fmrizoo.errors import CheckpointError
from fmrizoo.layers.positions import resize_space, resize_time
from fmrizoo.weights.swift import REQUIRED, load_swift

FIXTURE = Path(__file__).parents[1] / "fixtures" / "swift_parity_fixture.pt"
CASE: dict[str, Any] = torch.load(FIXTURE, weights_only=True)["cases"]["tiny_full_msa"]
STATE: dict[str, torch.Tensor] = CASE["state_dict"]
HYPER: dict[str, Any] = CASE["config"]


class Foreign:
    """Stands for whatever a training script pickled along."""


def lightning(**extra: Any) -> dict[str, Any]:
    """As SwiFT's trainer saves: the encoder under ``model.``, two kinds of task head beside it."""
    head = {"output_head.mlp.weight": torch.ones(2), "model.head.weight": torch.ones(3)}
    state = {f"model.{k}": v for k, v in STATE.items()} | head
    more = {"learning_rate": 1e-4, "task": "sex", "first_window_size": HYPER["first_window_size"]}
    return {"epoch": 3, "state_dict": state, "hyper_parameters": {**HYPER, **more}, **extra}


def output(encoder: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return encoder(CASE["input"].float()).to_grid()


def saved(folder: Path, content: Any, name: str = "swift.ckpt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def refused(match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_swift(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["plain", "plain file", "lightning", "lightning file"])
def test_every_form_gives_the_original_s_outputs(form: str, tmp_path: Path) -> None:
    given: Any = STATE if form.startswith("plain") else lightning()
    hyper = HYPER if form.startswith("plain") else None
    encoder = load_swift(saved(tmp_path, given) if form.endswith("file") else given, hyper)
    torch.testing.assert_close(output(encoder), CASE["output"], atol=2e-4, rtol=0)
    report = encoder.load_report
    assert report.matched == sorted(encoder.state_dict()) == sorted(STATE)
    assert not report.missing and not report.unexpected and not report.interpolated
    heads = ["model.head.weight", "output_head.mlp.weight"]
    assert sorted(report.head) == (heads if form.startswith("lightning") else [])
    assert not encoder.training


def test_what_was_loaded_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fmrizoo"):
        load_swift(lightning())
    assert (
        f"{len(STATE)} tensors matched, 0 missing, 0 unexpected, 2 of the task head" in caplog.text
    )


def test_a_file_without_the_unused_norm_is_whole() -> None:
    state = {k: v for k, v in STATE.items() if not k.startswith("norm.")}
    encoder = load_swift(state, HYPER)
    assert encoder.load_report.missing == ["norm.bias", "norm.weight"]
    torch.testing.assert_close(output(encoder), CASE["output"], atol=2e-4, rtol=0)


def test_given_hyper_parameters_win_over_the_file_s() -> None:
    content = lightning()
    content["hyper_parameters"]["window_size"] = [9, 9, 9, 9]
    encoder = load_swift(content, {"window_size": HYPER["window_size"]})
    torch.testing.assert_close(output(encoder), CASE["output"], atol=2e-4, rtol=0)


def test_missing_hyper_parameters_are_named() -> None:
    refused(f"does not tell {', '.join(REQUIRED)}: pass hyper_parameters", STATE)
    partial = {k: v for k, v in HYPER.items() if k not in ("window_size", "num_heads")}
    refused("does not tell num_heads, window_size: pass", STATE, partial)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spatial_dims": 3}, "spatial_dims=3 is not supported"),
        ({"downsample": "merging"}, "downsample='merging' is not supported"),
        ({"embed_dim": 12}, r"embed_dim=12 but the patch embedding's weight is \(6, 27\)"),
        ({"depths": [2, 1]}, "unexpected: layers.1.blocks.1"),
        ({"depths": [2, 4]}, "missing: layers.1.blocks.2"),
        ({"depths": 3}, "impossible hyper-parameters: backbone.depths"),
        ({"mlp_ratio": 2.0}, "other shape: layers.0.blocks.0.mlp"),
        ({"num_heads": [4, 2]}, "does not divide the width 6"),
        ({"embed_dim": "big"}, "backbone.embed_dim: Value 'big'"),
        ({"last_layer_full_MSA": "maybe"}, "backbone.last_layer_full_msa"),
    ],
)
def test_hyper_parameters_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    refused(message, STATE, {**HYPER, **change})


def test_tensors_without_a_place_or_of_another_shape_are_refused() -> None:
    name = "layers.0.blocks.0.norm1.weight"
    without = {k: v for k, v in STATE.items() if k != name}
    refused(rf"\(missing: {name}\)", without, HYPER)
    refused(r"\(unexpected: layers.9.x\)", {**STATE, "layers.9.x": torch.ones(1)}, HYPER)
    refused(rf"\(other shape: {name}\)", {**STATE, name: torch.ones(7)}, HYPER)
    refused("entry 'epoch' is no tensor but int", {**STATE, "epoch": 3}, HYPER)
    content = lightning()
    content["state_dict"]["ema.weight"] = torch.ones(1)
    refused("no place for tensor 'ema.weight'", content)


def test_position_tables_are_resized_only_when_asked() -> None:
    larger = {**HYPER, "img_size": [24, 12, 12, 8]}
    refused(r"pos_embeds.0.pos_embed \(1, 6, 4, 4, 4, 1\) → .*interpolate=True", STATE, larger)
    encoder = load_swift(STATE, larger, interpolate=True)
    own = encoder.state_dict()
    assert encoder.load_report.interpolated == [
        "pos_embeds.0.pos_embed (1, 6, 4, 4, 4, 1) → (1, 6, 8, 4, 4, 1)",
        "pos_embeds.0.time_embed (1, 6, 1, 1, 1, 6) → (1, 6, 1, 1, 1, 8)",
        "pos_embeds.1.pos_embed (1, 12, 2, 2, 2, 1) → (1, 12, 4, 2, 2, 1)",
        "pos_embeds.1.time_embed (1, 12, 1, 1, 1, 6) → (1, 12, 1, 1, 1, 8)",
    ]
    assert "interpolated: pos_embeds.0.pos_embed" in str(encoder.load_report)
    space, time = STATE["pos_embeds.0.pos_embed"], STATE["pos_embeds.0.time_embed"]
    assert torch.equal(own["pos_embeds.0.pos_embed"], resize_space(space, (8, 4, 4)))
    assert torch.equal(own["pos_embeds.0.time_embed"], resize_time(time, 8))
    # Half a step from the first table entry outwards, the end value holds; inside it is linear.
    x = own["pos_embeds.0.pos_embed"][0, 0, :, 0, 0, 0]
    first = space[0, 0, :, 0, 0, 0]
    torch.testing.assert_close(x[0], first[0])
    torch.testing.assert_close(x[1], 0.75 * first[0] + 0.25 * first[1])
    others = {k: v for k, v in own.items() if not k.startswith("pos_embeds.")}
    assert all(torch.equal(v, STATE[k]) for k, v in others.items())


def test_interpolation_leaves_tables_that_fit_alone_and_never_changes_a_width() -> None:
    assert not load_swift(STATE, HYPER, interpolate=True).load_report.interpolated
    wide = {**STATE, "pos_embeds.0.pos_embed": torch.zeros(1, 9, 4, 4, 4, 1)}
    refused("position table of another width", wide, HYPER, interpolate=True)


def test_foreign_objects_are_unpickled_only_when_trusted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path, lightning(callbacks=Foreign()))
    refused(r"refuses \(.*Foreign\); if you trust its origin, .*trust_pickle=True", path)
    encoder = load_swift(path, trust_pickle=True)
    assert "unpickling" in caplog.text and str(path) in caplog.text
    torch.testing.assert_close(output(encoder), CASE["output"], atol=2e-4, rtol=0)


def test_trusted_objects_whose_code_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("their_training_code")
    module.Foreign = type("Foreign", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = saved(tmp_path, lightning(callbacks=module.Foreign()))
    monkeypatch.delitem(sys.modules, module.__name__)
    refused("cannot be unpickled: No module named 'their_training_code'", path, trust_pickle=True)


def test_hyper_parameters_may_be_a_namespace(tmp_path: Path) -> None:
    content = lightning()
    content["hyper_parameters"] = argparse.Namespace(**content["hyper_parameters"])
    encoder = load_swift(saved(tmp_path, content), trust_pickle=True)
    torch.testing.assert_close(output(encoder), CASE["output"], atol=2e-4, rtol=0)
    refused("are no mapping of names to values but list", STATE, [1])


@pytest.mark.parametrize("trust", [False, True])
def test_files_that_are_no_checkpoint(trust: bool, tmp_path: Path) -> None:
    whole = saved(tmp_path, STATE).read_bytes()
    files = {
        "text.ckpt": b"this is not a checkpoint at all",
        "empty.ckpt": b"",
        "bytes.ckpt": bytes(range(256)) * 20,
        "torn.ckpt": whole[: len(whole) // 2],
        "zip.ckpt": b"PK\x03\x04" + b"\0" * 500,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        refused(rf"{name} is no PyTorch checkpoint", tmp_path / name, HYPER, trust_pickle=trust)
    refused("no checkpoint file .*gone.ckpt", tmp_path / "gone.ckpt", HYPER, trust_pickle=trust)
    refused("no checkpoint file", tmp_path, HYPER, trust_pickle=trust)


def test_other_pickles_and_contents(tmp_path: Path) -> None:
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    refused("plain.pkl is no PyTorch checkpoint", tmp_path / "plain.pkl", HYPER)
    refused("holds no state dict", saved(tmp_path, [1, 2]), HYPER)
    refused("holds no state dict", {"state_dict": {}}, HYPER)
