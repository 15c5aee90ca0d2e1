"""The prompt head: what trains, how prompts start, and when they drop out."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from head_stubs import CLASSES, Tiny, batch_of

from fmrizoo.errors import RecipeError
from fmrizoo.heads import PromptConfig, PromptHead
from fmrizoo.model import DownstreamModel


def model_of(**values: Any) -> DownstreamModel:
    torch.manual_seed(1)
    encoder = Tiny()
    head = PromptHead(PromptConfig(**values), backbone=encoder, tasks=(CLASSES,))
    return DownstreamModel(encoder, head).train()


def test_prompts_start_uniform_within_xaviers_bound() -> None:
    tokens = model_of(count=500).head.prompts()
    assert tokens is not None and [t.shape for t in tokens] == [(500, 6), (500, 6), (500, 8)]
    for prompt in tokens:
        bound = sqrt(6 / (2 * 2 * 2 * 1 + prompt.shape[1]))
        assert prompt.abs().max() <= bound
        assert prompt.std().item() == pytest.approx(bound / sqrt(3), rel=0.05)


def test_prompts_reach_every_layer_and_train_with_the_readout_alone() -> None:
    model = model_of(count=3)
    assert model.head.trains == "prompts" and model.head.encoder_trains()
    assert model.head.needs == {"prompts"}
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not any(m.training for m in model.backbone.modules())
    encoder = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    before = {k: v.detach().clone() for k, v in model.head.named_parameters()}
    assert [n for n in before if "tokens" in n] == ["tokens.0", "tokens.1", "tokens.2"]
    loss, _ = model(batch_of(3, torch.tensor([0, 1, 2])))
    loss.backward()
    torch.optim.SGD(model.head.parameters(), 0.1).step()
    assert all(not torch.equal(p, before[k]) for k, p in model.head.named_parameters())
    assert all(torch.equal(v, encoder[k]) for k, v in model.backbone.state_dict().items())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_prompts_change_the_answer() -> None:
    model = model_of().eval()
    before = model.predict(batch_of())
    with torch.no_grad():
        model.head.tokens[0] += 1  # type: ignore[index]
    assert not torch.allclose(model.predict(batch_of()), before)


def test_prompts_drop_out_in_training_only() -> None:
    model = model_of(prompt_dropout=0.5, count=50)
    tokens = model.head.prompts()
    assert tokens is not None and 0.3 < (tokens[0] == 0).float().mean() < 0.7
    tokens = model.eval().head.prompts()
    assert tokens is not None and all(
        torch.equal(t, own)
        for t, own in zip(tokens, model.head.tokens, strict=True)  # type: ignore[arg-type]
    )


def test_release_gives_a_plain_encoder() -> None:
    model = model_of()
    model.head.release(model.backbone)
    assert all(p.requires_grad == (n != "spare") for n, p in model.backbone.named_parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "head.count must be ≥ 1, got 0"),
        ({"prompt_dropout": -0.1}, r"head.prompt_dropout is a share in \[0, 1\), got -0.1"),
        ({"norm": "grp"}, "head.norm='grp' is not known"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        model_of(**values)
