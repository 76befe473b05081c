"""The adapters: QA-LoRA's invariants against its equations in NumPy, merges bit for bit, identities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import qa_lora_numpy
from torch import Tensor

from quadapt.errors import MergeError
from quadapt.nn.adapters import Adapter, LoRA, Pooled
from quadapt.nn.adapters.base import same
from quadapt.nn.adapters.codes import MergedForm
from quadapt.quant.autograd import quant_matmul
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

Make = Callable[..., QuantWeight]

FORMATS = [
    Format(bits=4),
    Format(bits=2, zero="integer"),
    Format(bits=3, zero="none"),
    Format(bits=8),
    Format(levels="nf", bits=4),
    Format(levels="nf", bits=3, zero="float"),
    Format(bits=4, group_size=-1),
]
formats = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
poolings = pytest.mark.parametrize("pooling", ["sum", "mean"])
SCALING = 0.25


def factors(
    weight: QuantWeight,
    *,
    rank: int = 4,
    size: float = 1e-3,
    dtype: torch.dtype = torch.float64,
    adapter: Adapter | None = None,
) -> tuple[Tensor, Tensor]:
    """Random `A` and `B` that change each weight by about `size`."""
    columns = (adapter or Pooled()).inputs(weight.layout)
    A = torch.randn(rank, columns, dtype=dtype)
    B = torch.randn(weight.layout.out, rank, dtype=dtype) * size / (SCALING * math.sqrt(rank))
    return A, B


def side_branch(x: Tensor, weight: QuantWeight, A: Tensor, B: Tensor, adapter: Adapter) -> Tensor:
    return adapter.side(x, quant_matmul(x, weight), weight, named(A, B), SCALING, same)


def named(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {"A": A, "B": B}


def begun(adapter: Adapter, layout: Layout, rank: int) -> tuple[Tensor, Tensor]:
    """`A` and `B` as the adapter declares that they begin."""
    params = adapter.params(layout, rank)
    tensors = {name: torch.full(param.shape, 9.0) for name, param in params.items()}
    for name, param in params.items():
        param.init(tensors[name], torch.empty(0))
    return tensors["A"], tensors["B"]


def lost(merged: Tensor, adapted: Tensor, base: Tensor) -> float:
    """Share of what the adapter does that the merge lost."""
    return float((merged - adapted).norm() / (adapted - base).norm())


# --- QA-LoRA against its equations ------------------------------------------------------------------------------------


@poolings
@formats
def test_the_side_branch_is_the_papers_forward(format: Format, pooling: str, quant_weight: Make) -> None:
    weight = quant_weight(format, 24, 96)
    A, B = factors(weight, size=0.1)
    x = torch.randn(5, 96, dtype=torch.float64)
    found = side_branch(x, weight, A, B, Pooled(pooling=pooling, form="side"))
    P = qa_lora_numpy.pooling(96, format.width(96), pooling)
    want = qa_lora_numpy.forward(x.numpy(), weight.dequantize(torch.float64).numpy(), A.numpy(), B.numpy(), SCALING, P)
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-12, atol=1e-12)


@poolings
@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_in_float64_both_papers_merges_lose_nothing(size: float, pooling: str, quant_weight: Make) -> None:
    """The adapter against merged offsets and merged zero-points, to 1e-10 of the adapter's effect."""
    weight = quant_weight(Format(bits=4), 64, 256, std=0.02)
    A, B = factors(weight, size=size)
    x = torch.randn(16, 256, dtype=torch.float64)
    base = quant_matmul(x, weight)
    adapted = side_branch(x, weight, A, B, Pooled(pooling=pooling, form="side"))
    D = qa_lora_numpy.update(A.numpy(), B.numpy(), SCALING, 32, pooling)
    scales, offsets, codes = (value.double().numpy() for value in (weight.scales, weight.offsets, weight.codes()))
    points = qa_lora_numpy.merge_zero_points(-offsets / scales, scales, D)
    wide = np.repeat(scales, 32, 1)
    for dense in (
        wide * codes + np.repeat(qa_lora_numpy.merge_offsets(offsets, D), 32, 1),
        wide * (codes - np.repeat(points, 32, 1)),
    ):
        assert lost(x @ torch.tensor(dense).T, adapted, base) < 1e-10


