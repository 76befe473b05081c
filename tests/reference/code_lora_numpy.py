"""A low-rank term among whole codes, in float64: the adapted matrix, and its gradients straight through rounding."""

from __future__ import annotations

import numpy as np


def codes(q: np.ndarray, change: np.ndarray, bits: int) -> np.ndarray:
    """Whole codes; `change [out, in]` in units of codes."""
    return np.clip(np.rint(q + change), 0, 2**bits - 1)


def spread(values: np.ndarray, width: int, columns: int) -> np.ndarray:
    """Numbers of groups, `[out, groups]`, for each of their columns."""
    return np.repeat(values, width, 1)[:, :columns]


def summed(values: np.ndarray, width: int) -> np.ndarray:
    """Sums over groups, `[out, groups]`."""
    return np.stack([values[:, at : at + width].sum(1) for at in range(0, values.shape[1], width)], 1)


def gradients(
    dW: np.ndarray,
    q: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    scaling: float,
    scales: np.ndarray,
    bits: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of `A`, `B`, scales and offsets, for `dW [out, in]` of `W = scales * codes + offsets`.

    A code whose rounded value is out of range passes no gradient on.
    """
    whole = np.rint(q + scaling * (B @ A))
    inside = (whole >= 0) & (whole <= 2**bits - 1)
    dq = scaling * np.where(inside, dW * spread(scales, width, dW.shape[1]), 0)
    return B.T @ dq, dq @ A.T, summed(dW * whole.clip(0, 2**bits - 1), width), summed(dW, width)
