"""Sums and factorizations that end in the same last bit on any number of threads.

torch cuts a sum over all entries into as many parts as there are threads, and LAPACK blocks its factorizations by their
number; a code, a range or a singular vector would depend on it. A product of matrices is shared out by rows and columns
of the result, so that each of its sums is made by one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_RUN = 1024
"""Numbers that are added up at once: far fewer than torch gives to more than one thread."""

_LEAF, _STEP = 64, 256
"""Columns that LAPACK factors, which it does alone for so few; and columns of a step of a larger matrix."""


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
    if matrix.device.type != "cpu" or len(matrix) <= _LEAF:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return lower, not bool(failed)
    rest, step = matrix.clone(), _STEP if len(matrix) > 2 * _STEP else _LEAF
    for start in range(0, len(rest), step):
        part, below = slice(start, start + step), slice(start + step, None)
        corner, found = cholesky(rest[part, part])
        if not found:
            return rest, False
        rest[part, part] = corner
        rest[below, part] = torch.linalg.solve_triangular(corner.T, rest[below, part], upper=True, left=False)
        rest[below, below] -= rest[below, part] @ rest[below, part].T
    return rest.tril_(), True


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, what this thread calls of torch and LAPACK is not shared out. For factorizations that are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
