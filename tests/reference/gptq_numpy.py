"""GPTQ as in its paper (Frantar et al. 2022), column by column over the whole matrix, in float64.

The inverse second moment is formed and factored in so many words; no blocks; a group's grid is chosen from its columns
as they are when its first column is reached.
"""

from __future__ import annotations

import numpy as np
from reference.nearest_numpy import grid, nearest


def damped(moment: np.ndarray, damping: float) -> np.ndarray:
    """Dead inputs get a one on the diagonal, then every input a share of its mean."""
    moment = moment.astype(np.float64).copy()
    for i in range(len(moment)):
        if moment[i, i] == 0:
            moment[i, i] = 1
    return moment + damping * np.trace(moment) / len(moment) * np.eye(len(moment))


def gptq(
    weight: np.ndarray,
    moment: np.ndarray,
    bits: int,
    group_size: int,
    *,
    levels: list[float] | None = None,
    zero: str = "float",
    stored: type = np.float16,
    damping: float = 0.01,
    act_order: bool = False,
    static: bool = False,
    given: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes in the order of rounding, scales, offsets, and that order (`order[j]`: input rounded as the j-th).

    `given`: scales and offsets to use in place of those that the weights suggest.
    """
    work = weight.astype(np.float64).copy()
    work[:, np.diag(moment) == 0] = 0
    order = np.argsort(-np.diag(moment), kind="stable") if act_order else np.arange(work.shape[1])
    work, moment = work[:, order], moment[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(damped(moment, damping))).T
    rows, columns = work.shape
    codes = np.zeros(work.shape, np.uint8)
    original = work.copy()
    scales, offsets = np.zeros((rows, -(-columns // group_size))), np.zeros((rows, -(-columns // group_size)))
    for i in range(columns):
        k = i // group_size
        for row in range(rows):
            if i % group_size == 0:
                seen = (original if static else work)[row, i : i + group_size]
                found = grid(seen, bits, levels, zero, stored)
                scales[row, k], offsets[row, k] = found if given is None else (given[0][row, k], given[1][row, k])
            scale, offset = scales[row, k], offsets[row, k]
            codes[row, i] = nearest(work[row, i], scale, offset, bits, levels)
            level = codes[row, i] if levels is None else levels[codes[row, i]]
            error = (work[row, i] - (scale * float(level) + offset)) / upper[i, i]
            work[row, i:] -= error * upper[i, i:]
    return codes, scales, offsets, order


def weighted_error(change: np.ndarray, moment: np.ndarray) -> float:
    """`||change X^T||^2 / n`, given `moment = X^T X / n`."""
    return float(np.trace(change @ moment @ change.T))
