"""The product that trains its quantizer: gradients in float64 and the identities of the mathematics."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import fake_quant_numpy
from reference.straight_through import (
    BITS,
    IN,
    ORDERS,
    OUT,
    assert_same_gradients,
    case,
    gradients,
    product,
    straight_through,
    unrounded,
)
from torch import Tensor

from quadapt.kernels import expand, unpack
from quadapt.kernels.fake import fake_gradients
from quadapt.kernels.fake_reference import Grid
from quadapt.quant import fake_quant
from quadapt.quant.fake_quant import FakeQuant, fake_quant_matmul, fake_quant_weight
from quadapt.quant.format import Format

# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a tile, which does not divide 24; three tokens at once, which does not divide 10."""
    monkeypatch.setattr(fake_quant, "_TILE", {"cpu": 7 * IN + 5})
    monkeypatch.setattr(fake_quant, "_LEAST_ROWS", 1)
    monkeypatch.setattr(fake_quant, "_TOKENS", {"cpu": 3})


@pytest.mark.parametrize("scaling", [0.125, 1.0, 4.0])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("domain", ["weight", "codes"])
@pytest.mark.usefixtures("small_tiles")
def test_backward_equals_autograd_of_the_straight_through_reference(
    domain: str, order: str, bits: int, scaling: float
) -> None:
    """In the base's domain and in that of codes, for both orders of rounding and clamping, in any tiling."""
    for group_size, base_bits in ((32, None), (-1, 8 if domain == "codes" else None)):
        each = case(domain, order, bits, group_size=group_size, base_bits=base_bits, scaling=scaling)
        v = unrounded(each)
        assert 0.005 < float((v < -0.5).double().mean()) < 0.4
        assert 0.005 < float((v > each.how.grid.top + 0.5).double().mean()) < 0.4
        if domain == "weight":
            each.base.requires_grad_()
        assert len(each.leaves) == 5 + (domain == "weight")
        assert_same_gradients(each(), straight_through(each), each.leaves)


