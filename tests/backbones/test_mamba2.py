"""The Mamba-2 mixer against mamba-ssm (fixture) and against a plain transcription of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_stubs import convolve, scan
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fmrizoo.backbones import mamba2_kernels
from fmrizoo.backbones.mamba2 import Mamba2
from fmrizoo.backbones.mamba2_slices import Mix
from fmrizoo.backbones.ssd import ssd
from fmrizoo.errors import MissingExtraError, RecipeError
from fmrizoo.layers.ragged import Pack, end_to_end, give_back

ROOT = Path(__file__).resolve().parents[2]
FIXTURE: dict[str, Any] = torch.load(
    ROOT / "tests/fixtures/mamba2_parity_fixture.pt", weights_only=True
)


def mixer(seed: int = 0, rows: int | None = None, **values: Any) -> Mamba2:
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_state": 8, "head_dim": 16, "chunk_size": 16}
    made = Mamba2(**{**sizes, **values})
    made.rows = rows
    return made


def plain(m: Mamba2, u: Tensor, prenorm: Tensor | None = None) -> Tensor:
    """The mixer as mamba-ssm writes it down, token by token, with autograd's gradient."""
    if prenorm is not None:
        u = F.rms_norm(u, u.shape[-1:], prenorm, 1e-5)
    shared = m.ngroups * m.d_state
    z, xBC, dt = m.in_proj(u).split([m.inner, m.inner + 2 * shared, m.heads], -1)
    xBC = F.silu(m.conv1d(xBC.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
    x, B, C = xBC.split([m.inner, shared, shared], -1)
    x = x.unflatten(-1, (m.heads, -1))
    y, _ = ssd(
        x,
        F.softplus(dt + m.dt_bias),
        -torch.exp(m.A_log),
        B.unflatten(-1, (m.ngroups, -1)),
        C.unflatten(-1, (m.ngroups, -1)),
        backend="ref",
    )
    y = ((y + m.D[:, None] * x).flatten(2) * F.silu(z)).unflatten(-1, (m.ngroups, -1))
    return m.out_proj(F.rms_norm(y, y.shape[-1:], eps=1e-5).flatten(2) * m.norm.weight)


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_and_names_equal_those_of_mamba_ssm(groups: int) -> None:
    """fp32 within 5e-6, absolute (outputs are of order 1)."""
    weights, wanted = FIXTURE[f"m2_{groups}"]
    m = Mamba2(64, d_state=16, d_conv=4, expand=2, head_dim=16, ngroups=groups)
    m.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(m(FIXTURE["X"]), wanted, atol=5e-6, rtol=0)


def test_outputs_equal_transformers() -> None:
    """A second implementation, where it is installed: fp32 within 1e-5."""
    pytest.importorskip("transformers")
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    m = Mamba2(64, d_state=16, head_dim=16, ngroups=2)
    config = Mamba2Config(
        hidden_size=64, num_heads=8, head_dim=16, state_size=16, n_groups=2, expand=2, chunk_size=16
    )
    other = Mamba2Mixer(config, 0)
    other.load_state_dict(m.state_dict())
    u = torch.randn(2, 50, 64)
    with torch.no_grad():
        torch.testing.assert_close(m(u), other(u), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "bias-norm-residual"])
def test_values_and_gradients_equal_the_plain_mixer(
    groups: int, extras: bool, recompute: bool
) -> None:
    """fp64, relative 1e-9; three slices, the last one short; kept and made-again activations."""
    m = mixer(rows=64, ngroups=groups, bias=extras).double()
    m.recompute = recompute
    u = torch.randn(2, 75, 32, dtype=torch.float64, requires_grad=True)
    norm = torch.rand(32, dtype=torch.float64, requires_grad=True) if extras else None
    mine = m.run(u, Pack(), prenorm=norm, residual=extras)
    theirs = plain(m, u, norm) + (u if extras else 0)
    torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-9)
    wanted = [u, *m.parameters(), *([norm] if norm is not None else [])]
    weight = torch.randn_like(mine)
    gradients = [torch.autograd.grad((y * weight).sum(), wanted) for y in (mine, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 1e-9 * b.abs().max()


@pytest.mark.parametrize("length", [1, 2, 5, 16, 17, 31])
def test_any_length(length: int) -> None:
    m = mixer(rows=16).double()
    u = torch.randn(1, length, 32, dtype=torch.float64)
    torch.testing.assert_close(m(u), plain(m, u), atol=1e-11, rtol=1e-9)


def test_bf16_is_finite_and_close() -> None:
    """Outputs within 3 %, gradients within 5 % in norm; also as autocast on fp32 weights.

    The decays' gradients too: they are differences, and must not drown in rounded sums.
    """
    m = mixer(rows=64)
    u = torch.randn(1, 200, 32)
    weight = torch.randn(1, 200, 32)
    wanted = m(u)
    exact = torch.autograd.grad((wanted * weight).sum(), list(m.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        cast = m(u)
    autocast = torch.autograd.grad((cast.float() * weight).sum(), list(m.parameters()))
    m.bfloat16()
    rounded = m(u.bfloat16())
    gradients = torch.autograd.grad((rounded.float() * weight).sum(), list(m.parameters()))
    assert rounded.dtype == torch.bfloat16
    for a in (cast, rounded):
        assert (a.float() - wanted).norm() < 0.03 * wanted.norm()
    for found in (autocast, gradients):
        for a, b in zip(found, exact, strict=True):
            assert a.isfinite().all() and (a.float() - b).norm() < 0.05 * b.norm()


def test_fp16_is_refused() -> None:
    with pytest.raises(RecipeError, match="fp16 has not the range"):
        mixer().half()(torch.randn(1, 8, 32).half())


def test_continuing_equals_one_call() -> None:
    """Pieces of 1 to 40 tokens; single ones by the one-token path. fp64, 1e-9."""
    m = mixer(rows=32, ngroups=2).double()
    norm = torch.rand(32, dtype=torch.float64)
    u = torch.randn(2, 80, 32, dtype=torch.float64)
    whole = m.run(u, Pack(), prenorm=norm, residual=True)
    with torch.no_grad():
        state, outputs = None, []
        for piece in u.split([1, 1, 2, 40, 1, 1, 34], 1):
            y, state = m.extend(piece, state, prenorm=norm, residual=True)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.detach(), atol=1e-11, rtol=1e-9)


def test_gradients_pass_through_the_state() -> None:
    m = mixer(rows=32).double()
    u = torch.randn(1, 40, 32, dtype=torch.float64, requires_grad=True)
    first, state = m.extend(u[:, :13])
    second, _ = m.extend(u[:, 13:], state)
    weight = torch.randn(1, 40, 32, dtype=torch.float64)
    wanted = [u, *m.parameters()]
    (a, b) = (
        torch.autograd.grad((y * weight).sum(), wanted)
        for y in (torch.cat([first, second], 1), m(u))
    )
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-8)


def test_later_tokens_change_nothing_to_the_last_bit() -> None:
    m = mixer(rows=64)
    u = torch.randn(1, 150, 32)
    first = m(u)
    for start in (1, 40, 64, 130):
        other = u.clone()
        other[:, start:] = torch.randn(150 - start, 32) * 30
        assert torch.equal(first[:, :start], m(other)[:, :start])


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_equals_padded_equals_alone(reverse: bool) -> None:
    """Samples of unequal length, what pads them is noise; fp64, 1e-10."""
    lengths = [30, 7, 50, 30, 1]
    u = torch.randn(5, 50, 32, dtype=torch.float64)
    results = []
    for batching in ("packed", "padded"):
        m = mixer(rows=64, batching=batching).double()
        packs = m.packs(lengths, 50, u.device)
        assert len(packs) == (4 if batching == "packed" else 1)
        if not reverse:
            results.append(m(u, lengths))
        else:
            parts = [m.run(p.take(u), p, reverse=True) for p in packs]
            results.append(give_back(packs, parts, 5, 50))
    for sample, length in enumerate(lengths):
        alone = u[sample : sample + 1, :length]
        wanted = m(alone.flip(1)).flip(1) if reverse else m(alone)
        for found in results:
            torch.testing.assert_close(found[sample, :length], wanted[0], atol=1e-10, rtol=1e-8)
        assert reverse or not results[1][sample, length:].any()


def test_a_strong_decay_takes_shorter_chunks_and_stays_right() -> None:
    m = mixer(chunk_size=64).double()
    with torch.no_grad():
        m.dt_bias.fill_(1.0)
    u = torch.randn(1, 100, 32, dtype=torch.float64)
    torch.testing.assert_close(m(u), plain(m, u), atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
def test_only_wanted_gradients_are_computed(recompute: bool) -> None:
    """Any choice of weights: the bits of full training, and the products of the rest are spared."""
    m = mixer(rows=64, bias=True)
    m.recompute = recompute
    norm, u = torch.rand(32), torch.randn(2, 75, 32)
    weight = torch.randn(2, 75, 32)

    def run(chosen: set[str], of_input: bool) -> tuple[dict[str, Tensor | None], int]:
        for name, parameter in m.named_parameters():
            parameter.requires_grad_(name in chosen)
            parameter.grad = None
        x = u.clone().requires_grad_(of_input)
        counted = {torch.ops.aten.addmm_: in_place_flops}  # the counter knows it not
        with FlopCounterMode(display=False, custom_mapping=counted) as counter:
            loss = (m.run(x, Pack(), prenorm=norm, residual=True) * weight).sum()
            loss.backward()
        found = {name: p.grad for name, p in m.named_parameters()}
        return {**found, "u": x.grad}, counter.get_total_flops()

    names = {name for name, _ in m.named_parameters()}
    everything, most = run(names, True)
    tokens, projected = 2 * 75, m.in_proj.out_features
    inward, outward = (2 * tokens * 32 * width for width in (projected, m.inner))
    spared = {
        (frozenset(names - {"in_proj.weight"}), True): inward,
        (frozenset(names - {"out_proj.weight", "norm.weight"}), True): outward,
        (frozenset(names), False): inward,
        (frozenset({"in_proj.weight"}), True): outward,
        (frozenset(), True): inward + outward,
        (frozenset({"conv1d.weight", "D"}), False): 2 * inward + outward,
        (frozenset({"A_log"}), False): 2 * inward + outward,
        (frozenset({"dt_bias", "in_proj.bias"}), True): inward + outward,
        (frozenset({"out_proj.bias", "conv1d.bias"}), True): inward + outward,
    }
    for (chosen, of_input), less in spared.items():
        found, flops = run(set(chosen), of_input)
        assert most - flops == less, chosen
        for name, gradient in found.items():
            wanted = everything[name]
            if name in chosen or (name == "u" and of_input):
                assert gradient is not None and wanted is not None
                assert torch.equal(gradient, wanted), name
            else:
                assert gradient is None, name


def in_place_flops(_: Any, left: list[int], right: list[int], **rest: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def test_nothing_is_kept_where_no_gradients_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Function sees ``requires_grad``, not whether gradients are recorded."""
    given: list[Any] = []
    apply = Mix.apply
    monkeypatch.setattr(Mix, "apply", lambda *args: given.append(args) or apply(*args))
    m, u = mixer(), torch.randn(1, 40, 32, requires_grad=True)
    with torch.no_grad():
        without = m(u)
    assert not any(isinstance(t, Tensor) and t.requires_grad for t in given.pop())
    assert torch.equal(without, m(u))
    assert any(isinstance(t, Tensor) and t.requires_grad for t in given.pop())


class Adapter(nn.Module):
    """A low-rank adapter around a Linear, or around another adapter."""

    def __init__(self, base: Any, size: tuple[int, int], dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base
        torch.manual_seed(size[0])
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(size[0], 2, bias=False)
        self.up = nn.Linear(2, size[1], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(self.drop(x).to(self.down.weight.dtype))
        out: Tensor = self.base_layer(x) + self.up(low).to(x.dtype)
        return out


def adapted(nested: bool = False, dropout: float = 0.0, **values: Any) -> Mamba2:
    """A mixer with adapters around both projections."""
    m = mixer(**values)
    for name in ("in_proj", "out_proj"):
        base = getattr(m, name)
        size = (base.in_features, base.out_features)
        made = Adapter(base, size, dropout)
        setattr(m, name, Adapter(made, size) if nested else made)
    return m.requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_around_the_projections_count(nested: bool, bias: bool, recompute: bool) -> None:
    """fp64, relative 1e-9, all gradients too; also token by token and piece by piece."""
    m = adapted(nested, rows=16, bias=bias).double()
    m.recompute = recompute
    u = torch.randn(1, 20, 32, dtype=torch.float64)
    assert not torch.allclose(m(u), mixer(bias=bias).double()(u))
    mine = [p.requires_grad_() for n, p in m.named_parameters() if "down" in n or "up" in n]
    assert len(mine) == (8 if nested else 4)
    weight = torch.randn_like(u)
    found, wanted = m(u), plain(m, u)
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-9)
    gradients = [torch.autograd.grad((y * weight).sum(), mine) for y in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 1e-9 * b.abs().max()
    state, outputs = None, []
    with torch.no_grad():
        for piece in u.split([1, 1, 1, 16, 1], 1):
            y, state = m.extend(piece, state)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), found.detach(), atol=1e-11, rtol=1e-9)
    first, state = m.extend(u[:, :7])
    second, _ = m.extend(u[:, 7:], state)
    again = torch.autograd.grad((torch.cat([first, second], 1) * weight).sum(), mine)
    for a, b in zip(again, gradients[1], strict=True):
        assert (a - b).abs().max() < 1e-9 * b.abs().max()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_an_adapter_that_adds_nothing_changes_no_bit(nested: bool, autocast: bool) -> None:
    """bf16 with a bias (which must not round the weights away), fp32 under autocast."""
    dtype = torch.float32 if autocast else torch.bfloat16
    m, before = adapted(nested, bias=True).to(dtype), mixer(bias=True).to(dtype)
    for name, parameter in m.named_parameters():
        if "up" in name:
            nn.init.zeros_(parameter)
    u = torch.randn(1, 40, 32, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(m(u), before(u))


def test_adapters_in_bf16_are_close_and_may_be_wider() -> None:
    """bf16 base, adapters in bf16 and in fp32: outputs within 3 %, gradients within 5 % in norm."""
    u, found = torch.randn(1, 40, 32), []
    for base, wide in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float)):
        m = adapted(bias=True).to(base)
        mine = [p for n, p in m.named_parameters() if "down" in n or "up" in n]
        for parameter in mine:
            parameter.data = parameter.data.to(wide)
            parameter.requires_grad_()
        out = m(u.to(base))
        gradients = torch.autograd.grad(out.float().square().sum(), mine)
        assert out.dtype == base and all(g.dtype == wide for g in gradients)
        found.append((out, *gradients))
    for other in found[1:]:
        for number, (a, b) in enumerate(zip(other, found[0], strict=True)):
            assert (a.float() - b).norm() < (0.05 if number else 0.03) * b.norm()


def test_dropout_of_an_adapter_is_the_same_for_all_tokens() -> None:
    """The same token twice, far apart, without a memory: one output."""
    m = adapted(dropout=0.5).train()
    first, second = m.weights().inward, m.weights().inward
    assert not torch.equal(first, second)
    assert torch.equal(m.eval().weights().inward, m.weights().inward)


def test_what_is_neither_a_linear_nor_around_one_is_refused() -> None:
    m = mixer()
    m.in_proj = nn.Sequential(m.in_proj)  # type: ignore[assignment]
    with pytest.raises(RecipeError, match="adapter with a base_layer, got a Sequential"):
        m(torch.randn(1, 8, 32))


def test_starts_as_mamba_ssm_does() -> None:
    m = mixer(d_model=1024, head_dim=4)
    steps = F.softplus(m.dt_bias)
    assert 0.001 * 0.99 <= steps.min() < 0.002 and 0.09 < steps.max() <= 0.1 * 1.01
    rates = m.A_log.exp()
    assert 1 <= rates.min() < 1.5 and 15.5 < rates.max() <= 16
    assert (m.D == 1).all() and (m.norm.weight == 1).all()
    assert all(getattr(p, "_no_weight_decay", False) for p in (m.dt_bias, m.A_log, m.D))


def test_shapes_without_numbers() -> None:
    with torch.device("meta"):
        m = mixer()
        assert m(torch.empty(2, 40, 32)).shape == (2, 40, 32)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(RecipeError, match="head_dim 24 must divide"):
        mixer(head_dim=24)
    with pytest.raises(RecipeError, match="ngroups = 3"):
        mixer(ngroups=3)
    with pytest.raises(RecipeError, match="scan_backend must be one of"):
        mixer(scan_backend="cuda")


def test_the_kernels_are_asked_for_by_name_or_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mixer().scan_backend == "torch"
    monkeypatch.setattr(mamba2_kernels, "missing_kernels", lambda: ["mamba_ssm"])
    with pytest.raises(MissingExtraError, match=r"fmrizoo\[mamba\]"):
        mixer(scan_backend="mamba_ssm")
    monkeypatch.setattr(mamba2_kernels, "missing_kernels", lambda: [])
    forced = mixer(scan_backend="mamba_ssm")
    assert forced.scan_backend == "mamba_ssm"
    with pytest.raises(RecipeError, match="CUDA only"):
        forced(torch.randn(1, 8, 32))


def test_what_the_kernels_get_stays_within_32_bits() -> None:
    for sizes in [(8, 64, 1, 64, 64), (32, 64, 1, 256, 64), (3, 5, 1, 4, 16)]:
        heads, head_dim, groups, states, chunk = sizes
        most = mamba2_kernels.most_tokens(*sizes)
        width = 2 * heads * head_dim + 2 * groups * states + heads
        assert most * width < 2**31
        assert most // chunk * heads * head_dim * states < 2**31


@pytest.mark.parametrize("values", [{}, {"ngroups": 2, "bias": True}, {"d_state": 5}])
def test_the_kernels_path_on_plain_functions_in_their_place(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What surrounds the kernels: fp64, 1e-9. The kernels themselves need a GPU."""
    stubs = {
        "causal_conv1d": SimpleNamespace(causal_conv1d_fn=convolve),
        "mamba_ssm.ops.triton.ssd_combined": SimpleNamespace(mamba_chunk_scan_combined=scan),
    }
    monkeypatch.setattr(mamba2_kernels.importlib, "import_module", stubs.__getitem__)
    m = mixer(**values).double()
    norm = torch.rand(32, dtype=torch.float64)
    u = torch.randn(4, 20, 32, dtype=torch.float64)
    s, w = m.shape(u, True, True), m.weights(norm)
    whole = m.run(u, Pack(), prenorm=norm, residual=True)
    torch.testing.assert_close(mamba2_kernels.compute(u, None, s, w), whole, atol=1e-11, rtol=1e-9)
    lengths = [20, 3, 11, 7]
    packs = end_to_end(lengths, 20, u.device, 30)
    assert len(packs) == 2
    parts = [mamba2_kernels.compute(p.take(u), p.sequence, s, w) for p in packs]
    found = give_back(packs, parts, 4, 20)
    for sample, length in enumerate(lengths):
        torch.testing.assert_close(
            found[sample, :length], whole[sample, :length], atol=1e-11, rtol=1e-9
        )
