"""Low-rank fits of a quantization error, from the papers' equations, in float64 NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def objective(E: Matrix, A: Matrix, Bt: Matrix, H: Matrix) -> float:
    """QuAILoRA, eq. 2: half of || (E - A B^T) X ||^2, with H = X X^T."""
    R = E - A @ Bt
    return 0.5 * float(np.trace(R @ H @ R.T))


def svd_start(E: Matrix, r: int) -> tuple[Matrix, Matrix]:
    U, S, Vt = np.linalg.svd(E, full_matrices=False)
    return U[:, :r] * np.sqrt(S[:r]), np.sqrt(S[:r])[:, None] * Vt[:r]


def quailora(E: Matrix, H: Matrix, r: int, sweeps: int) -> tuple[Matrix, Matrix, list[float]]:
    """Eqs. 5 and 6 in consistent shapes, and the objective after every half-step."""
    A, Bt = svd_start(E, r)
    trace = [objective(E, A, Bt, H)]
    for _ in range(sweeps):
        A = E @ H @ Bt.T @ np.linalg.inv(Bt @ H @ Bt.T)
        trace.append(objective(E, A, Bt, H))
        Bt = (E.T @ A @ np.linalg.inv(A.T @ A)).T
        trace.append(objective(E, A, Bt, H))
    return A, Bt, trace


def best_product(E: Matrix, H: Matrix, r: int) -> Matrix:
    """CLoQ: LR_r(E R) R^-1 with H = R R^T (here a Cholesky factor: the product does not depend on which)."""
    R = np.linalg.cholesky(H)
    U, S, Vt = np.linalg.svd(E @ R, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vt[:r] @ np.linalg.inv(R)


def best_objective(E: Matrix, H: Matrix, r: int) -> float:
    """Half the sum of the squared singular values of E H^(1/2) beyond the r-th."""
    S = np.linalg.svd(E @ np.linalg.cholesky(H), compute_uv=False)
    return 0.5 * float((S[r:] ** 2).sum())


def pooled_least_squares(E: Matrix, H: Matrix, group: int) -> Matrix:
    """C that minimizes tr[(E - C P) H (E - C P)^T], row by row, by numpy's least squares on a root of H."""
    columns = E.shape[1]
    P = np.zeros((-(-columns // group), columns))
    for i in range(columns):
        P[i // group, i] = 1
    L = np.linalg.cholesky(H)
    return np.stack([np.linalg.lstsq((P @ L).T, (row @ L), rcond=None)[0] for row in E])
