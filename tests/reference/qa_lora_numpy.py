"""QA-LoRA (Xu et al. 2023, arXiv:2309.14717) in float64: the forward with its pooling matrix, and both merges."""

from __future__ import annotations

import numpy as np


def pooling(columns: int, group_size: int, kind: str = "sum") -> np.ndarray:
    """`P [groups, in]`: `P[l, i]` is 1 (mean: 1 / group_size) where input `i` lies in group `l`."""
    groups = -(-columns // group_size)
    P = np.zeros((groups, columns))
    for i in range(columns):
        P[i // group_size, i] = 1.0 if kind == "sum" else 1.0 / group_size
    return P


def forward(
    x: np.ndarray, weight: np.ndarray, A: np.ndarray, B: np.ndarray, scaling: float, P: np.ndarray
) -> np.ndarray:
    """`x W^T + scaling ((x P^T) A^T) B^T`: the quantized matrix and, beside it, the adapter over pooled inputs."""
    return x @ weight.T + scaling * ((x @ P.T) @ A.T) @ B.T


def update(A: np.ndarray, B: np.ndarray, scaling: float, group_size: int, kind: str = "sum") -> np.ndarray:
    """`D [out, groups]`: what the adapter adds to each weight of a group."""
    return scaling * (B @ A) / (1 if kind == "sum" else group_size)


def merge_offsets(offsets: np.ndarray, D: np.ndarray) -> np.ndarray:
    """Offsets after a merge, for `w = scale * code + offset`."""
    return offsets + D


def merge_zero_points(points: np.ndarray, scales: np.ndarray, D: np.ndarray) -> np.ndarray:
    """Zero-points after a merge (in units of codes), for `w = scale * (code - point)`."""
    return points - D / scales
