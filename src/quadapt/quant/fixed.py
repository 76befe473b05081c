"""Sums and factorizations that end in the same last bit on any number of threads.

torch cuts a sum over all entries into as many parts as there are threads, and LAPACK and BLAS cut factorizations and
long sums by their number; a code, a range or a singular vector would depend on it. Here what is added up at once is
too little to be cut (of float32: MKL cuts float64 earlier). What a model computes is torch's affair: statistics of its
inputs may differ, and the number of threads is part of a job for that reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_RUN = 1024
"""Numbers that are added up at once: far fewer than torch gives to more than one thread."""

_BLOCK = 64
"""Columns that LAPACK factors, which it does alone for so few, and over which products are summed."""


def total(values: Tensor) -> Tensor:
    """The sum of all entries, float64, as a tensor without axes."""
    left = values.flatten()
    while len(left) > _RUN:
        left = torch.nn.functional.pad(left, (0, -len(left) % _RUN)).view(-1, _RUN).sum(-1, dtype=torch.float64)
    return left.sum(dtype=torch.float64)


def mean(values: Tensor) -> Tensor:
    """The mean of all entries, float64, as a tensor without axes."""
    return total(values) / values.numel()


def cholesky(matrix: Tensor) -> tuple[Tensor, bool]:
    """The lower factor `L` of `matrix = L L^T` `[n, n]`, and whether there is one."""
    if matrix.device.type != "cpu":
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return lower, not bool(failed)
    rest = matrix.clone()
    for part, below in _blocks(len(rest)):
        corner, failed = torch.linalg.cholesky_ex(rest[part, part])
        if bool(failed):
            return rest, False
        rest[part, part] = corner
        rest[below, part] = rest[below, part] @ _inverse_of_corner(corner).T
        rest[below, below] -= rest[below, part] @ rest[below, part].T
    return rest.tril_(), True


def inverse_of_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix `[n, n]`."""
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    if lower.device.type != "cpu":
        return torch.linalg.solve_triangular(lower, inverse, upper=False)
    for part, below in _blocks(len(lower)):
        left = slice(0, part.stop)
        inverse[part, left] = _inverse_of_corner(lower[part, part]) @ inverse[part, left]
        inverse[below, left] -= lower[below, part] @ inverse[part, left]
    return inverse


def _inverse_of_corner(lower: Tensor) -> Tensor:
    """The inverse of one block, solved alone since BLAS splits wider systems by the number of threads."""
    return torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)


def _blocks(columns: int) -> Iterator[tuple[slice, slice]]:
    """Columns block by block, each with those after it."""
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        yield slice(start, stop), slice(stop, columns)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, what this thread calls of torch and LAPACK is not shared out. For factorizations that are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
