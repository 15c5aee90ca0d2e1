"""NeuroMamba: which patches become tokens, in what order and place, and what may depend on what."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fmrizoo.backbones import neuromamba
from fmrizoo.backbones.neuromamba import NeuroMamba, NeuroMambaConfig, PlacedTokens
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.types import Batch, Grid, Tokens, Voxels

CLIP = Grid(8, 6, 4, 6)
SMALL: dict[str, Any] = {
    "img_size": list(CLIP),
    "patch_size": [2, 2, 2, 2],
    "embed_dim": 16,
    "d_state": 8,
    "head_dim": 8,
    "depth": 2,
    "chunk_size": 16,
}


def model(seed: int = 0, **values: Any) -> NeuroMamba:
    torch.manual_seed(seed)
    return NeuroMamba(NeuroMambaConfig(**{**SMALL, **values})).eval()


def clips(count: int = 3, frames: int = CLIP.t, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise everywhere, and brains of unequal size."""
    torch.manual_seed(seed)
    mask = torch.zeros(count, *CLIP[:3], dtype=torch.bool)
    for number, brain in enumerate(mask):
        brain[1 : 7 - 2 * number, 1:4, 0:3] = True
    return torch.randn(count, 1, *CLIP[:3], frames), mask


def tokens_of(backbone: NeuroMamba, bold: Tensor, mask: Tensor | None = None) -> PlacedTokens:
    found = backbone.tokenize(bold, mask, tr=torch.full((len(bold),), 2.0))
    assert isinstance(found, PlacedTokens)
    return found


@pytest.mark.parametrize(
    ("width", "millions"), [(128, 1.43), (192, 3.11), (256, 5.43), (384, 11.99)]
)
def test_sizes_are_the_published_ones(width: int, millions: float) -> None:
    """1.4, 3.1, 5.4 and 11.9 M with an output Linear of 432; d_state = embed_dim / 4."""
    with torch.device("meta"):
        backbone = NeuroMamba(NeuroMambaConfig(embed_dim=width))
    assert backbone._blocks()[0].mixer.d_state == width // 4
    count = sum(p.numel() for p in backbone.parameters()) + (width + 1) * 432
    assert abs(count / 1e6 - millions) < 0.01


def test_tokens_are_the_patches_that_hold_brain() -> None:
    backbone, (bold, mask) = model(), clips()
    found = tokens_of(backbone, bold, mask)
    assert found.patches is not None and found.inside is not None
    background = bold[..., 0].masked_fill(~mask[:, None], torch.inf).flatten(1).amin(1)
    for sample in range(3):
        filled = torch.where(mask[sample, ..., None], bold[sample, 0], background[sample])
        wanted = []
        for x in range(4):
            for y in range(3):
                for z in range(2):
                    for t in range(3):
                        box = tuple(slice(2 * i, 2 * i + 2) for i in (x, y, z))
                        if mask[sample][box].any():
                            patch = filled[(*box, slice(2 * t, 2 * t + 2))].flatten()
                            wanted.append(((x, y, z, t), patch, mask[sample][box].float().mean()))
        kept = int(found.valid[sample].sum())
        assert kept == len(wanted) and found.valid[sample, :kept].all()
        for row, (index, patch, share) in enumerate(wanted):
            assert tuple(found.index[sample, row].tolist()) == index
            assert torch.equal(found.patches[sample, row], patch)
            assert found.brain[sample, row] == share
    assert torch.equal(found.inside.float().mean(-1), found.brain)
    assert len({int(n) for n in found.valid.sum(1)}) == 3


def test_padding_points_at_cells_that_are_left_out() -> None:
    backbone, (bold, mask) = model(), clips()
    found = tokens_of(backbone, bold, mask)
    for index in found.index:
        assert len(torch.unique(index, dim=0)) == len(index)
    assert not found.values[~found.valid].any() and not found.brain[~found.valid].any()


def test_brain_shares_add_up() -> None:
    backbone, (bold, mask) = model(), clips()
    found = tokens_of(backbone, bold, mask)
    total = (found.brain * found.valid).sum(1) * 16
    torch.testing.assert_close(total, mask.flatten(1).sum(1).float() * CLIP.t)


