"""LoTA-QAF (Chen et al. 2025, arXiv:2505.18724) in float64: marks, rest, the adapted matrix, and its gradients."""

from __future__ import annotations

import numpy as np


def marks(codes: np.ndarray, D: np.ndarray, omega: float, bits: int) -> np.ndarray:
    """`m`: the sign of `D` where `|D|` exceeds omega and the code has room for it."""
    up = (omega < D) & (codes < 2**bits - 1)
    down = (-omega > D) & (codes > 0)
    return up.astype(float) - down.astype(float)


def groups(columns: int, width: int) -> list[slice]:
    return [slice(at, min(at + width, columns)) for at in range(0, columns, width)]


def shifts(D: np.ndarray, m: np.ndarray, omega: float, width: int) -> np.ndarray:
    """`mu [out, groups]`: the mean of the rest over each group, in units of omega."""
    rest = D - omega * m
    return np.stack([rest[:, each].mean(1) for each in groups(D.shape[1], width)], 1) / omega


def weight(
    codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray, D: np.ndarray, omega: float, bits: int, width: int
) -> np.ndarray:
    """`W' = s * (q + m + mu) + offsets`, where the offsets are `-s * z`."""
    m = marks(codes, D, omega, bits)
    moved = offsets + scales * shifts(D, m, omega, width)
    found = np.empty(D.shape)
    for at, each in enumerate(groups(D.shape[1], width)):
        found[:, each] = scales[:, at : at + 1] * (codes[:, each] + m[:, each]) + moved[:, at : at + 1]
    return found


def gradients(
    dW: np.ndarray, A: np.ndarray, B: np.ndarray, scales: np.ndarray, omega: float, width: int, *, rest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Of `A` and `B`, for `dW [out, in]`: `dL/dm` goes to `D` as it is; of `mu` each of a group has an equal share."""
    dD = np.empty(dW.shape)
    for at, each in enumerate(groups(dW.shape[1], width)):
        dm = scales[:, at : at + 1] * dW[:, each]
        dD[:, each] = dm + (dm.sum(1, keepdims=True) / (dm.shape[1] * omega) if rest else 0)
    return B.T @ dD, dD @ A.T
