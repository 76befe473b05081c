"""The mathematics that starts share: low-rank terms that stand in for a quantization error `E = W - Q`.

The objective is `f(up, down) = tr[(E - up down) H (E - up down)^T] / 2`: half the mean squared error that is left in
the layer's output, with `H` the second moment of its inputs; `H` the identity gives the error of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quadapt.errors import CalibrationError
from quadapt.kernels import pool
from quadapt.quant.fixed import mean, one_thread, total
from quadapt.quant.weight import QuantWeight

_SMALL = 256
"""Matrices with fewer rows or columns are decomposed exactly."""

_MORE_VECTORS, _ITERATIONS = 10, 4

Factors = tuple[Tensor, Tensor]
"""`up` `[out, rank]` and `down` `[rank, in]`."""


def objective(E: Tensor, H: Tensor | None, factors: Factors | None = None) -> float:
    """`tr[(E - up down) H (E - up down)^T] / 2`; `H` None for the identity."""
    rest = E if factors is None else E - factors[0] @ factors[1]
    return 0.5 * float(total(rest * rest if H is None else (rest @ H) * rest))


def svd_factors(E: Tensor, rank: int) -> Factors:
    """The best `up @ down` of a rank in the Frobenius norm, singular values shared out evenly, float64.

    Factors have `rank` columns and rows even if the matrix has fewer: the rest is zero.
    """
    U, S, Vh = leading(E.double(), rank)
    root = S.sqrt()
    return padded((U * root, root[:, None] * Vh), rank)


def leading(E: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular vectors and values: exactly, or of a large matrix about so."""
    wide = rank + _MORE_VECTORS
    if min(E.shape) <= max(_SMALL, 2 * wide):
        with one_thread():
            U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    else:
        U, S, Vh = randomized_svd(E, wide, power=_ITERATIONS)
    return U[:, :rank], S[:rank], Vh[:rank]


def randomized_svd(
    matrix: Tensor, followed: int, *, power: int, seed: int = 0, directions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """About the leading singular vectors and values: `U` `[out, followed]`, `S`, `Vh` `[followed, in]`.

    This is what `torch.svd_lowrank` computes, but that draws from the global random numbers, and always anew.

    Args:
        matrix: Float32 or float64 `[out, in]`.
        followed: How many directions are followed; some more than are wanted.
        power: How many iterations are made; more are needed where singular values fall slowly.
        seed: The seed of the random directions in which the search starts.
        directions: The row space to start from, `[in, followed]`, if a similar matrix has been decomposed.

    Source: Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1.
    """
    if directions is None:
        drawn = torch.Generator().manual_seed(seed)
        directions = torch.randn(matrix.shape[1], followed, generator=drawn, dtype=matrix.dtype).to(matrix.device)
    basis = _orthonormal(matrix @ directions)
    for _ in range(power):
        basis = _orthonormal(matrix.T @ basis)
        basis = _orthonormal(matrix @ basis)
    projected = basis.T @ matrix
    with one_thread():
        U, S, Vh = torch.linalg.svd(projected, full_matrices=False)
    return basis @ U, S, Vh


def _orthonormal(vectors: Tensor) -> Tensor:
    """A basis `[n, followed]` of the space that some vectors span."""
    with one_thread():
        return torch.linalg.qr(vectors).Q


def padded(factors: Factors, rank: int) -> Factors:
    """Factors with zeros up to `rank`."""
    up, down = factors
    missing = rank - up.shape[1]
    return torch.nn.functional.pad(up, (0, missing)), torch.nn.functional.pad(down, (0, 0, 0, missing))


def balanced(factors: Factors) -> Factors:
    """Split a product into factors with evenly shared singular values, since Adam's path depends on the split."""
    up, down = factors
    with one_thread():
        left, R = torch.linalg.qr(up)
        right, T = torch.linalg.qr(down.T)
        U, S, Vh = torch.linalg.svd(R @ T.T, full_matrices=False)
    root = S.sqrt()
    return padded(((left @ U) * root, root[:, None] * (Vh @ right.T)), up.shape[1])


def moment_of(second_moment: Tensor | None, like: Tensor) -> Tensor:
    """A second moment that can be worked with, float64 on the device of `like`.

    Raises:
        CalibrationError: It is missing, or not finite.
    """
    if second_moment is None:
        raise CalibrationError("the second moment of the layer's inputs is missing. Give calibration data")
    if not bool(torch.isfinite(second_moment).all()):
        raise CalibrationError(
            "the second moment of the inputs has NaN or infinite entries. The model overflows on this data; "
            "calibrate in float32 (--dtype float32)"
        )
    return second_moment.to(like.device, torch.float64)


def best_offsets(E: Tensor, H: Tensor | None, weight: QuantWeight) -> Tensor:
    r"""What to add to the offsets of `weight`, for the least `tr[(E - C P) H (E - C P)^T]`; float64 `[out, groups]`.

    `P` `[groups, in]` sums inputs over the groups: `C = E H P^T (P H P^T)^-1`. This is the fit of a pooled adapter,
    `E ~ B A P`, without its limit on the rank, which has no purpose once the term has been folded into the offsets.
    """
    E = weight.stored_order(E.double())
    width = weight.format.width(weight.layout.columns)
    if H is None:
        EP, PHP = pool(E, width), torch.diag(pool(torch.ones_like(E[:1]), width)[0])
    else:
        H = weight.stored_order(weight.stored_order(H).T)
        HP = pool(H, width)
        EP, PHP = E @ HP, pool(HP.T.contiguous(), width)
    return solved(PHP, EP.T).T


def solved(gram: Tensor, right: Tensor, damping: float = 1e-9) -> Tensor:
    """`gram^-1 @ right` for a Gram matrix that may be singular: damped by a share of its mean diagonal."""
    level = damping * float(mean(gram.diagonal()))
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if level <= 0:
        return torch.zeros_like(right)
    with one_thread():
        return torch.linalg.solve(gram + level * eye, right)
