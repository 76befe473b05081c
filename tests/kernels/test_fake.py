"""The compiled fake quantization equals the plain one bit for bit; neither rows, tiles nor threads change a code."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quadapt.kernels import fake_cpu, fake_reference, threads
from quadapt.kernels.fake import fake_gradients, fake_quantize
from quadapt.kernels.fake_reference import Grid
from quadapt.kernels.reference import dequantize, pack
from quadapt.quant.format import normal_levels

BITS = (2, 3, 4, 5, 6, 8)
TABLES = (2, 3, 4, 8)
"""Widths of codes: of integers, and of tables of levels."""
SHAPES = [(1, 1, 1), (3, 20, 8), (3, 17, 17), (5, 80, 32), (4, 33, 16), (7, 100, 48), (2, 129, 129)]
"""Rows, columns, group: odd ones, fewer than a vector, rows and groups that end in the middle of one."""
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DENSE = [torch.bfloat16, torch.float16, torch.float32]


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Signs of zeros and NaN count too."""
    return ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def grid_of(rows: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and offsets under which weights of deviation 1 are partly clamped, at both ends; some are negative."""
    shape = (rows, -(-grid.columns // grid.group_size))
    scales = (torch.rand(shape) + 0.5) * 3 / 2**grid.bits * torch.where(torch.rand(shape) < 0.25, -1, 1)
    return scales, -scales * 2 ** (grid.bits - 1) + 0.1 * torch.randn(shape)


def codes_of(rows: int, grid: Grid) -> Tensor:
    return pack(torch.randint(0, 2**grid.base_bits, (rows, grid.columns), dtype=torch.uint8), grid.base_bits)


def factors(rows: int, columns: int, rank: int, size: float = 0.3) -> tuple[Tensor | None, Tensor | None]:
    return (size * torch.randn(rank, columns), torch.randn(rows, rank)) if rank else (None, None)


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments up to `grid`, with a name: every kind of base, with and without a low-rank term."""
    for bits, (rows, columns, group) in itertools.product(BITS, SHAPES):
        grid = Grid(bits, bits, group, columns)
        scales, offsets = grid_of(rows, grid)
        for dtype, rank in zip(FLOATS, (0, 1, 4, 7), strict=True):
            base = torch.randn(rows, columns).to(dtype)
            yield f"{bits} {dtype} {grid}", (base, *factors(rows, columns, rank), scales, offsets, None, grid)
        for base_bits, rank in ((bits, 0), (bits, 3), (8, 0), (8, 5)):
            fixed = grid._replace(base_bits=base_bits)
            base = codes_of(rows, fixed)
            A, B = factors(rows, columns, rank, size=0.2 * 2**bits)
            yield f"{bits} codes {fixed}", (base, A, B, scales, offsets, None, fixed)
        if bits in TABLES:
            levels = torch.tensor(normal_levels(bits))
            yield f"{bits} levels {grid}", (codes_of(rows, grid), None, None, scales, offsets, levels, grid)


def test_weights_and_codes_equal_the_reference_bit_for_bit() -> None:
    for name, case in cases():
        for dtype in (*DENSE, *([torch.uint8] if case[5] is None else [])):
            assert same_bits(fake_cpu.quantize(*case, dtype), fake_reference.quantize(*case, dtype)), (name, dtype)


@pytest.mark.parametrize("slack", [None, 1e-4, 0.0])
def test_gradients_equal_the_reference_but_for_the_order_of_their_sums(slack: float | None) -> None:
    for (name, case), dtype in itertools.product(cases(), DENSE):
        base, levels, grid = case[0], case[5], case[6]
        G = torch.randn(len(base), grid.columns)
        ours, theirs = G.clone(), G.clone()
        dense = [torch.empty(G.shape, dtype=dtype) for _ in range(2)]
        found = fake_cpu.gradients(ours, *case, slack, dense[0])
        want = fake_reference.gradients(theirs, *case, slack, dense[1])
        assert same_bits(*dense), name
        assert same_bits(dense[0], fake_reference.quantize(*case, dense[0].dtype)), name
        torch.testing.assert_close(
            found, want, rtol=1e-5, atol=1e-6 * 2**grid.bits, msg=lambda text, name=name: name + text
        )
        if levels is None and (base.is_floating_point() or case[1] is not None):
            assert same_bits(ours, theirs), name
        alone = G.clone()
        assert same_bits(fake_cpu.gradients(alone, *case, slack, None), found), name  # weights are optional


def test_both_ends_are_clamped_in_these_cases() -> None:
    for name, case in cases():
        moves = case[1] is not None or case[0].is_floating_point()
        if moves and len(case[0]) * case[6].columns >= 100:
            codes = fake_reference.quantize(*case, torch.uint8)
            G = torch.ones(codes.shape)
            fake_reference.gradients(G, *case, None, None)
            assert (codes[G == 0] == 0).any(), name
            assert (codes[G == 0] == case[6].top).any(), name


def test_plain_codes_are_the_stored_form() -> None:
    for bits, levels in [*((bits, False) for bits in BITS), *((bits, True) for bits in TABLES)]:
        grid = Grid(bits, bits, 32, 80)
        packed, (scales, offsets) = codes_of(6, grid), grid_of(6, grid)
        table = torch.tensor(normal_levels(bits)) if levels else None
        for dtype in DENSE:
            want = dequantize(packed, scales, offsets, table, bits, 32, 80, dtype)
            assert torch.equal(fake_cpu.quantize(packed, None, None, scales, offsets, table, grid, dtype), want)


@pytest.mark.parametrize("kernels", [fake_cpu, fake_reference], ids=lambda module: module.__name__.split(".")[-1])
def test_halves_round_to_even_and_no_code_is_minus_zero(kernels: Any) -> None:
    value = torch.tensor([[-0.5, -0.2, 0.5, 1.5, 2.5, 3.5, 2.6, 9.0]])
    grid, one, none = Grid(2, 2, 8, 8), torch.ones(1, 1), torch.tensor([[-0.0]])
    weight = kernels.quantize(value, None, None, one, none, None, grid, torch.float32)
    assert weight.tolist() == [[0, 0, 0, 2, 2, 3, 3, 3]]
    assert not weight.signbit().any()
    weight = kernels.quantize(
        value, None, None, torch.full((1, 1), 2.0**-9), one, None, grid._replace(bits=8), torch.bfloat16
    )
    assert weight[0, 0] == 1  # the top code, 255 / 512, added to one
    assert weight[0, -1] == torch.tensor(1 + 255 / 512).bfloat16()


@pytest.mark.parametrize("kernels", [fake_cpu, fake_reference], ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("codes", [False, True])
def test_a_factor_that_is_not_a_number_shows_in_the_weights(kernels: Any, codes: bool) -> None:
    grid = Grid(4, 4, 16, 40)
    A, B = factors(3, 40, 2)
    A[1, 5] = float("nan")
    base = codes_of(3, grid) if codes else torch.randn(3, 40)
    for dtype in DENSE:
        weight = kernels.quantize(base, A, B, *grid_of(3, grid), None, grid, dtype)
        assert weight.isnan().nonzero().tolist() == [[0, 5], [1, 5], [2, 5]]


def test_the_low_rank_sum_has_one_order_and_each_product_is_rounded() -> None:
    """Codes that differ between orders, or where products are fused into sums: many steps, coarse numbers."""
    grid = Grid(8, 8, 64, 64)
    A, B = factors(64, 64, 24, size=3.0)
    update = torch.zeros(64, 64)
    for r in range(24):
        update = update + B[:, r : r + 1] * A[r]
    scales = torch.full((64, 1), 2.0**-20)  # a code is a last bit or less
    case = (-update, A, B, scales, -127 * scales, None, grid, torch.uint8)
    for kernels in (fake_reference, fake_cpu):
        assert (kernels.quantize(*case) == 127).all()
    other = -update + (B.double() @ A.double()).float()  # summed exactly, and rounded once
    assert (fake_reference.quantize(other, None, None, *case[3:]) != 127).any()


@pytest.mark.parametrize("count", [2, 3, 7])
def test_neither_threads_nor_tiles_change_a_bit(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
    before = torch.get_num_threads()
    grid = Grid(3, 3, 32, 80)
    A, B = factors(23, 80, 5)
    scales, offsets = grid_of(23, grid)
    G = torch.randn(23, 80)
    for base in (torch.randn(23, 80).bfloat16(), codes_of(23, grid)):
        results = []
        for pieces, on in ((23, 1), (23, count), (count, 1)):
            torch.set_num_threads(on)
            try:
                masked, parts = G.clone(), [slice(start, start + pieces) for start in range(0, 23, pieces)]
                dense = torch.empty(23, 80, dtype=torch.bfloat16)
                sums = [
                    fake_cpu.gradients(masked[p], base[p], A, B[p], scales[p], offsets[p], None, grid, 1e-4, dense[p])
                    for p in parts
                ]
                codes = [
                    fake_cpu.quantize(base[p], A, B[p], scales[p], offsets[p], None, grid, torch.uint8) for p in parts
                ]
            finally:
                torch.set_num_threads(before)
            results.append((masked, dense, torch.cat(sums, 1), torch.cat(codes)))
        for other in results[1:]:
            assert all(same_bits(ours, theirs) for ours, theirs in zip(results[0], other, strict=True))


def test_tensors_that_are_not_contiguous_are_read_and_written() -> None:
    grid = Grid(4, 4, 16, 80)
    A, B = factors(6, 80, 3)
    case = (torch.randn(6, 80), A, B, *grid_of(6, grid), None, grid)
    skewed = [t.T.contiguous().T if isinstance(t, Tensor) else t for t in case]
    want = fake_cpu.quantize(*case, torch.bfloat16)
    assert torch.equal(fake_cpu.quantize(*skewed, torch.bfloat16), want)
    G = torch.randn(6, 80)
    ours, theirs, dense = G.T.contiguous().T, G.clone(), torch.empty(80, 6, dtype=torch.bfloat16).T
    found, sums = fake_cpu.gradients(ours, *skewed, None, dense), fake_cpu.gradients(theirs, *case, None, None)
    torch.testing.assert_close(found, sums)
    assert torch.equal(ours, theirs)
    assert torch.equal(dense, want)


def test_double_precision_is_the_references() -> None:
    grid = Grid(3, 3, 32, 80)
    A, B = factors(5, 80, 3)
    base, (scales, offsets) = torch.randn(5, 80), grid_of(5, grid)
    double = (base.double(), A.double(), B.double(), scales.double(), offsets.double(), None, grid)
    for case in (double, (base, A, B, scales, offsets, None, grid)):
        assert torch.equal(fake_cpu.quantize(*case, torch.float64), fake_reference.quantize(*case, torch.float64))


def test_parameters_keep_storages_that_can_be_resized() -> None:
    grid = Grid(4, 4, 16, 80)
    A, B = factors(6, 80, 4)
    tensors = [torch.randn(6, 80), A, B, *grid_of(6, grid)]
    fake_cpu.quantize(*tensors, None, grid, torch.float32)
    fake_cpu.gradients(torch.randn(6, 80), *tensors, None, grid, None, None)
    assert all(tensor.untyped_storage().resizable() for tensor in tensors)


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("codes", [True, False])
def test_the_operators_keep_torchs_contract(codes: bool, low_rank: bool) -> None:
    grid = Grid(3, 3, 16, 37)
    base = codes_of(5, grid) if codes else torch.randn(5, 37).bfloat16()
    case = (base, *factors(5, 37, 2 * low_rank), *grid_of(5, grid), None, tuple(grid))
    torch.library.opcheck(torch.ops.quadapt.fake_quantize.default, (*case, torch.bfloat16))
    for dense in (None, torch.empty(5, 37, dtype=torch.bfloat16)):
        torch.library.opcheck(torch.ops.quadapt.fake_gradients.default, (torch.randn(5, 37), *case, 1e-4, dense))
    found = fake_quantize(*case, torch.float32)
    assert torch.equal(found, fake_reference.quantize(*case[:-1], grid, torch.float32))
    G = torch.randn(5, 37)
    assert fake_gradients(G.clone(), *case, None, None).shape == (2, 5, 3)