@pytest.mark.parametrize("columns", [1, 16, 33, 80])
@pytest.mark.parametrize("lead", [(), (6,), (2, 3, 4), (0,)], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_any_batch_and_any_row(lead: tuple[int, ...], columns: int) -> None:
    for domain in ("weight", "codes"):
        each = case(domain, columns=columns, lead=lead)
        assert_same_gradients(each(), straight_through(each), each.leaves)


@pytest.mark.usefixtures("small_tiles")
def test_inputs_and_factors_need_not_be_contiguous() -> None:
    each = case(lead=(5, 2))
    plain = {name: getattr(each, name).detach() for name in ("x", "A", "B")}
    skewed = {name: tensor.transpose(0, 1).contiguous().transpose(0, 1) for name, tensor in plain.items()}
    each = replace(each, **{name: tensor.requires_grad_() for name, tensor in skewed.items()})
    assert not any(tensor.is_contiguous() for tensor in skewed.values())
    assert_same_gradients(each(), straight_through(each), each.leaves)


@pytest.mark.parametrize(("order", "tolerance"), [("clamp-round", 1e-4), ("clamp-round", 0.3), ("round-clamp", 0.3)])
@pytest.mark.parametrize("bits", BITS)
def test_l4q_by_its_equations(bits: int, order: str, tolerance: float) -> None:
    """Signed codes as in the paper: `offsets = b - scales * 2**(bits - 1)`, and the chain rule of that."""
    each, half = case("weight", order, bits, lead=(5,)), 2 ** (bits - 1)
    each = replace(each, how=replace(each.how, tolerance=tolerance))
    each.base.requires_grad_()
    b = (each.offsets + half * each.scales).detach().requires_grad_()
    s, dy = each.scales.detach().requires_grad_(), torch.randn(5, OUT, dtype=torch.float64)
    y = each(scales=s, offsets=b - half * s)
    found = torch.autograd.grad(y, (each.x, each.base, each.A, each.B, s, b), dy)
    arrays = (t.detach().numpy() for t in (each.x, dy, each.base, each.A, each.B))
    X, dY, W0, A, B = arrays
    want = fake_quant_numpy.l4q(
        X, dY, W0, A, B, 0.5, s.detach().numpy(), b.detach().numpy(), bits, 32, order, tolerance
    )
    assert 0.01 < want["clipped"].mean() < 0.4
    np.testing.assert_allclose(y.detach().numpy(), want["y"], rtol=1e-10, atol=1e-10)
    for name, mine in zip(("x", "base", "A", "B", "s", "b"), found, strict=True):
        np.testing.assert_allclose(mine.numpy(), want[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("base_bits", [None, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_lr_qat_by_its_equations(bits: int, base_bits: int | None) -> None:
    each, half = case("codes", "round-clamp", bits, base_bits=base_bits, lead=(5,)), 2 ** (bits - 1)
    s, dy = each.scales.detach().requires_grad_(), torch.randn(5, OUT, dtype=torch.float64)
    y = each(scales=s, offsets=-half * s)
    found = torch.autograd.grad(y, (each.x, each.A, each.B, s), dy)
    width = base_bits or bits
    real = unpack(each.base, width, IN).double().numpy() / 2 ** (width - bits) - half
    X, dY, A, B = (t.detach().numpy() for t in (each.x, dy, each.A, each.B))
    want = fake_quant_numpy.lr_qat(X, dY, real, A, B, 0.5, s.detach().numpy(), bits, 32)
    np.testing.assert_allclose(y.detach().numpy(), want["y"], rtol=1e-10, atol=1e-10)
    for name, mine in zip(("x", "A", "B", "s"), found, strict=True):
        np.testing.assert_allclose(mine.numpy(), want[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize(
    ("levels", "bits"), [*(("int", bits) for bits in BITS), *(("nf", bits) for bits in (2, 3, 4, 8))]
)
def test_peqa_and_e2e_qp_are_the_engine_without_factors(bits: int, levels: str, group_size: int) -> None:
    """`W = s (levels - z)`: scales alone (PEQA), or zero-points too (E2E-QP); per group and per row."""
    each = case("codes", "round-clamp", bits, levels=levels, group_size=group_size, rank=0, lead=(5,))
    s, dy = each.scales.detach().requires_grad_(), torch.randn(5, OUT, dtype=torch.float64)
    z = torch.randint(0, 2**bits, s.shape).double()
    y = each(scales=s, offsets=-s * z)
    (found,) = torch.autograd.grad(y, (s,), dy)
    table, codes = each.how.format.table(s), unpack(each.base, bits, IN)
    level = codes.double() if table is None else table.double()[codes.int()]
    X, dY = each.x.detach().numpy(), dy.numpy()
    want = fake_quant_numpy.peqa(X, dY, level.numpy(), s.detach().numpy(), z.numpy(), each.how.grid.group_size)
    np.testing.assert_allclose(y.detach().numpy(), want["y"], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.numpy(), want["s"], rtol=1e-9, atol=1e-9)
    assert_same_gradients(each(), product(each, level), each.leaves)


@pytest.mark.parametrize("domain", ["weight", "codes"])
def test_frozen_factors_of_zero_are_no_factors(domain: str) -> None:
    """Then what trains is LSQ+ over a frozen weight, or PEQA: the same gradients as without a low-rank term."""
    each = case(domain)
    without, dy = replace(each, A=None, B=None), torch.randn(2, 5, OUT, dtype=torch.float64)
    want = gradients(without, dy)
    zero = torch.zeros_like(each.B)
    for off in (
        replace(each, A=each.A.detach(), B=zero),
        replace(each, scaling=0.0, A=each.A.detach(), B=each.B.detach()),
    ):
        for mine, other in zip(gradients(off, dy), want, strict=True):
            assert torch.equal(mine, other)
    assert_same_gradients(without(), straight_through(without), without.leaves)


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck_fails_on_steps_and_holds_for_the_line_through_them(order: str) -> None:
    """With the rounding errors held fixed, the true gradient is the straight-through one."""
    each = case("weight", order, columns=16, group_size=16, rank=2, lead=(3,))
    with torch.no_grad():
        v, top = unrounded(each), each.how.grid.top
        inside = ((v >= 0) & (v <= top)) if order == "clamp-round" else ((v.round() >= 0) & (v.round() <= top))
        held = v.round().clamp(0, top) - torch.where(inside, v, 0)

    def surrogate(x: Tensor, scales: Tensor, offsets: Tensor, A: Tensor, B: Tensor) -> Tensor:
        moved = replace(each, x=x, scales=scales, offsets=offsets, A=A, B=B)
        return product(moved, torch.where(inside, unrounded(moved), 0) + held)

    def ours(x: Tensor, scales: Tensor, offsets: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return each(x=x, scales=scales, offsets=offsets, A=A, B=B)

    assert torch.autograd.gradcheck(surrogate, each.leaves, eps=1e-7, atol=1e-5)
    assert_same_gradients(ours(*each.leaves), surrogate(*each.leaves), each.leaves)
    assert not torch.autograd.gradcheck(ours, each.leaves, eps=1e-7, atol=1e-5, raise_exception=False)


def test_gradients_are_computed_only_where_they_are_wanted() -> None:
    each = case()
    dy = torch.randn(2, 5, OUT, dtype=torch.float64)
    every = dict(zip(("x", "scales", "offsets", "A", "B"), gradients(each, dy), strict=True))
    for wanted in itertools.chain(([name] for name in every), (["x", "A"], ["scales", "offsets"])):
        leaves = {name: getattr(each, name).detach().requires_grad_(name in wanted) for name in every}
        found = torch.autograd.grad(each(**leaves), [leaves[name] for name in wanted], dy)
        for name, mine in zip(wanted, found, strict=True):
            assert torch.equal(mine, every[name]), wanted
    frozen = {name: getattr(each, name).detach() for name in every}
    assert not each(**frozen).requires_grad


def test_there_is_no_second_derivative_to_be_wrong() -> None:
    each = case()
    (first,) = torch.autograd.grad(each().square().sum(), (each.A,), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", BITS)
def test_euler_and_translation_hold_for_each_weight(bits: int, order: str, dtype: torch.dtype) -> None:
    """Scaling weight, scale and offset scales the result (Euler), and shifting weight and offset shifts it.

    One weight a group, so that every derivative is seen by itself. float32: the compiled kernel.
    """
    count, top, slack = 4000, 2**bits - 1, 1e-4 if order == "clamp-round" else None
    weight, scale = torch.randn(count, 1, dtype=dtype), torch.rand(count, 1, dtype=dtype) * 3 / 2**bits + 0.5 / 2**bits
    offset = -scale * 2 ** (bits - 1) + 0.1 * torch.randn(count, 1, dtype=dtype)
    G, dense = torch.ones(count, 1, dtype=dtype), torch.empty(count, 1, dtype=dtype)
    by_scale, by_offset = fake_gradients(
        G, weight, None, None, scale, offset, None, Grid(bits, bits, 1, 1), slack, dense
    )
    close = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-6}
    torch.testing.assert_close(weight * G + scale * by_scale + offset * by_offset, dense, **close)
    assert torch.equal(G + by_offset, torch.ones_like(G))
    inside = G == 1
    assert 0.02 < float((~inside).double().mean()) < 0.5
    assert float(by_scale[inside].abs().max()) <= 0.5 + (0 if dtype == torch.float64 else 1e-4 * top)
    assert set(by_scale[~inside].unique().tolist()) == {0.0, float(top)}


@pytest.mark.parametrize("domain", ["weight", "codes"])
def test_without_clamping_the_factors_have_loras_gradients(domain: str) -> None:
    """`dA = scaling B^T G` and `dB = scaling G A^T`, with `G` the gradient of the dense weight."""
    each = case(domain, bits=8, spread=0.01, scaling=2.0)
    if domain == "codes":
        inner = torch.randint(60, 190, (OUT, IN), dtype=torch.uint8)
        each = replace(each, base=inner)
    dy = torch.randn(2, 5, OUT, dtype=torch.float64)
    dY, X = dy.flatten(0, 1), each.x.detach().flatten(0, 1)
    _, _, doffsets, dA, dB = gradients(each, dy)
    G = dY.T @ X
    if domain == "codes":
        G = G * expand(each.scales.detach(), 32, IN)
    else:
        assert torch.equal(doffsets, torch.zeros_like(doffsets))
    torch.testing.assert_close(dA, 2.0 * each.B.detach().T @ G, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dB, 2.0 * G @ each.A.detach().T, rtol=1e-10, atol=1e-12)


def test_gradients_add_over_a_batch_and_do_not_see_the_order_of_tokens() -> None:
    """A gradient is a sum over tokens."""
    each, dy = case(lead=(3, 4)), torch.randn(3, 4, OUT, dtype=torch.float64)
    whole = gradients(each, dy)
    parts = [torch.autograd.grad(each(x=each.x[i]), each.leaves[1:], dy[i]) for i in range(3)]
    shuffled = torch.randperm(4)
    moved = torch.autograd.grad(each(x=each.x[:, shuffled]), each.leaves[1:], dy[:, shuffled])
    for index, want in enumerate(whole[1:]):
        torch.testing.assert_close(sum(part[index] for part in parts), want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(moved[index], want, rtol=1e-10, atol=1e-12)


def test_scaling_all_of_a_weight_scales_its_product() -> None:
    """`c W0`, `c B`, `c s`, `c b` give `c y`: gradients of `x` and `A` grow by `c`, the others stay."""
    each, dy, c = case(), torch.randn(2, 5, OUT, dtype=torch.float64), 4.0  # a power of two: codes stay exactly
    large = replace(
        each,
        base=c * each.base,
        **{n: (c * getattr(each, n)).detach().requires_grad_() for n in ("B", "scales", "offsets")},
    )
    torch.testing.assert_close(large(), c * each(), rtol=1e-12, atol=1e-12)
    names = ("x", "scales", "offsets", "A", "B")
    for name, mine, want in zip(names, gradients(large, dy), gradients(each, dy), strict=True):
        factor = c if name in ("x", "A") else 1.0
        torch.testing.assert_close(mine, factor * want, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("bits", BITS)
def test_l4qs_start_clamps_nothing(bits: int) -> None:
    """Its scales put the largest weight of each group on the border, give or take a rounding error."""
    weight, half = torch.randn(256, 512), 2 ** (bits - 1)
    grouped = weight.unflatten(1, (-1, 32))
    scales = torch.maximum(-grouped.amin(-1) / half, grouped.amax(-1) / (half - 1)).requires_grad_()
    how = FakeQuant(format=Format(bits=bits, group_size=32), columns=512)
    b = torch.zeros(256, 16, requires_grad=True)
    x = torch.randn(64, 512)
    fake_quant_matmul(x, weight, scales, b - half * scales, how=how).square().sum().backward()
    assert torch.equal(b.grad, torch.zeros_like(b))
    found = fake_quant_weight(weight, scales, -half * scales, how=how, dtype=torch.float32)
    assert bool(((found - weight).abs() <= expand(scales, 32, 512) * (0.5 + 1e-4)).all())
    strict = replace(how, tolerance=0.0)
    (doffsets,) = torch.autograd.grad(fake_quant_matmul(x, weight, scales, b - half * scales, how=strict).sum(), (b,))
    assert (doffsets != 0).any()  # what the tolerance is for


def test_the_orders_differ_in_codes_up_to_half_a_step_above_the_top() -> None:
    weight = torch.tensor([[-0.6, -0.4, 0.4, 3.4, 3.6] + [1.0] * 11])
    how = FakeQuant(format=Format(bits=2, group_size=16), columns=16)
    scales, offsets, x = torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 16)
    masks = {}
    for order in ORDERS:
        base = weight.clone().requires_grad_()
        fake_quant_matmul(x, base, scales, offsets, how=replace(how, order=order)).sum().backward()
        masks[order] = base.grad[0, :5].tolist()
    assert masks == {"clamp-round": [0, 0, 1, 0, 0], "round-clamp": [0, 1, 1, 1, 0]}
