"""The chunked scan against the recurrence token by token, and against the quadratic form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fmrizoo.backbones.ssd import LIMIT, _power, cut, first_state, ssd, step
from fmrizoo.errors import RecipeError


def inputs(
    length: int,
    decay: float,
    groups: int = 1,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    seed: int = 0,
) -> list[Tensor]:
    """x, dt, A, B, C, state; over 64 tokens a head decays by up to about e^-``decay``."""
    torch.manual_seed(seed)
    h, p, n = 4, 6, 5
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(batch, length, h, p)
    A = -torch.linspace(1, 16, h)
    dt = torch.rand(batch, length, h) * 2 * decay / (64 * 16)
    B, C = torch.randn(2, batch, length, groups, n)
    state = torch.randn(batch, groups, n, h // groups, p)
    kinds = (dtype, wide, wide, dtype, dtype, wide)
    return [
        t.to(kind).requires_grad_() for t, kind in zip((x, dt, A, B, C, state), kinds, strict=True)
    ]


def run(given: list[Tensor], backend: str, chunk: int = 64) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of all inputs through both of them."""
    x, dt, A, B, C, state = given
    y, final = ssd(x, dt, A, B, C, state, chunk, backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (y, final)]
    total = (y * weights[0]).sum() + (final * weights[1]).sum()
    return [y, final], list(torch.autograd.grad(total, given))


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value of ``b``."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def test_the_recurrence_is_the_quadratic_form() -> None:
    """y_i = Σ_{j ≤ i} (C_i · B_j) exp(a_{j+1} + … + a_i) dt_j x_j, within 1e-12 in fp64."""
    x, dt, A, B, C, _ = inputs(20, 5.0, groups=2)
    got, _ = ssd(x, dt, A, B, C, backend="ref")
    running = (dt * A).cumsum(1)
    B, C = (t.repeat_interleave(2, 2) for t in (B, C))
    weight = torch.exp(running[:, :, None] - running[:, None])
    lower = torch.ones(20, 20, dtype=torch.bool).tril()[None, :, :, None]
    scores = torch.einsum("bihn,bjhn->bijh", C, B) * weight.masked_fill(~lower, 0.0)
    wanted = torch.einsum("bijh,bjh,bjhp->bihp", scores, dt, x)
    assert error(got, wanted) < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("decay", [0.6, 20.0, 60.0, 100.0, 141.0, 183.0, 211.0])
