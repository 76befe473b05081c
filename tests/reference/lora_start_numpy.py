"""An adapter beside the frozen factors of a start, in float64: output and gradients, one product at a time."""

from __future__ import annotations

import numpy as np


def forward(
    x: np.ndarray,
    W: np.ndarray,
    first: tuple[np.ndarray, np.ndarray],
    factors: tuple[np.ndarray, np.ndarray],
    scaling: float,
    dropped: np.ndarray | None = None,
) -> np.ndarray:
    """`x W^T + scaling * (x A0^T B0^T + d A^T B^T)`; `d` are the inputs after dropout, or `x`."""
    (A0, B0), (A, B) = first, factors
    seen = x if dropped is None else dropped
    return x @ W.T + scaling * (x @ A0.T @ B0.T + seen @ A.T @ B.T)


def gradients(
    x: np.ndarray,
    dy: np.ndarray,
    W: np.ndarray,
    first: tuple[np.ndarray, np.ndarray],
    factors: tuple[np.ndarray, np.ndarray],
    scaling: float,
) -> dict[str, np.ndarray]:
    """Of `x [tokens, in]`, `A [rank, in]` and `B [out, rank]`, for `dy [tokens, out]`."""
    (A0, B0), (A, B) = first, factors
    return {
        "x": dy @ (W + scaling * (B0 @ A0 + B @ A)),
        "A": scaling * B.T @ dy.T @ x,
        "B": scaling * dy.T @ x @ A.T,
    }