@poolings
@formats
@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_merged_offsets_are_the_papers(
    precision: torch.dtype, format: Format, pooling: str, quant_weight: Make
) -> None:
    """Whatever the factors are kept in, their product is computed in float64 and rounded once."""
    weight = quant_weight(format, 24, 96)
    A, B = factors(weight, rank=64, size=0.02, dtype=precision)
    for kind, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        merged = Pooled(pooling=pooling, offsets=kind).merge(weight, named(A, B), SCALING)
        D = qa_lora_numpy.update(A.double().numpy(), B.double().numpy(), SCALING, format.width(96), pooling)
        before = np.zeros_like(D) if weight.offsets is None else weight.offsets.double().numpy()
        want = torch.tensor(qa_lora_numpy.merge_offsets(before, D)).float().to(dtype).float()
        assert torch.equal(merged.offsets, want)
        assert torch.equal(merged.codes(), weight.codes())
        assert torch.equal(merged.scales, weight.scales)


def test_with_fp32_offsets_the_merge_of_a_side_branch_loses_a_hundred_thousandth(quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4), 256, 512, std=0.02)
    A, B = factors(weight, size=1e-3)
    x = torch.randn(16, 512, dtype=torch.float64)
    adapter = Pooled(form="side", offsets="fp32")
    merged = adapter.merge(weight, named(A, B), SCALING)
    share = lost(quant_matmul(x, merged), side_branch(x, weight, A, B, adapter), quant_matmul(x, weight))
    assert 0 < share <= 1e-5


@pytest.mark.parametrize(("size", "least", "most"), [(1e-3, 0.002, 0.015), (1e-4, 0.02, 0.12)])
def test_with_fp16_offsets_it_loses_as_much_as_is_documented(
    size: float, least: float, most: float, quant_weight: Make
) -> None:
    """1 to 9 %: about 0.9 % for an update of 1e-3 (a twentieth of the weights), 9 % for one of 1e-4."""
    weight = quant_weight(Format(bits=4), 256, 512, std=0.02)
    A, B = factors(weight, size=size)
    x = torch.randn(16, 512, dtype=torch.float64)
    adapter = Pooled(form="side", offsets="fp16")
    merged = adapter.merge(weight, named(A, B), SCALING)
    share = lost(quant_matmul(x, merged), side_branch(x, weight, A, B, adapter), quant_matmul(x, weight))
    assert least < share < most


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_rounding_merged_offsets_to_whole_zero_points_loses_the_adapter(size: float, quant_weight: Make) -> None:
    """The trap that most merges of QA-LoRA fall into."""
    weight = quant_weight(Format(bits=4, zero="integer"), 256, 512, std=0.02)
    A, B = factors(weight, rank=64, size=size)
    x = torch.randn(16, 512, dtype=torch.float64)
    adapter = Pooled(form="side", offsets="fp32")
    merged = adapter.merge(weight, named(A, B), SCALING)
    points = (-merged.offsets / merged.scales).round().clamp(0, 15)
    rounded = weight.with_offsets(-points * merged.scales, "fp32")
    assert lost(quant_matmul(x, rounded), side_branch(x, weight, A, B, adapter), quant_matmul(x, weight)) > 0.9