@pytest.mark.parametrize("length", [1, 5, 16, 64, 100, 200])
def test_values_and_gradients_equal_the_recurrence(length: int, decay: float, groups: int) -> None:
    """1e-9 in fp64, from chunks that decay little to some that must be cut."""
    given = inputs(length, decay, groups)
    for mine, theirs in zip(run(given, "torch"), run(given, "ref"), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert error(a, b) < 1e-9


@pytest.mark.parametrize("decay", [1e3, 1e4, 1e6])
def test_any_decay_is_exact_and_finite(decay: float) -> None:
    """Single tokens that wipe out the state included; values within 1e-9 of the recurrence."""
    given = inputs(100, decay)
    (outputs, gradients), (wanted, _) = run(given, "torch"), run(given, "ref")
    assert all(error(a, b) < 1e-9 for a, b in zip(outputs, wanted, strict=True))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("chunk", [1, 7, 16, 32, 48, 128])
def test_any_chunk_gives_the_same(chunk: int) -> None:
    given = inputs(75, 50.0)
    for mine, theirs in zip(run(given, "torch", chunk), run(given, "ref"), strict=True):
        assert all(error(a, b) < 1e-9 for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("decay", [5.0, 100.0, 211.0])
def test_fp32_is_close_to_fp64(decay: float) -> None:
    """2e-5 of the largest value (the decays themselves are sums of up to 64 fp32 numbers)."""
    exact = run(inputs(200, decay), "ref")
    single = run(inputs(200, decay, dtype=torch.float32), "torch")
    for a, b in zip([*single[0], *single[1]], [*exact[0], *exact[1]], strict=True):
        assert error(a, b) < 2e-5


@pytest.mark.parametrize("decay", [5.0, 211.0])
def test_bf16_is_finite_and_close(decay: float) -> None:
    """2 % of the largest value for outputs, 4 % for gradients; fp32 states."""
    exact = run(inputs(200, decay), "ref")
    rounded = run(inputs(200, decay, dtype=torch.bfloat16), "torch")
    assert rounded[0][0].dtype == torch.bfloat16 and rounded[0][1].dtype == torch.float32
    for tolerance, mine, theirs in zip((0.02, 0.04), rounded, exact, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.isfinite().all() and error(a, b) < tolerance


def test_gradcheck() -> None:
    given = inputs(21, 8.0, groups=2, batch=1)
    assert torch.autograd.gradcheck(
        lambda x, dt, A, B, C, s: ssd(x, dt, A, B, C, s, 16), given, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [5.0, 90.0, 300.0, 1e4])
def test_outputs_do_not_depend_on_later_tokens_to_the_last_bit(
    decay: float, dtype: torch.dtype
) -> None:
    """Also where later tokens make a chunk be cut: the cut comes after the tokens before it."""
    x, dt, A, B, C, state = inputs(150, decay, dtype=dtype)
    first, _ = ssd(x, dt, A, B, C, state)
    for start in (1, 40, 63, 64, 100, 149):
        other = [t.detach().clone() for t in (x, dt, B, C)]
        for t in other:
            t[:, start:] = torch.rand_like(t[:, start:]) * 3
        if decay < 100:  # cut at the extreme only, where it may choose shorter chunks throughout
            other[1][:, start:] += 0.5
        second, _ = ssd(other[0], other[1], A, other[2], other[3], state)
        assert torch.equal(first[:, :start], second[:, :start])
        assert not torch.equal(first[:, start:], second[:, start:])


def test_two_calls_equal_one() -> None:
    x, dt, A, B, C, state = inputs(100, 20.0)
    whole, end = ssd(x, dt, A, B, C, state)
    first, middle = ssd(x[:, :37], dt[:, :37], A, B[:, :37], C[:, :37], state)
    second, last = ssd(x[:, 37:], dt[:, 37:], A, B[:, 37:], C[:, 37:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(last, end, atol=1e-12, rtol=1e-9)


def test_step_by_step_equals_the_scan() -> None:
    x, dt, A, B, C, state = inputs(30, 20.0)
    whole, end = ssd(x, dt, A, B, C, state)
    for t in range(30):
        y, state = step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        torch.testing.assert_close(y, whole[:, t], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(state, end, atol=1e-12, rtol=1e-9)


def test_chunks_are_cut_where_the_state_would_decay_too_far() -> None:
    dt = torch.full((1, 128, 1), 0.1)
    rate = 120.0 / (64 * 0.1)
    assert cut(dt, torch.tensor([-0.99 * rate]), 64).where is None
    chunks = cut(dt, torch.tensor([-1.01 * rate]), 64)
    assert chunks.rows == 4 and chunks.where is not None
    assert chunks.where[:64].tolist() == [*range(63), 64]
    assert math.isclose(LIMIT, 120 / math.log(2))
    hard = cut(dt * 1000, torch.tensor([-rate]), 64)
    assert (hard.size, hard.rows) == (64, 128)


def test_powers_of_two_are_exact() -> None:
    k = torch.arange(-126.0, 128)
    assert _power(k).tolist() == [2.0**e for e in range(-126, 128)]
    assert _power(torch.tensor([-127.0, -1e6])).tolist() == [0.0, 0.0]
    assert _power(torch.tensor([-1022.0, 1000.0]).double()).tolist() == [2.0**-1022, 2.0**1000]


def test_nan_is_not_hidden() -> None:
    x, dt, A, B, C, state = inputs(40, 5.0)
    broken = dt.detach().clone()
    broken[:, 10] = torch.nan
    y, final = ssd(x, broken, A, B, C, state)
    assert y[:, 10:].isnan().any() and final.isnan().any()


def test_shapes_without_numbers() -> None:
    """On meta and fake tensors nothing is asked of the data."""
    given = [t.detach().to("meta") for t in inputs(100, 5.0, dtype=torch.float32)]
    y, final = ssd(*given[:6])
    assert (y.shape, final.shape) == (given[0].shape, given[5].shape)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t.detach()) for t in inputs(100, 5.0, dtype=torch.float32)]
        assert ssd(*fake[:6])[0].shape == given[0].shape


def test_what_cannot_be_computed_is_refused() -> None:
    x, dt, A, B, C, _ = inputs(4, 1.0, dtype=torch.float32)
    with pytest.raises(RecipeError, match="fp16 has not the range"):
        ssd(x.half(), dt, A, B.half(), C.half())
    with pytest.raises(RecipeError, match="backend torch or ref"):
        ssd(x, dt, A, B, C, backend="triton")
    with pytest.raises(RecipeError, match="chunk ≥ 1"):
        ssd(x, dt, A, B, C, chunk=0)
    assert first_state(x.bfloat16(), B).dtype == torch.float32
