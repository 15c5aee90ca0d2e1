"""The LoRA head, and adapters apart from it: on every kind of encoder, in files, beside peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from head_stubs import CLASSES, VALUES, Tiny, batch_of
from safetensors.torch import load_file, save_file

import fmrizoo
from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.files import sha256_of
from fmrizoo.heads import LoraConfig, LoraHead, adapters
from fmrizoo.heads.adapter_files import encoder_sha256
from fmrizoo.layers.lora import LoraLinear, lora_layers
from fmrizoo.model import DownstreamModel
from fmrizoo.types import Backbone

SMALL: dict[str, dict[str, Any]] = {
    "swin4d": {
        "img_size": [8, 4, 4, 3], "patch_size": [2, 2, 2, 1], "embed_dim": 8, "depths": [2, 2],
        "num_heads": [1, 2], "window_size": [2, 2, 2, 2], "drop_rate": 0.2,
    },
    "swin_factorized": {
        "img_size": [8, 4, 4, 3], "patch_size": [2, 2, 2, 1], "embed_dim": 12, "depths": [4, 4],
        "num_heads": [2, 2], "window_size": [2, 2, 2], "temporal_window": 2,
    },
    "neuromamba": {
        "img_size": [8, 4, 4, 3], "patch_size": [2, 2, 2, 1], "embed_dim": 16, "depth": 2,
        "d_state": 8, "head_dim": 8, "bidirectional": True,
    },
}  # fmt: skip
ENCODERS = ["tiny", *SMALL]


def encoder_of(name: str, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return Tiny(seed) if name == "tiny" else fmrizoo.create_backbone(name, **SMALL[name])


def model_of(encoder: Backbone, *tasks: Any, **values: Any) -> DownstreamModel:
    torch.manual_seed(2)
    head = LoraHead(LoraConfig(**values), backbone=encoder, tasks=tasks or (CLASSES,))
    return DownstreamModel(encoder, head).train()


def learn(encoder: Backbone, name: str = "default", seed: int = 0, size: float = 0.3) -> None:
    """Give an adapter something to add."""
    torch.manual_seed(seed)
    for layer in lora_layers(encoder).values():
        if name in layer.names:
            torch.nn.init.normal_(layer.lora_B[name].weight, std=size)  # type: ignore[arg-type]


def values_of(encoder: Backbone, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return encoder.encode(encoder.read(batch_of().to("cpu", dtype))).values


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", ENCODERS)
def test_the_head_starts_as_the_frozen_encoder_and_trains_adapters_only(name: str) -> None:
    encoder = encoder_of(name).eval()
    before, plain = values_of(encoder), encoder_sha256(encoder)
    model = model_of(encoder, rank=2, lora_dropout=0.3)
    assert torch.equal(values_of(encoder), before)
    assert model.head.trains == "lora" and model.head.encoder_trains()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    frozen = {n: p.detach().clone() for n, p in encoder.named_parameters() if "lora_" not in n}
    trained = {n: p.detach().clone() for n, p in encoder.named_parameters() if "lora_" in n}
    for _ in range(2):  # A moves from the second step on: its gradient is B's times something
        loss, _ = model(batch_of(3, torch.tensor([0, 1, 2])))
        loss.backward()
        optimizer.step()
    for key, parameter in encoder.named_parameters():
        if key in frozen:
            assert torch.equal(parameter, frozen[key]) and parameter.grad is None
        else:
            assert not torch.equal(parameter, trained[key]), key
    assert encoder_sha256(encoder) == plain


@pytest.mark.parametrize("name", ENCODERS)
def test_only_the_adapters_drop_out(name: str) -> None:
    model = model_of(encoder_of(name), rank=2, lora_dropout=0.5)
    on = {n for n, m in model.backbone.named_modules() if m.training}
    assert on and all("lora_dropout" in n for n in on)
    assert torch.equal(values_of(model.backbone), values_of(model.backbone)), "B is 0"
    learn(model.backbone)
    assert not torch.equal(values_of(model.backbone), values_of(model.backbone))
    model.eval()
    assert torch.equal(values_of(model.backbone), values_of(model.backbone))


@pytest.mark.parametrize("name", ENCODERS)
def test_release_leaves_a_plain_encoder_with_what_was_learned(name: str) -> None:
    model = model_of(encoder_of(name), rank=2).eval()
    learn(model.backbone, size=0.03)
    expected, kinds = values_of(model.backbone), encoder_of(name)
    model.head.release(model.backbone)
    assert relative(values_of(model.backbone), expected) <= 1e-6
    assert model.backbone.state_dict().keys() == kinds.state_dict().keys()
    for (key, parameter), other in zip(
        model.backbone.named_parameters(), kinds.parameters(), strict=True
    ):
        assert parameter.requires_grad == other.requires_grad, key
    model.head.attach(model.backbone)  # and all can start again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_merging_an_encoder_and_back(name: str, dtype: torch.dtype) -> None:
    """Outputs after all layers: fp32 ≤ 1e-6 of the largest, fp64 ≤ 1e-13; then every bit back."""
    encoder = encoder_of(name).eval()
    adapters.add(encoder, rank=2, name="a")
    adapters.add(encoder, adapters.target_layers(encoder)[:1], rank=3, name="b")
    learn(encoder, "a", size=0.03)
    learn(encoder, "b", 1, size=0.03)
    adapters.use(encoder, ["a", "b"])
    encoder.to(dtype)
    expected = values_of(encoder, dtype)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    adapters.merge(encoder)
    allowed = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 0.05}[dtype]
    assert relative(values_of(encoder, dtype), expected) <= allowed
    assert all(
        not torch.equal(m.base_layer.weight, m.plain_weight) for m in lora_layers(encoder).values()
    )
    with pytest.raises(RecipeError, match="unmerge them first"):
        adapters.use(encoder, "a")
    adapters.unmerge(encoder)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize("name", ENCODERS)
def test_several_adapters_in_one_encoder_do_not_disturb_each_other(
    name: str, tmp_path: Path
) -> None:
    found = {}
    for seed, one in enumerate(("sex", "age")):
        encoder = encoder_of(name).eval()
        adapters.add(encoder, rank=seed + 2, alpha=3.0)
        learn(encoder, seed=seed)
        found[one] = values_of(encoder)
        adapters.save(encoder, tmp_path / one)
    encoder = encoder_of(name).eval()
    plain = values_of(encoder)
    for one in ("sex", "age"):
        adapters.load(encoder, tmp_path / one, one)
        assert torch.equal(values_of(encoder), found[one]), "the last one loaded acts alone"
    assert adapters.names(encoder) == ("sex", "age") and adapters.active(encoder) == ("age",)
    assert not any(p.requires_grad for n, p in encoder.named_parameters() if "lora_" in n)
    for one in ("sex", "age"):
        adapters.use(encoder, one)
        assert torch.equal(values_of(encoder), found[one])
    adapters.use(encoder, None)
    assert torch.equal(values_of(encoder), plain)
    with pytest.raises(RecipeError, match=r"no adapter 'sexx'. Did you mean 'sex'\?"):
        adapters.use(encoder, "sexx")
    adapters.remove(encoder, "sex")
    assert adapters.names(encoder) == ("age",)
    adapters.remove(encoder, "age")
    assert not lora_layers(encoder) and torch.equal(values_of(encoder), plain)


def test_what_the_head_exports_comes_back_with_its_readout(tmp_path: Path) -> None:
    model = model_of(Tiny(), CLASSES, VALUES, rank=2, lora_dropout=0.1, norm="batch")
    learn(model.backbone)
    with torch.no_grad():
        model.outputs(batch_of())  # moves the running mean
        model.head.project.weight.normal_()  # type: ignore[union-attr]
    model.eval().head.export(model.backbone, tmp_path)
    folder = tmp_path / "adapter"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 10_000
    again = model_of(Tiny(), CLASSES, VALUES, rank=2, norm="batch").eval()
    adapters.remove(again.backbone, "default")
    adapters.load(again.backbone, folder, readout=again.head)
    assert torch.equal(again.predict(batch_of()), model.predict(batch_of()))
    settings = next(iter(lora_layers(again.backbone).values())).settings["default"]
    assert (settings.rank, settings.alpha, settings.dropout) == (2, 16.0, 0.1)
    other = model_of(Tiny(), VALUES, rank=2)
    adapters.remove(other.backbone, "default")
    with pytest.raises(CheckpointError, match=r"head.norm.num_batches_tracked is \(\) in the file"):
        adapters.load(other.backbone, folder, readout=other.head)


def test_attaching_twice_is_refused() -> None:
    model = model_of(Tiny())
    with pytest.raises(RecipeError, match=r"already holds adapters \(default\)"):
        model.head.attach(model.backbone)
    loaded = Tiny()
    adapters.add(loaded, name="sex")
    with pytest.raises(RecipeError, match=r"already holds adapters \(sex\)"):
        model_of(loaded)


def test_targets_are_ends_of_names() -> None:
    encoder = encoder_of("swin4d")
    qkv = [n for n in adapters.target_layers(encoder) if n.endswith("qkv")]
    assert adapters.target_layers(encoder, ["qkv"]) == qkv == adapters.target_layers(
        encoder, ["attn.qkv"]
    )  # fmt: skip
    assert adapters.target_layers(encoder, [qkv[0]]) == qkv[:1]
    model = model_of(encoder, targets=["attn.qkv", "mlp.linear2"])
    assert {n.rsplit(".", 1)[1] for n in lora_layers(model.backbone)} == {"qkv", "linear2"}
    # "fc" is the patch embedding's Linear, but not one that may be wrapped; "kv" is half a name.
    for wrong, said in (("atn.qkv", "Did you mean 'attn.qkv'?"), ("fc", "Av"), ("kv", "Did")):
        with pytest.raises(RecipeError) as error:
            model_of(encoder_of("swin4d"), targets=[wrong])
        assert f"no target {wrong!r} in Swin4D." in str(error.value) and said in str(error.value)
        assert "mlp.linear1" in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "head.rank must be ≥ 1, got 0"),
        ({"alpha": 0.0}, "head.alpha must be > 0, got 0"),
        ({"lora_dropout": 1.0}, r"head.lora_dropout is a share in \[0, 1\)"),
        ({"pool": "max"}, "head.pool='max' is not known"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LoraConfig(**values)


def saved(tmp_path: Path, encoder: Backbone | None = None) -> Path:
    encoder = encoder or Tiny()
    adapters.add(encoder, rank=2)
    learn(encoder)
    adapters.save(encoder, tmp_path)
    return tmp_path


def test_an_adapter_of_another_encoder_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"blocks.0.fc1, and this Swin4D has no such"):
        adapters.load(encoder_of("swin4d"), folder)
    wide = Tiny()
    wide.blocks[2].fc1 = torch.nn.Linear(8, 17)
    with pytest.raises(
        CheckpointError, match=r"blocks.2.fc1 is \(2, 8\), \(16, 2\); this Tiny needs .* \(17, 2\)"
    ):
        adapters.load(wide, folder)
    with pytest.raises(CheckpointError, match="trained on a Tiny of this shape with other weights"):
        adapters.load(Tiny(seed=1), folder)
    for encoder in (wide, Tiny(1)):
        assert not lora_layers(encoder), "nothing was changed"
    adapters.load(Tiny().bfloat16(), folder)  # the same encoder, rounded


def test_the_checksum_of_an_encoder_does_not_see_adapters_or_precision() -> None:
    encoder = encoder_of("swin4d")
    plain = encoder_sha256(encoder)
    adapters.add(encoder)
    learn(encoder)
    assert encoder_sha256(encoder) == plain
    adapters.merge(encoder)
    assert encoder_sha256(encoder) == plain
    adapters.unmerge(encoder)
    assert encoder_sha256(encoder.bfloat16()) == plain == encoder_sha256(encoder.float())
    assert encoder_sha256(encoder_of("swin4d", 1)) != plain


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    for number, (spoil, message) in enumerate(
        (
            (lambda f: (f / "adapter_model.safetensors").unlink(), "there is no adapter_model"),
            (lambda f: (f / "adapter_config.json").unlink(), "there is no adapter_config.json"),
            (lambda f: (f / "adapter_config.json").write_text("{"), "is damaged"),
            (lambda f: (f / "adapter_config.json").write_text("[]"), "is no JSON object"),
            (lambda f: edit(f / "adapter_config.json", use_dora=True), "asks for use_dora=True"),
            (lambda f: edit(f / "adapter_config.json", peft_type="IA3"), "peft_type='IA3'"),
            (lambda f: edit(f / "adapter_config.json", r="two"), "no LoRA configuration"),
            (lambda f: edit(f / "fmrizoo.json", weights_sha256="0"), "its checksum is not"),
        )
    ):
        folder = saved(tmp_path / str(number))
        spoil(folder)
        with pytest.raises(CheckpointError, match=message):
            adapters.load(Tiny(), folder)


def test_files_with_odd_tensors_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "fmrizoo.json").unlink()  # as one that peft wrote
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    first = next(iter(whole))
    for tensors, message in (
        ({}, "not a whole adapter: no lora_A in it"),
        ({k: v for k, v in whole.items() if k != first}, "has only one of lora_A, lora_B"),
        ({**whole, "model.x": torch.ones(1)}, r"model.x does not start with base_model.model."),
        ({**whole, "base_model.model.x.bias": torch.ones(1)}, "no part of a LoRA adapter"),
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message):
            adapters.load(Tiny(), folder)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is damaged"):
        adapters.load(Tiny(), folder)


def test_the_facts_beside_an_adapter_are_true(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    facts = json.loads((folder / "fmrizoo.json").read_text())
    assert facts == {
        "encoder": "Tiny",
        "encoder_sha256": encoder_sha256(Tiny()),
        "weights_sha256": sha256_of(folder / "adapter_model.safetensors"),
    }
    shapes = {k: tuple(v.shape) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    assert shapes == {
        f"base_model.model.blocks.{block}.{layer}.lora_{half}.weight": shape
        for block, width in enumerate((6, 6, 8))
        for layer, ends in (("fc1", (width, 2 * width)), ("fc2", (2 * width, width)))
        for half, shape in (("A", (2, ends[0])), ("B", (ends[1], 2)))
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["fc1", "fc2"] and config["r"] == 2
    some = Tiny()
    adapters.add(some, ["blocks.1.fc1", "fc2"])
    adapters.save(some, tmp_path / "some")
    config = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2",
                                        "blocks.2.fc2"]  # fmt: skip


def test_an_adapter_that_peft_wrote_adds_what_it_added_there() -> None:
    """A fixture from the peft package, for where that is not installed; see its README."""
    folder = Path(__file__).parents[1] / "fixtures" / "peft_adapter"
    encoder = Tiny().eval()
    for k, (_, parameter) in enumerate(sorted(encoder.named_parameters())):
        steps = torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + k * 1.3
        with torch.no_grad():
            parameter.copy_((torch.sin(steps) * 0.3).view(parameter.shape))
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        plain = encoder.blocks[1](encoder.blocks[0](expected["input"]))
        adapters.load(encoder, folder, name="theirs")
        found = encoder.blocks[1](encoder.blocks[0](expected["input"]))
    torch.testing.assert_close(found, expected["output"], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(plain, found, atol=0.05)


@pytest.mark.parametrize(
    ("name", "targets"), [*((name, []) for name in ENCODERS), ("tiny", ["blocks.1.fc1", "fc2"])]
)
def test_peft_reads_our_files_and_we_read_its(
    name: str, targets: list[str], tmp_path: Path
) -> None:
    """Oracle: the peft package. Equal names and files, outputs equal to rounding."""
    peft = pytest.importorskip("peft")
    ours = encoder_of(name).eval()
    adapters.add(ours, targets, rank=3, alpha=5.0, dropout=0.1)
    learn(ours)
    adapters.save(ours, tmp_path / "ours", readout=torch.nn.Linear(2, 2))
    theirs = peft.PeftModel.from_pretrained(encoder_of(name), str(tmp_path / "ours")).eval()
    inner = theirs.base_model.model
    assert relative(values_of(inner), values_of(ours)) <= 1e-6
    own = {k: v for k, v in ours.state_dict().items() if "lora_" in k}
    other = {k: v for k, v in inner.state_dict().items() if "lora_" in k}
    assert own.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in own.items())
    theirs.save_pretrained(str(tmp_path / "theirs"))
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs")]
    parts = [{k: v for k, v in f.items() if ".head." not in k} for f in files]
    assert parts[0].keys() == parts[1].keys()
    assert all(torch.equal(v, parts[1][k]) for k, v in parts[0].items())
    back = encoder_of(name).eval()
    adapters.load(back, tmp_path / "theirs")
    assert torch.equal(values_of(back), values_of(ours))


def test_peft_starts_alike_and_keeps_the_readout_under_our_names(tmp_path: Path) -> None:
    """peft's own start and its ``modules_to_save``, on an encoder with a head of that name."""
    peft = pytest.importorskip("peft")
    base = Tiny()
    base.head = torch.nn.Linear(3, 2)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["fc1"], modules_to_save=["head"])
    theirs = peft.get_peft_model(base, config)
    for part in theirs.modules():
        if hasattr(part, "lora_A"):
            assert not part.lora_B["default"].weight.any()
            bound = part.lora_A["default"].in_features ** -0.5
            assert part.lora_A["default"].weight.abs().max() <= bound
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours, readout = Tiny(), torch.nn.Linear(3, 2)
    adapters.load(ours, tmp_path / "theirs", readout=readout)
    assert torch.equal(readout.weight, base.head.weight)
    adapters.save(ours, tmp_path / "ours", readout=readout)
    names = [set(load_file(tmp_path / f / "adapter_model.safetensors")) for f in ("ours", "theirs")]
    assert names[0] == names[1]
    read = peft.LoraConfig.from_pretrained(str(tmp_path / "ours"))
    for key in ("r", "lora_alpha", "lora_dropout", "modules_to_save", "bias", "use_dora"):
        assert getattr(read, key) == getattr(config, key), key


def test_wrapped_layers_are_lora_layers() -> None:
    encoder = Tiny()
    adapters.add(encoder)
    assert set(adapters.target_layers(encoder)) == set(lora_layers(encoder))
    assert all(isinstance(m, LoraLinear) for m in lora_layers(encoder).values())