@pytest.mark.parametrize("drop", [True, False])
def test_compact_and_dense_batches_give_the_same_tokens(drop: bool) -> None:
    backbone, (bold, mask) = model(drop_background=drop), clips()
    background = torch.tensor([-3.0, -4.0, -5.0])
    names = ["a", "b", "c"]
    start, tr = torch.zeros(3, dtype=torch.long), torch.full((3,), 2.0)
    compact = Batch.compact(Voxels.of(bold, mask, background), mask, tr, names, names, start)
    first = backbone.read(compact)
    second = backbone.tokenize(bold, mask, background=background, tr=tr)
    assert "_bold" not in compact.__dict__, "a compact batch must not be made dense"
    for key, value in vars(first).items():
        other = getattr(second, key)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other
    dense = compact.bold.where(mask[:, None, ..., None], background.view(-1, 1, 1, 1, 1, 1))
    third = backbone.read(Batch(dense, mask, tr, names, names, start))
    assert torch.equal(first.index, third.index)


def test_without_a_mask_brain_is_what_leaves_the_background() -> None:
    backbone, (bold, mask) = model(), clips(1)
    bold = torch.where(mask[:, None, ..., None], bold.abs(), -1.0)
    with_mask = backbone.tokenize(bold, mask, background=torch.tensor([-1.0]))
    without = backbone.tokenize(bold)
    assert torch.equal(with_mask.index, without.index)
    assert torch.equal(with_mask.values, without.values)
    everything = model(drop_background=False).tokenize(bold)
    assert everything.values.shape[1] == 4 * 3 * 2 * 3 and everything.brain.min() == 1


def test_what_is_outside_the_brain_changes_nothing() -> None:
    backbone, (bold, mask) = model(), clips()
    other = torch.where(mask[:, None, ..., None], bold, torch.randn_like(bold) * 100)
    assert torch.equal(backbone(bold, mask).values, backbone(other, mask).values)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_clip_does_not_depend_on_its_batch_mates(batching: str, bidirectional: bool) -> None:
    """Kept tokens are the same, features within 1e-5; features of padding are 0."""
    backbone = model(batching=batching, bidirectional=bidirectional)
    bold, mask = clips()
    together = backbone(bold, mask)
    for sample in range(3):
        alone = backbone(bold[sample : sample + 1], mask[sample : sample + 1])
        count = alone.values.shape[1]
        assert torch.equal(together.index[sample, :count], alone.index[0])
        assert together.valid[sample].sum() == count
        torch.testing.assert_close(
            together.values[sample, :count], alone.values[0], atol=1e-5, rtol=1e-5
        )
        assert not together.values[sample, count:].any()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_equals_padded(bidirectional: bool) -> None:
    """Features and gradients, fp64, 1e-9."""
    bold, mask = clips()
    found = []
    for batching in ("packed", "padded"):
        backbone = model(batching=batching, bidirectional=bidirectional).double()
        values = backbone(bold.double(), mask).values
        values.square().sum().backward()
        found.append([values, *(p.grad for p in backbone.parameters())])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_earlier_features_do_not_change_with_later_tokens_to_the_last_bit() -> None:
    backbone, (bold, mask) = model(), clips(1)
    found = tokens_of(backbone, bold, mask)
    first = backbone.encode(found, causal=True).values
    for start in (1, 16, 30, found.values.shape[1] - 1):
        values = found.values.clone()
        values[:, start:] = torch.randn_like(values[:, start:]) * 20
        second = backbone.encode(found.with_values(values), causal=True).values
        assert torch.equal(first[:, :start], second[:, :start])
        assert (first[:, start:] != second[:, start:]).any(-1).all()


def test_both_ways_is_not_causal_and_says_so() -> None:
    backbone, (bold, mask) = model(bidirectional=True), clips(1)
    found = tokens_of(backbone, bold, mask)
    with pytest.raises(RecipeError, match="looks both ways"):
        backbone.encode(found, causal=True)
    with pytest.raises(RecipeError, match="cannot go on"):
        backbone.extend(found.values)
    assert backbone.supports(backbone.config) == {"prompts"}
    assert NeuroMamba.supports(NeuroMambaConfig()) == {"causal", "prompts"}
    values = found.values.clone()
    values[:, -1] += 1
    assert (backbone.encode(found.with_values(values)).values[:, 0] != 0).any()
    first, second = (backbone.encode(found.with_values(v)).values for v in (found.values, values))
    assert (first[:, 0] != second[:, 0]).any()


@pytest.mark.parametrize("order", ["xyzt", "txyz", "tzyx", "zxty"])
def test_tokens_follow_the_order_asked_for(order: str) -> None:
    backbone, (bold, mask) = model(order=order), clips(1)
    found = tokens_of(backbone, bold, mask)
    usual = tokens_of(model(), bold, mask)
    keys = [tuple(row["xyzt".index(axis)] for axis in order) for row in found.index[0].tolist()]
    assert keys == sorted(keys)
    assert sorted(found.index[0].tolist()) == usual.index[0].tolist()
    for row, index in enumerate(found.index[0]):
        (same,) = (usual.index[0] == index).all(-1).nonzero()[:, 0].tolist()
        assert found.patches is not None and usual.patches is not None
        assert torch.equal(found.patches[0, row], usual.patches[0, same])


