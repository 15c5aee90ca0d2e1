"""The contracts: what a batch must be, features on their grid, tasks, run names, data contracts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.types import Batch, Contract, Features, Grid, RunKey, TaskSpec, Tokens, Voxels
from fmrizoo.types.batch import fresh

CONTRACT = Contract(
    "native", "RAS", (40, 20, 1), (3.1, 3.75, 3.75), 2.5, "voxel", "run", "0", "0.1.0"
)


def parts(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "bold": torch.zeros(2, 1, 4, 3, 2, 5),
        "mask": torch.ones(2, 4, 3, 2, dtype=torch.bool),
        "tr": torch.ones(2),
        "subject": ["01", "02"],
        "run": ["a", "b"],
        "start": torch.zeros(2),
    }
    return values | changes


def test_grid_arithmetic() -> None:
    grid = Grid(7, 5, 4, 4)
    assert grid.size == 560
    assert grid.padded((2, 2, 2, 2)) == (8, 6, 4, 4)
    assert Grid(8, 6, 4, 4).divided((2, 3, 4, 1)) == (4, 2, 1, 4)
    assert str(grid) == "7×5×4×4"


def test_a_batch_knows_its_size_and_grid() -> None:
    batch = Batch(**parts())
    assert len(batch) == 2 and batch.grid == (4, 3, 2, 5)


def voxels_of(batch: Batch) -> Voxels:
    return Voxels.of(batch.bold, batch.mask, torch.tensor([-1.0, 7.0]))


def two_brains() -> Batch:
    torch.manual_seed(0)
    return Batch(**parts(bold=torch.randn(2, 1, 4, 3, 2, 5), mask=torch.rand(2, 4, 3, 2) > 0.4))


def test_voxels_hold_the_brain_and_come_back_dense() -> None:
    batch = two_brains()
    voxels = voxels_of(batch)
    assert voxels.counts == tuple(batch.mask.flatten(1).sum(1).tolist())
    assert voxels.values.shape == (5, sum(voxels.counts))
    background = torch.tensor([-1.0, 7.0]).view(2, 1, 1, 1, 1, 1)
    expected = torch.where(batch.mask[:, None, ..., None], batch.bold, background)
    assert torch.equal(voxels.dense(), expected)
    assert torch.equal(voxels.to("cpu", torch.float64).dense(), expected.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dense_clips_are_those_of_index_copy(dtype: torch.dtype) -> None:
    batch = two_brains()
    batch.mask[1, 0] = False
    voxels = voxels_of(batch).to("cpu", dtype)
    assert voxels.counts[0] != voxels.counts[1]
    # Values that are trained take index_copy_, all others NumPy.
    trained = replace(voxels, values=voxels.values.clone().requires_grad_())
    with torch.no_grad():
        dense, reference = voxels.dense(), trained.dense()
    assert dense.dtype == dtype and dense.stride() == reference.stride()
    assert torch.equal(dense, reference)


def test_memory_of_a_batch_is_used_again_only_when_nobody_looks() -> None:
    size = 4 << 20
    first = fresh((4, size), torch.int8, "cpu").fill_(1)
    place, row = first.data_ptr(), first[2].numpy()
    del first
    second = fresh((4, size), torch.int8, "cpu").fill_(2)
    assert second.data_ptr() != place and (row == 1).all()  # a row is still in somebody's hands
    del row
    third = fresh((2, 2 * size), torch.int8, "cpu")
    assert third.data_ptr() == place


def test_a_compact_batch_becomes_dense_only_when_it_is_read() -> None:
    dense = two_brains()
    voxels = voxels_of(dense)
    rest = {k: v for k, v in parts().items() if k not in ("bold", "mask")}
    batch = Batch.compact(voxels, dense.mask, **rest)
    moved = batch.to("cpu", torch.bfloat16)
    assert len(batch) == 2 and batch.grid == (4, 3, 2, 5)
    assert torch.equal(batch.background, voxels.background) and dense.background is None
    assert "_bold" not in batch.__dict__ and "_bold" not in moved.__dict__
    assert torch.equal(batch.bold, voxels.dense()) and batch.bold is batch.bold
    assert moved.bold.dtype == moved.voxels.values.dtype == torch.bfloat16
    changed = replace(batch, bold=dense.bold)
    assert changed.voxels is None and changed.bold is dense.bold


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4, 48)}, r"floating point \(5, \d+\), got"),
        ({"values": torch.zeros(5, 48, dtype=torch.int8)}, "got torch.int8"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, r"index must be \(\d+,\)"),
        ({"background": torch.zeros(3)}, r"background \(2,\), got"),
    ],
)
def test_voxels_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(voxels_of(Batch(**parts())), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bold": torch.zeros(2, 4, 3, 2, 5)}, r"bold must be \(b, 1, x, y, z, t\), got \(2, 4"),
        ({"bold": torch.zeros(2, 3, 4, 3, 2, 5)}, "bold must be"),
        ({"bold": torch.zeros(())}, "bold must be"),
        ({"bold": torch.zeros(2, 1, 4, 3, 2, 5, dtype=torch.int16)}, "got torch.int16"),
        ({"mask": torch.ones(2, 4, 3, 3, dtype=torch.bool)}, r"mask must be bool .*\(2, 4, 3, 2\)"),
        ({"mask": torch.ones(2, 4, 3, 2)}, "got torch.float32"),
        ({"tr": torch.ones(3)}, "tr must have 2 rows"),
        ({"target": torch.ones(1)}, "target must have 2 rows"),
        ({"seed": torch.ones(3)}, "seed must have 2 rows"),
        ({"subject": ["01"]}, "need 2 names each"),
        ({"run": []}, "need 2 names each"),
    ],
)
def test_a_batch_is_checked_at_the_door(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Batch(**parts(**change))


def test_moving_a_batch_changes_the_type_of_bold_only() -> None:
    batch = Batch(**parts(target=torch.tensor([1, 2]), seed=torch.tensor([3, 4])))
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.bold.dtype == torch.bfloat16 and batch.bold.dtype == torch.float32
    assert moved.tr.dtype == torch.float32 and moved.mask.dtype == torch.bool
    assert moved.target is not None and moved.target.tolist() == [1, 2]
    assert moved.seed is not None and moved.seed.tolist() == [3, 4]
    assert Batch(**parts()).to("cpu").target is None


def test_tokens_keep_their_shape() -> None:
    ones = torch.ones(1, 3)
    tokens = Tokens(torch.zeros(1, 3, 2), torch.zeros(1, 3, 4), ones.bool(), Grid(3, 1, 1, 1), ones)
    assert torch.equal(tokens.with_values(torch.ones(1, 3, 2)).values, torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match=r"expected \(1, 3, 2\), got \(1, 2, 2\)"):
        tokens.with_values(torch.ones(1, 2, 2))


def test_features_go_to_their_cells_in_any_order_and_gaps_are_zero() -> None:
    grid = Grid(2, 1, 2, 2)
    index = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])[None]
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])[None]
    valid = torch.tensor([[True, True, False]])
    dense = Features(values, index, valid, grid, torch.ones(1, 3)).to_grid()
    assert dense.shape == (1, 2, 2, 1, 2, 2)
    assert dense[0, :, 1, 0, 1, 0].tolist() == [1, 10]
    assert dense[0, :, 0, 0, 1, 1].tolist() == [2, 20]
    assert dense[0, :, 0, 0, 0, 0].tolist() == [0, 0]
    assert dense.sum() == 33


def test_unknown_pooling_is_refused() -> None:
    ones = torch.ones(1, 1)
    index = torch.zeros(1, 1, 4, dtype=torch.long)
    one = Features(ones[..., None], index, ones.bool(), Grid(1, 1, 1, 1), ones)
    with pytest.raises(RecipeError, match="must be one of mean, brain, space, frame, got 'max'"):
        one.pooled("max")


def test_tasks() -> None:
    assert TaskSpec("classification", ("a", "b", "c")).outputs == 3
    assert TaskSpec("regression", mean=1.0, std=2.0).outputs == 1
    with pytest.raises(RecipeError, match=r"at least two classes .* found \['a'\]"):
        TaskSpec("classification", ("a",))
    for std in (0.0, float("nan")):
        with pytest.raises(RecipeError, match=f"s.d. {std}: nothing to predict"):
            TaskSpec("regression", std=std)
    with pytest.raises(RecipeError, match="got 'ranking'"):
        TaskSpec("ranking")
    levels = TaskSpec("ordinal", ("low", "mid", "high"), name="pain")
    assert (levels.outputs, levels.scores) == (2, 3)
    assert [levels.target_of(v) for v in ("low", "high")] == [0, 2]
    assert math.isnan(levels.target_of(None))
    with pytest.raises(DataError, match=r"pain 'none' does not occur .*known: low, mid, high"):
        levels.target_of("none")
    for wrong, said in (
        ({"weights": (1.0,)}, "3 classes but 1 weights"),
        ({"smoothing": 0.1}, "label smoothing is for classification"),
    ):
        with pytest.raises(RecipeError, match=said):
            replace(levels, **wrong)
    with pytest.raises(RecipeError, match="is a regression: it has no classes"):
        TaskSpec("regression", weights=(1.0,))


def test_frames_are_means_over_the_valid_places_of_each_slot() -> None:
    grid = Grid(2, 1, 1, 3)
    index = torch.cartesian_prod(*(torch.arange(s) for s in grid)).unsqueeze(0)
    values = torch.arange(12.0).view(1, 6, 2)
    valid = torch.tensor([[True, True, True, False, True, False]])
    found = Features(values, index, valid, grid, valid.float())
    # Slot 0 has the place 0 alone, slot 1 both, slot 2 the place 0 alone.
    expected = torch.stack([values[0, 0], (values[0, 1] + values[0, 4]) / 2, values[0, 2]])
    torch.testing.assert_close(found.by_frame()[0], expected)
    assert torch.equal(found.pooled("frame"), found.by_frame().flatten(1))


def test_frames_of_thousands_of_tokens_keep_their_mean_in_bf16() -> None:
    grid = Grid(32, 32, 4, 2)
    index = torch.cartesian_prod(*(torch.arange(s) for s in grid)).unsqueeze(0)
    torch.manual_seed(0)
    values = (torch.randn(1, grid.size, 3) + 2).bfloat16()
    found = Features(values, index, torch.ones(1, grid.size).bool(), grid, torch.ones(1, grid.size))
    expected = values.float().view(1, -1, 2, 3).mean(1)
    torch.testing.assert_close(found.by_frame().float(), expected, atol=8e-3, rtol=4e-3)


def test_equal_contracts_have_no_differences_whatever_wrote_them() -> None:
    assert CONTRACT.differences(replace(CONTRACT, code_version="9")) == []
    assert CONTRACT.differences(replace(CONTRACT, tr=2.5004)) == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("space", "MNI", "space: expected native, found MNI"),
        ("orientation", "LAS", "orientation: expected RAS, found LAS"),
        ("grid", (40, 20, 2), "grid: expected (40, 20, 1), found (40, 20, 2)"),
        ("voxel_size", (3.1, 3.75, 3.7), "voxel_size: expected (3.1, 3.75, 3.75), found"),
        ("tr", 2.0, "tr: expected 2.5, found 2.0"),
        ("normalization", "minmax", "normalization: expected voxel, found minmax"),
        ("statistics", "clip", "statistics: expected run, found clip"),
        ("background", "min", "background: expected 0, found min"),
    ],
)
def test_every_field_of_a_contract_counts(field: str, value: Any, said: str) -> None:
    (found,) = CONTRACT.differences(replace(CONTRACT, **{field: value}))
    assert found.startswith(said)


def test_contracts_survive_json() -> None:
    import json

    assert Contract.from_dict(json.loads(json.dumps(CONTRACT.to_dict()))) == CONTRACT
    with pytest.raises(DataError, match=r"unknown fields \['colour'\]"):
        Contract.from_dict(CONTRACT.to_dict() | {"colour": 1})
    short = {k: v for k, v in CONTRACT.to_dict().items() if k != "tr"}
    with pytest.raises(DataError, match=r"incomplete: .*'tr'"):
        Contract.from_dict(short)


label = st.text("abcXYZ019", min_size=1, max_size=6)
maybe = st.one_of(st.just(""), label)


@given(label, maybe, maybe, maybe, maybe, st.dictionaries(st.sampled_from(["dir", "echo"]), label))
def test_run_names_are_read_back(
    subject: str, session: str, task: str, acquisition: str, run: str, extra: dict[str, str]
) -> None:
    key = RunKey(subject, session, task, acquisition, run, tuple(extra.items()))
    assert RunKey.parse(str(key)) == key


def test_run_names_look_like_bids() -> None:
    key = RunKey("01", task="rest", run="2", extra=(("echo", "1"),))
    assert str(key) == "sub-01_task-rest_run-2_echo-1"
    for bad in ("", "task-rest", "sub-01_bold", "sub"):
        with pytest.raises(DataError, match="is no run name"):
            RunKey.parse(bad)
