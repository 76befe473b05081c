"""Entropy of codes: the compiled kernels choose what the plain ones do, and these count what brute force counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import icq_numpy
from torch import Tensor

from quadapt.kernels import entropy, entropy_cpu, entropy_reference, reference
from quadapt.kernels.entropy import group_entropy
from quadapt.quant.format import normal_levels
from quadapt.quant.icq import fractions

SHAPES = [(1, 1), (3, 2), (5, 17), (4, 64), (7, 150), (3, 300), (2, 1000)]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def mids_of(levels: str, bits: int, dtype: torch.dtype) -> Tensor:
    values = torch.tensor(normal_levels(bits)) if levels == "nf" else torch.linspace(-1, 1, 2**bits)
    return reference.midpoints(values).to(dtype)


def weights(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Ordinary ones, ones with many ties, ones far from zero, and constants with an outlier."""
    w = torch.randn(shape)
    if kind == "coarse":
        w = (2 * w).round()
    elif kind == "far":
        w = 1000 + w
    elif kind == "flat":
        w = torch.ones(shape)
        w[0, 0] = -3
    return w.to(dtype)


@dtypes
@pytest.mark.parametrize(
    ("levels", "bits"),
    [("int", 2), ("int", 3), ("int", 4), ("int", 5), ("int", 8), ("nf", 2), ("nf", 3), ("nf", 4), ("nf", 8)],
)
@pytest.mark.parametrize("kind", ["normal", "coarse", "far", "flat"])
def test_the_shift_chosen_is_the_references(kind: str, levels: str, bits: int, dtype: torch.dtype) -> None:
    mids, f = mids_of(levels, bits, dtype), fractions().to(dtype)
    for shape in SHAPES:
        w = weights(kind, shape, dtype)
        for group in (16, 64, shape[1]):
            found, want = (each.entropy_shift(w, mids, f, group) for each in (entropy_cpu, entropy_reference))
            assert torch.equal(found[0], want[0]), f"{shape}, groups of {group}"
            assert torch.equal(found[1], want[1]), f"{shape}, groups of {group}"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_rows_and_change_nothing(threads: int) -> None:
    mids, f, w = mids_of("nf", 4, torch.float32), fractions(), torch.randn(65, 256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = entropy.entropy_shift(w, mids, f, 64)
    finally:
        torch.set_num_threads(before)
    want = entropy_reference.entropy_shift(w, mids, f.float(), 64)
    assert torch.equal(found[0], want[0])


def test_a_weight_that_is_not_contiguous_or_has_a_gradient_is_read_as_it_is() -> None:
    mids, f = mids_of("nf", 3, torch.float32), fractions()
    w = torch.randn(48, 20, requires_grad=True).T
    want = entropy.entropy_shift(w.detach().contiguous(), mids, f, 16)
    assert torch.equal(entropy.entropy_shift(w, mids, f, 16)[0], want[0])


@dtypes
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_crowding_of_integer_codes_is_the_references(bits: int, dtype: torch.dtype) -> None:
    for (rows, columns), shifted in itertools.product(SHAPES, (True, False)):
        for group in (16, 64, columns):
            shape = (rows, -(-columns // group))
            scales, offsets = torch.rand(shape, dtype=dtype) + 0.05, torch.randn(shape, dtype=dtype)
            case = (torch.randn(rows, columns, dtype=dtype), scales, offsets if shifted else None, bits, group)
            found, want = entropy_cpu.group_crowding(*case), entropy_reference.group_crowding(*case)
            assert torch.equal(found, want), f"{rows} x {columns}, groups of {group}, offsets: {shifted}"


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("columns", "group"), [(64, 64), (70, 32), (5, 16), (1, 1)])
def test_entropy_is_that_of_the_histogram(columns: int, group: int, bits: int) -> None:
    """It equals brute force and lies between 0 and `bits`; a constant group has none."""
    codes = torch.randint(0, 2**bits, (6, columns), dtype=torch.uint8)
    codes[2] = 1
    found = group_entropy(codes, bits, group)
    want = [[icq_numpy.entropy(part.tolist()) for part in row.split(group)] for row in codes]
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-8)
    assert bool((found > -1e-9).all() & (found < bits + 1e-9).all())
    assert float(found[2].abs().max()) < 1e-9


def test_histograms_that_differ_in_order_alone_are_exactly_tied() -> None:
    codes = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3], dtype=torch.uint8)
    orders = torch.stack([torch.tensor(p)[codes.int()] for p in itertools.permutations(range(4))]).to(torch.uint8)
    assert len(entropy_reference.crowding_of(orders, 2, 16).unique()) == 1