def test_positions_in_millimetres_and_seconds() -> None:
    """A patch of 1 mm voxels lies where one of half as many 2 mm voxels does; tr counts."""
    fine = model(coordinates="world", voxel_size=[1.0, 1.0, 1.0], patch_size=[4, 4, 4, 2])
    coarse = model(coordinates="world", voxel_size=[2.0, 2.0, 2.0], patch_size=[2, 2, 2, 2])
    coarse.position.load_state_dict(fine.position.state_dict())
    index = torch.tensor([[[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 2]]])
    a, b = (m._where(index, torch.tensor([0.8])) for m in (fine, coarse))
    assert torch.equal(a, b)
    later = coarse._where(index, torch.tensor([1.6]))
    assert torch.equal(later[..., :3], b[..., :3]) and (later[..., 3] == 2 * b[..., 3]).all()
    with pytest.raises(DataError, match="tr"):
        coarse.tokenize(torch.randn(1, 1, *CLIP))
    bold, mask = clips(2)
    assert coarse.encode(tokens_of(coarse, bold, mask)).values.isfinite().all()


def test_hidden_tokens_keep_their_place() -> None:
    """All values equal: the features still tell the tokens apart."""
    backbone, (bold, mask) = model(), clips(1)
    found = tokens_of(backbone, bold, mask)
    blank = found.with_values(torch.zeros_like(found.values))
    assert isinstance(blank, PlacedTokens) and blank.where is not None
    placed = backbone.place(
        torch.zeros_like(found.patches if found.patches is not None else found.values), found.index
    )
    torch.testing.assert_close(
        placed, backbone._placed(blank.values + backbone.embed.bias, blank.where)
    )
    values = backbone.encode(blank).values[0]
    assert len(torch.unique(values, dim=0)) == len(values)


def test_going_on_equals_one_encode() -> None:
    """Pieces and single tokens; fp64, 1e-9."""
    backbone, (bold, mask) = model().double(), clips(2)
    mask[1] = mask[0]
    found = tokens_of(backbone, bold.double(), mask)
    assert found.patches is not None
    with torch.no_grad():
        whole = backbone.encode(found, causal=True).values
        placed = backbone.place(found.patches, found.index)
        state, parts = None, []
        for piece in placed.split([20, 1, 1, 5, placed.shape[1] - 27], 1):
            features, state = backbone.extend(piece, state)
            parts.append(features)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(rate: float) -> None:
    backbone, (bold, mask) = model(drop_rate=rate).train(), clips()
    for block in backbone._blocks():
        block.mixer.rows = 16
    gradients = []
    for mode in ("none", "block", "window-chunk"):
        backbone.zero_grad()
        backbone.set_checkpointing(mode)
        torch.manual_seed(1)
        backbone(bold, mask).values.square().sum().backward()
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match="checkpointing"):
        backbone.set_checkpointing("all")


def test_window_chunk_keeps_little_for_the_backward_pass() -> None:
    """Between forward and backward: at least five times less than with everything kept."""
    backbone, bold = model(drop_background=False), torch.randn(1, 1, *CLIP[:3], 80)
    for block in backbone._blocks():
        block.mixer.rows = 128
    kept = {}
    for mode in ("none", "window-chunk"):
        backbone.set_checkpointing(mode)
        held: dict[int, int] = {}

        def pack(t: Tensor, held: dict[int, int] = held) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        known = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = backbone(bold).values.sum()
        kept[mode] = sum(size for where, size in held.items() if where not in known)
        loss.backward()
    assert kept["window-chunk"] < 0.2 * kept["none"], kept


@pytest.mark.parametrize("length", [6, 2, 12])
@pytest.mark.parametrize("values", [{}, {"bidirectional": True}, {"ngroups": 2}])
def test_flops_are_those_that_are_run(values: dict[str, Any], length: int) -> None:
    """Within 0.5 %, with and without a mask, for clips of any number of frames."""
    backbone, (bold, mask) = model(chunk_size=64, **values), clips(1, length)
    for given in (mask, None):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(bold, given) if given is not None else backbone.encode(
                model(drop_background=False).tokenize(bold)
            )
        run = counter.get_total_flops()
        if given is None:  # the other model's tokens were counted too
            run -= 0
        counted = backbone.flops(Grid(*CLIP[:3], length), None if given is None else given[0])
        assert abs(sum(counted.values()) - run) <= 5e-3 * run
    assert sum(backbone.flops(CLIP, mask[0]).values()) < sum(backbone.flops(CLIP).values())