@formats
def test_mean_pooling_is_sum_pooling_of_a_smaller_a(format: Format, quant_weight: Make) -> None:
    """The mean is the sum over the group's width, so dividing `A` by it gives the same branch and the same merge."""
    weight = quant_weight(format, 24, 96)
    A, B = factors(weight, size=0.1)
    width = format.width(96)
    x = torch.randn(5, 96, dtype=torch.float64)
    mean = side_branch(x, weight, A, B, Pooled(pooling="mean", form="side"))
    summed = side_branch(x, weight, A / width, B, Pooled(form="side"))
    torch.testing.assert_close(mean, summed, rtol=1e-12, atol=1e-12)
    merged = [
        Pooled(pooling=pooling, offsets="fp32").merge(weight, named(factor, B), SCALING)
        for pooling, factor in (("mean", A), ("sum", A / width))
    ]
    torch.testing.assert_close(merged[0].offsets, merged[1].offsets, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("columns", [128, 100])
@pytest.mark.parametrize("permuted", [False, True])
@poolings
def test_the_update_is_constant_within_each_group(
    pooling: str, permuted: bool, columns: int, quant_weight: Make
) -> None:
    """Columns of `A` are equal within a group and differ between groups: nothing is summed there, so to the bit.

    The product is a sum, in which one processor may end in another last bit for equal columns.
    """
    weight = quant_weight(Format(bits=4), 24, columns, permuted=permuted)
    A, B = factors(weight, rank=8)
    lora_A, lora_B = Pooled(pooling=pooling).as_lora(weight, named(A, B))
    stored_A, delta = weight.stored_order(lora_A), weight.stored_order(SCALING * lora_B @ lora_A)
    assert len(torch.unique(stored_A, dim=1).T) == weight.layout.groups
    D = qa_lora_numpy.update(A.numpy(), B.numpy(), SCALING, 32, pooling)
    close = {"rtol": 1e-12, "atol": 1e-13 * np.abs(D).max()}
    for i in range(columns):
        assert torch.equal(stored_A[:, i], stored_A[:, i // 32 * 32])
        np.testing.assert_allclose(delta[:, i].numpy(), D[:, i // 32], **close)
    for one, other in itertools.pairwise(D.T):
        assert np.abs(one - other).max() > 1e-3 * np.abs(D).max()  # what that tolerance would tell apart


LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


@pytest.mark.parametrize(("adapter", "count"), [(Pooled(), 89_309_184), (LoRA(), 159_907_840)], ids=["pooled", "lora"])
def test_parameters_over_llama_7b_are_as_many_as_in_the_paper(adapter: Adapter, count: int) -> None:
    """89M for QA-LoRA, 160M for QLoRA, at rank 64 and groups of 32."""
    layouts = [
        Layout(format=Format(bits=4, group_size=32), storage=Storage(), out=out, columns=columns)
        for out, columns in LLAMA_7B
    ]
    assert 32 * sum(64 * (adapter.inputs(layout) + layout.out) for layout in layouts) == count


# --- what is trained is what is merged --------------------------------------------------------------------------------


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@formats
def test_the_merged_form_is_the_merged_matrix_bit_for_bit(
    format: Format, dtype: torch.dtype, permuted: bool, quant_weight: Make
) -> None:
    weight = quant_weight(format, 48, 80, permuted=permuted)
    first, second = Pooled(), Pooled(pooling="mean", offsets="fp32")
    params = (*factors(weight, dtype=torch.float32, size=0.02), *factors(weight, dtype=torch.bfloat16, size=0.02))
    x = torch.randn(7, 80).to(dtype)
    trained = quant_matmul(x, weight, MergedForm(((first, SCALING), (second, 3.0))), params)
    merged = second.merge(first.merge(weight, named(*params[:2]), SCALING), named(*params[2:]), 3.0)
    assert torch.equal(trained, quant_matmul(x, merged))
    assert not torch.equal(trained, quant_matmul(x, weight))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_merge_rounds_the_same_on_any_number_of_threads(threads: int, quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4), 512, 512)
    A, B = factors(weight, rank=64, dtype=torch.float32)
    want = Pooled().merge(weight, named(A, B), SCALING).digest()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert Pooled().merge(weight, named(A, B), SCALING).digest() == want
    finally:
        torch.set_num_threads(before)


@formats
def test_merging_two_adapters_adds_both(format: Format, quant_weight: Make) -> None:
    """In either order, but for the rounding of fp32 in between."""
    weight = quant_weight(format, 24, 96)
    one, other = factors(weight), factors(weight, rank=3)
    adapter = Pooled(offsets="fp32")
    both = adapter.merge(adapter.merge(weight, named(*one), SCALING), named(*other), SCALING)
    swapped = adapter.merge(adapter.merge(weight, named(*other), SCALING), named(*one), SCALING)
    base = torch.zeros(24, weight.layout.groups) if weight.offsets is None else weight.offsets
    total = base.double() + SCALING * (one[1] @ one[0] + other[1] @ other[0])
    for merged in (both, swapped):
        torch.testing.assert_close(merged.offsets.double(), total, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("storage", "offsets", "kind"),
    [
        (Storage(), "base", "fp16"),
        (Storage(scales="fp32", offsets="fp32"), "base", "fp32"),
        (Storage(scales="fp16", offsets="fp32"), "base", "fp32"),
        (Storage(scales="fp32", offsets="fp16"), "base", "fp32"),
        (Storage(scales="double", offsets="double"), "base", "fp16"),
        (Storage(), "fp32", "fp32"),
        (Storage(scales="fp32", offsets="fp32"), "fp16", "fp16"),
    ],
)
def test_merged_offsets_are_stored_as_announced(storage: Storage, offsets: str, kind: str, quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4), 24, 96, storage=storage)
    merged = Pooled(offsets=offsets).merge(weight, named(*factors(weight)), SCALING)
    assert merged.layout.storage == Storage(scales=storage.scales, offsets=kind)


def test_the_merge_costs_the_bits_that_it_adds(quant_weight: Make) -> None:
    weight = quant_weight(Format(levels="nf", bits=4, group_size=32), 32, 96)
    assert weight.layout.bits_per_weight == 4.5
    assert Pooled().merge(weight, named(*factors(weight)), SCALING).layout.bits_per_weight == 5.0


@poolings
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("columns", [96, 80])
def test_as_a_lora_it_does_the_same(columns: int, permuted: bool, pooling: str, quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4), 24, columns, permuted=permuted)
    A, B = factors(weight, size=0.1)
    adapter = Pooled(pooling=pooling, form="side")
    lora_A, lora_B = adapter.as_lora(weight, named(A, B))
    assert tuple(lora_A.shape) == (4, columns)
    x = torch.randn(5, columns, dtype=torch.float64)
    want = quant_matmul(x, weight) + SCALING * x @ lora_A.T @ lora_B.T
    torch.testing.assert_close(side_branch(x, weight, A, B, adapter), want, rtol=1e-12, atol=1e-12)


# --- beginnings -------------------------------------------------------------------------------------------------------


def test_pooled_starts_as_the_authors_do() -> None:
    layout = Layout(format=Format(bits=4, group_size=16), storage=Storage(), out=96, columns=2048)
    A, B = begun(Pooled(), layout, 64)
    bound = math.sqrt(6 / (64 + 128))
    assert float(A.abs().max()) <= bound
    assert float(A.abs().max()) > 0.99 * bound
    assert float(A.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert torch.equal(B, torch.zeros(96, 64))


def test_lora_starts_as_the_paper_does() -> None:
    layout = Layout(format=Format(bits=4, group_size=16), storage=Storage(), out=96, columns=128)
    A, B = begun(LoRA(), layout, 64)
    bound = 1 / math.sqrt(128)
    assert 0.99 * bound < float(A.abs().max()) <= bound
    assert torch.equal(B, torch.zeros(96, 64))


@formats
@pytest.mark.parametrize("adapter", [LoRA(), Pooled(form="side"), Pooled()], ids=["lora", "side", "merged"])
def test_before_the_first_step_it_is_the_quantized_base(format: Format, adapter: Adapter, quant_weight: Make) -> None:
    """Bit for bit: at the start `B`, or what it adds, is zero."""
    weight = quant_weight(format, 24, 96)
    x = torch.randn(5, 96)
    y = adapter.forward(x, weight, named(*begun(adapter, weight.layout, 4)), SCALING)
    assert torch.equal(y, quant_matmul(x, weight))


# --- LoRA -------------------------------------------------------------------------------------------------------------


@formats
def test_lora_adds_a_low_rank_product(format: Format, quant_weight: Make) -> None:
    weight = quant_weight(format)
    A, B = factors(weight, adapter=LoRA())
    x = torch.randn(2, 5, 80, dtype=torch.float64)
    want = x @ (weight.dequantize(torch.float64) + SCALING * B @ A).T
    torch.testing.assert_close(side_branch(x, weight, A, B, LoRA()), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_with_a_frozen_nothing_of_the_size_of_the_inputs_is_kept(frozen: bool, quant_weight: Make) -> None:
    """`x A^T [tokens, rank]` is all that the gradient of `B` needs."""
    weight = quant_weight(Format(bits=4), 24, 96)
    A, B = (factor.requires_grad_(True) for factor in factors(weight, adapter=LoRA(), dtype=torch.float32))
    A.requires_grad_(not frozen)
    x, sizes = torch.randn(5, 96, requires_grad=True), []
    known = {tensor.untyped_storage().data_ptr() for tensor in (A, B, *weight.tensors.values())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = LoRA().forward(x, weight, named(A, B), SCALING)
    assert sizes == [(5, 4)] if frozen else (5, 96) in sizes
    y.sum().backward()
    assert B.grad is not None
    assert (A.grad is None) == frozen


@formats
def test_lora_does_not_merge_and_says_what_to_do(format: Format, quant_weight: Make) -> None:
    weight = quant_weight(format)
    digest = weight.digest()
    with pytest.raises(MergeError, match=r"export --format lora.*qa-lora.*merge --requantize"):
        LoRA().merge(weight, named(*factors(weight, adapter=LoRA())), SCALING)
    assert weight.digest() == digest
