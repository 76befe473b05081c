"""The product with a quantized matrix: its gradients in float64, what it keeps for backward, its dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from quadapt.nn.adapters import Pooled
from quadapt.nn.adapters.codes import MergedForm
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant import autograd
from quadapt.quant.autograd import offset_gradient, quant_matmul
from quadapt.quant.format import Format
from quadapt.quant.products import product_dtype
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

Make = Callable[..., QuantWeight]

GRIDS = [
    Format(levels=levels, bits=bits, group_size=32, zero=zero)
    for levels, bits, zero in [
        ("int", 2, "float"),
        ("int", 3, "float"),
        ("int", 4, "float"),
        ("int", 8, "float"),
        ("int", 4, "none"),
        ("int", 4, "integer"),
        ("nf", 2, "none"),
        ("nf", 3, "float"),
        ("nf", 4, "none"),
        ("nf", 8, "none"),
    ]
]


def by_name(value: object) -> str:
    return getattr(value, "name", str(value))


def snapped(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values`, rounded to `dtype`, with the gradient of no rounding at all."""
    return values + (values.float().to(dtype).to(values.dtype) - values).detach()


def straight_through(x: Tensor, weight: QuantWeight, A: Tensor, B: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """`x @ W'.T`, dense, with `W' = scales * levels[codes] + snap(offsets + factor * B @ A)`; torch derives it."""
    width, columns = weight.format.width(weight.layout.columns), weight.layout.columns
    table = weight.format.table(x)
    codes = weight.codes()
    level = codes.double() if table is None else table.double()[codes.long()]
    base = 0 if weight.offsets is None else weight.offsets.double()
    offsets = snapped(base + factor * (B @ A), dtype)
    group = torch.arange(columns) if not weight.layout.permuted else weight.tensors["perm"].long()
    group = group // width
    return x @ (weight.scales.double()[:, group] * level + offsets[:, group]).T


def case(weight: QuantWeight, rank: int = 3, lead: tuple[int, ...] = (2, 5)) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, `lora_A` and `lora_B` in float64, all with gradients."""
    x = torch.randn(*lead, weight.layout.columns, dtype=torch.float64)
    A = 0.05 * torch.randn(rank, weight.layout.groups, dtype=torch.float64)
    B = 0.05 * torch.randn(weight.layout.out, rank, dtype=torch.float64)
    return x.requires_grad_(), A.requires_grad_(), B.requires_grad_()


def merged_form(x: Tensor, weight: QuantWeight, A: Tensor, B: Tensor, adapter: Pooled, scaling: float) -> Tensor:
    return quant_matmul(x, weight, MergedForm(((adapter, scaling),)), (A, B))


def assert_same_gradients(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(ours)
    for mine, want in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True):
        assert float((mine - want).norm() / want.norm()) < 1e-10


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("format", GRIDS, ids=by_name)
def test_the_gradient_to_x_is_that_of_the_dense_matrix(format: Format, permuted: bool, quant_weight: Make) -> None:
    weight = quant_weight(format, permuted=permuted)
    x = torch.randn(4, 80, dtype=torch.float64, requires_grad=True)
    assert_same_gradients(quant_matmul(x, weight), x @ weight.dequantize(torch.float64).T, (x,))


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("format", GRIDS, ids=by_name)
def test_merged_form_has_the_gradients_of_the_straight_through_reference(
    format: Format, pooling: str, quant_weight: Make
) -> None:
    weight = quant_weight(format)
    x, A, B = case(weight)
    adapter = Pooled(pooling=pooling)
    factor = 0.7 if pooling == "sum" else 0.7 / 32
    ours = merged_form(x, weight, A, B, adapter, 0.7)
    assert_same_gradients(ours, straight_through(x, weight, A, B, factor, torch.float16), (x, A, B))


@pytest.mark.parametrize(("columns", "group_size"), [(80, 32), (64, 32), (33, 16), (20, 64), (80, -1)])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("lead", [(6,), (2, 5), (2, 3, 4)], ids=str)
def test_merged_form_serves_any_groups_and_any_batch(
    columns: int, group_size: int, permuted: bool, lead: tuple[int, ...], quant_weight: Make
) -> None:
    weight = quant_weight(Format(bits=3, group_size=group_size), 24, columns, permuted=permuted)
    x, A, B = case(weight, lead=lead)
    ours = merged_form(x, weight, A, B, Pooled(), 0.5)
    assert_same_gradients(ours, straight_through(x, weight, A, B, 0.5, torch.float16), (x, A, B))


def test_merged_form_serves_a_single_vector_as_a_linear_layer_does(quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4))
    x, A, B = case(weight, lead=())
    ours = merged_form(x, weight, A, B, Pooled(), 0.5)
    assert_same_gradients(ours, straight_through(x, weight, A, B, 0.5, torch.float16), (x, A, B))


@pytest.mark.parametrize(("kind", "dtype"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_offsets_are_rounded_as_the_adapter_says(kind: str, dtype: torch.dtype, quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4, group_size=32))
    x, A, B = case(weight)
    found = merged_form(x, weight, A, B, Pooled(offsets=kind), 1.0)
    torch.testing.assert_close(found, straight_through(x, weight, A, B, 1.0, dtype), rtol=1e-12, atol=1e-12)
    other = torch.float16 if dtype == torch.float32 else torch.float32
    assert not torch.allclose(found, straight_through(x, weight, A, B, 1.0, other), rtol=1e-9)


def test_adapters_in_one_product_each_get_their_gradient(quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4, group_size=32, zero="none"), storage=Storage(scales="fp32", offsets="absent"))
    x, A1, B1 = case(weight, rank=2)
    _, A2, B2 = case(weight, rank=5)
    move = MergedForm(((Pooled(), 0.5), (Pooled(pooling="mean"), 3.0)))
    ours = quant_matmul(x, weight, move, (A1, B1, A2, B2))
    A, B = torch.cat([0.5 * A1, 3.0 / 32 * A2]), torch.cat([B1, B2], 1)
    theirs = straight_through(x, weight, A, B, 1.0, torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # rounded once in place of twice
    dy, inputs = torch.randn_like(ours), (x, A1, B1, A2, B2)
    for mine, want in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True):
        assert float((mine - want).norm() / want.norm()) < 1e-6


@dataclass(frozen=True)
class Free:
    """A move without rounding, so that finite differences can see it."""

    def offsets(self, weight: QuantWeight, params: tuple[Tensor, ...]) -> Tensor:
        return weight.offsets.double() + params[1] @ params[0]

    def keep(self, layout: Layout, pooled: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return (pooled,)

    def gradients(self, layout: Layout, params: Any, dy: Tensor, kept: Any, needed: Any) -> tuple[Tensor, ...]:
        gradient = offset_gradient(dy, *kept)
        return params[1].T @ gradient, gradient @ params[0].T


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(
    "format", [Format(bits=3, group_size=16), Format(levels="nf", bits=4, group_size=16, zero="float")], ids=by_name
)
def test_gradcheck(format: Format, permuted: bool, quant_weight: Make) -> None:
    weight = quant_weight(format, 6, 37, permuted=permuted)
    x, A, B = case(weight, rank=2, lead=(3,))
    assert torch.autograd.gradcheck(lambda x: quant_matmul(x, weight), (x,))
    assert torch.autograd.gradcheck(lambda x, A, B: quant_matmul(x, weight, Free(), (A, B)), (x, A, B))


def test_gradients_are_computed_only_where_they_are_wanted(quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4))
    x, A, B = case(weight)
    merged_form(x.detach(), weight, A, B.detach(), Pooled(), 1.0).sum().backward()
    assert A.grad is not None
    assert x.grad is None
    assert B.grad is None
    merged_form(x, weight, A.detach(), B.detach(), Pooled(), 1.0).sum().backward()
    assert x.grad is not None
    assert not quant_matmul(x.detach(), weight).requires_grad


# --- memory -----------------------------------------------------------------------------------------------------------


class Saved:
    """Counts bytes that autograd keeps for backward, apart from tensors that exist anyway."""

    def __init__(self, *known: Tensor) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.tensors: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self.known:
            self.tensors.append(tensor)
        return tensor

    def __call__(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", [Format(bits=4), Format(levels="nf", bits=4), Format(bits=8)], ids=by_name)
def test_backward_keeps_the_stored_form_and_nothing_else(
    format: Format, dtype: torch.dtype, quant_weight: Make
) -> None:
    layer = QuantLinear.of(quant_weight(format, 256, 512))
    x = torch.randn(4, 8, 512, dtype=dtype, requires_grad=True)
    saved = Saved(*layer.parameters())
    with saved():
        y = layer(x)
    assert saved.tensors == []
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_training_offsets_keeps_little(dtype: torch.dtype, permuted: bool, quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4, group_size=32), 256, 512, permuted=permuted)
    A, B = torch.randn(4, 16, requires_grad=True), torch.randn(256, 4, requires_grad=True)
    x = torch.randn(4, 8, 512, dtype=dtype, requires_grad=True)
    saved = Saved(*weight.tensors.values(), A, B)
    with saved():
        y = merged_form(x, weight, A, B, Pooled(), 1.0)
    assert [tuple(tensor.shape) for tensor in saved.tensors] == [(32, 16), (256, 16 * 2)]
    pooled, offsets = saved.tensors
    assert pooled.nbytes == 4 * 8 * 512 // 32 * 4  # float32
    assert offsets.dtype == torch.uint8  # the bytes of float16, as a merge would store them
    y.sum().backward()
    assert A.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_with_a_frozen_the_pooled_inputs_are_not_kept_either(dtype: torch.dtype, quant_weight: Make) -> None:
    """But their product with `A`, which has the rank for groups; the gradient of `B` is that of before."""
    weight = quant_weight(Format(bits=4, group_size=32), 256, 512)
    A, B = torch.randn(4, 16, requires_grad=True), torch.randn(256, 4, requires_grad=True)
    x, dy = torch.randn(4, 8, 512, dtype=dtype), torch.randn(4, 8, 256, dtype=dtype)
    (want,) = torch.autograd.grad(merged_form(x, weight, A, B, Pooled(), 0.5), (B,), dy)
    A.requires_grad_(False)
    saved = Saved(*weight.tensors.values(), A, B)
    with saved():
        y = merged_form(x, weight, A, B, Pooled(), 0.5)
    assert [tuple(tensor.shape) for tensor in saved.tensors] == [(32, 4)]
    (found,) = torch.autograd.grad(y, (B,), dy)
    assert float((found - want).norm() / want.norm()) < 1e-6


def test_of_two_adapters_only_the_one_that_trains_keeps_anything(quant_weight: Make) -> None:
    """A frozen adapter under one that trains moves the offsets, and costs no memory and no gradient."""
    weight = quant_weight(Format(bits=4, group_size=32), 24, 128)
    move = MergedForm(((Pooled(), 0.5), (Pooled(pooling="mean"), 3.0)))
    frozen = torch.randn(3, 4), torch.randn(24, 3)
    A, B = torch.randn(2, 4, requires_grad=True), torch.randn(24, 2, requires_grad=True)
    x, dy = torch.randn(8, 128), torch.randn(8, 24)
    saved = Saved(*weight.tensors.values(), *frozen, A, B)
    with saved():
        y = quant_matmul(x, weight, move, (*frozen, A, B))
    assert [tuple(tensor.shape) for tensor in saved.tensors] == [(8, 4)]
    assert not torch.equal(y, quant_matmul(x, weight, MergedForm(move.parts[1:]), (A, B)))
    under = Pooled().merge(weight, {"A": frozen[0], "B": frozen[1]}, 0.5)
    alone = quant_matmul(x, under, MergedForm(move.parts[1:]), (A, B))
    assert torch.equal(y, alone)
    found, want = (torch.autograd.grad(each, (A, B), dy) for each in (y, alone))
    assert all(torch.equal(mine, other) for mine, other in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_accelerators_pool_in_the_dtype_of_the_inputs(
    dtype: torch.dtype, quant_weight: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not to float16, which a sum of its numbers may leave."""
    weight = quant_weight(Format(bits=4, group_size=32), 24, 128)
    A, B = torch.randn(4, 4, requires_grad=True), torch.randn(24, 4, requires_grad=True)
    x, dy = torch.randn(8, 128, dtype=dtype), torch.randn(8, 24, dtype=dtype)
    want = torch.autograd.grad(merged_form(x, weight, A, B, Pooled(), 1.0), (A, B), dy)
    monkeypatch.setattr(autograd, "operand_dtype", lambda like, _: like.dtype)
    saved = Saved(*weight.tensors.values(), A, B)
    with saved():
        y = merged_form(x, weight, A, B, Pooled(), 1.0)
    assert [tensor.dtype for tensor in saved.tensors] == [torch.float32 if dtype == torch.float16 else dtype]
    for mine, other in zip(torch.autograd.grad(y, (A, B), dy), want, strict=True):
        assert float((mine - other).norm() / other.norm()) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_the_dense_product_would_be_noticed(quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4), 256, 512)
    x = torch.randn(8, 512, requires_grad=True)
    saved = Saved(*weight.tensors.values())
    with saved():
        torch.nn.functional.linear(x, weight.dequantize())
    assert sum(tensor.nbytes for tensor in saved.tensors) >= 256 * 512 * 4


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_product_has_the_dtype_of_its_inputs(dtype: torch.dtype, quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4))
    x = torch.randn(3, 80, dtype=dtype, requires_grad=True)
    y = quant_matmul(x, weight)
    assert y.dtype == dtype
    wide = product_dtype(x)
    assert torch.equal(y, torch.nn.functional.linear(x.to(wide), weight.dequantize(wide)).to(dtype))
    y.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_the_factors_have_their_dtype(dtype: torch.dtype, quant_weight: Make) -> None:
    """Factors in float32 under bfloat16 inputs: their gradient is not rounded to bfloat16 on the way."""
    weight = quant_weight(Format(bits=4))
    x, A, B = (
        value.detach().to(kind).requires_grad_()
        for value, kind in zip(case(weight), (torch.bfloat16, dtype, dtype), strict=True)
    )
    dy = torch.randn(2, 5, 24).bfloat16()
    y = merged_form(x, weight, A, B, Pooled(), 1.0)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, (A, B), dy)
    assert [each.dtype for each in found] == [dtype, dtype]
    x, A, B = (value.detach().double().requires_grad_() for value in (x, A, B))
    want = torch.autograd.grad(straight_through(x, weight, A, B, 1.0, torch.float16), (A, B), dy.double())
    for mine, exact in zip(found, want, strict=True):
        assert float((mine - exact).norm() / exact.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast_the_layer_computes_in_autocasts_dtype(bias: bool, quant_weight: Make) -> None:
    layer = QuantLinear.of(quant_weight(Format(bits=4)), torch.randn(24) if bias else None)
    x = torch.randn(3, 80, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))
    assert x.grad.dtype == torch.float32
    wide = product_dtype(y)
    dense = layer.quant_weight.dequantize(wide)
    assert torch.equal(x.grad, (torch.ones(3, 24).to(wide) @ dense).bfloat16().float())


def test_an_empty_batch_goes_through(quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4))
    x, A, B = case(weight, lead=(0,))
    y = merged_form(x, weight, A, B, Pooled(), 1.0)
    assert y.shape == (0, 24)
    y.sum().backward()
    assert torch.equal(A.grad, torch.zeros_like(A))