def test_any_number_of_frames_and_smaller_clips_fit() -> None:
    backbone, (bold, mask) = model(), clips(1, 20)
    assert backbone(bold, mask).grid == Grid(4, 3, 2, 10)
    small, part = bold[:, :, :5, :5, :3], mask[:, :5, :5, :3]
    features = backbone(small, part)
    assert features.grid == Grid(4, 3, 2, 10)
    torch.testing.assert_close((features.brain * 16).sum(), part.sum().float() * 20)
    odd = model(img_size=[7, 5, 3, 6])
    assert odd.clip_grid == Grid(8, 6, 4, 6)
    assert odd(torch.randn(1, 1, 7, 5, 3, 6)).values.isfinite().all()


def test_intermediates_end_in_the_features() -> None:
    backbone, (bold, mask) = model(depth=3), clips()
    every = backbone.forward_intermediates(bold, mask)
    assert len(every) == 3
    torch.testing.assert_close(every[-1].values, backbone(bold, mask).values)
    first, last = backbone.forward_intermediates(bold, mask, [0, -1])
    assert torch.equal(first.values, every[0].values)
    assert torch.equal(last.values, every[2].values)
    with pytest.raises(RecipeError, match="do not exist"):
        backbone.forward_intermediates(bold, mask, [3])


def test_dropout_is_drawn_in_training_only() -> None:
    backbone, (bold, mask) = model(drop_rate=0.5), clips(1)
    assert torch.equal(backbone(bold, mask).values, backbone(bold, mask).values)
    backbone.train()
    assert not torch.equal(backbone(bold, mask).values, backbone(bold, mask).values)


def test_the_backend_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    backbone, (bold, mask) = model(), clips(1)
    neuromamba._announce.cache_clear()
    with caplog.at_level(logging.INFO):
        backbone(bold, mask)
        model()(bold, mask)
    assert backbone.scan_backend == "torch"
    assert [r.message for r in caplog.records] == ["neuromamba scans with torch"]


def test_plain_tokens_are_placed_by_their_index() -> None:
    backbone, (bold, mask) = model(), clips(1)
    found = tokens_of(backbone, bold, mask)
    bare = Tokens(found.values, found.index, found.valid, found.grid, found.brain)
    assert torch.equal(backbone.encode(bare).values, backbone.encode(found).values)


def test_clips_that_do_not_fit_are_refused() -> None:
    backbone = model()
    with pytest.raises(DataError, match="larger than the model's grid"):
        backbone.tokenize(torch.randn(1, 1, 10, 6, 4, 6))
    with pytest.raises(DataError, match="5 frames do not divide"):
        backbone.tokenize(torch.randn(1, 1, 8, 6, 4, 5))
    with pytest.raises(DataError, match="bold must be"):
        backbone.tokenize(torch.randn(1, 2, *CLIP))
    with pytest.raises(DataError, match="without a brain voxel"):
        backbone.tokenize(torch.randn(1, 1, *CLIP), torch.zeros(1, *CLIP[:3], dtype=torch.bool))
    with pytest.raises(DataError, match="without a brain voxel"):
        backbone.tokenize(torch.zeros(1, 1, *CLIP))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_dim": 50}, "head_dim=50 does not divide the inner width .* = 384"),
        ({"ngroups": 4}, "ngroups=4 does not divide the 6 heads"),
        ({"order": "xyt"}, "order must hold each of x, y, z, t once"),
        ({"order": "xyzz"}, "order must hold"),
        ({"coordinates": "mm"}, "coordinates='mm' is not known"),
        ({"scan_backend": "cuda"}, "scan_backend='cuda' is not known"),
        ({"batching": "pack"}, "batching='pack' is not known.*packed"),
        ({"patch_size": [6, 6, 6]}, "patch_size needs 4 positive numbers"),
        ({"voxel_size": [2.0, 2.0, 0.0]}, "voxel_size needs 3 positive numbers"),
        ({"img_size": [96, 96, 96, 21]}, "does not divide into patches"),
        ({"d_state": 0}, "d_state must be ≥ 1"),
        ({"d_conv": 1}, "d_conv must be ≥ 2"),
        ({"depth": 0}, "depth must be ≥ 1"),
        ({"chunk_size": 40}, "multiple of 16"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\)"),
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        NeuroMambaConfig(**values)
