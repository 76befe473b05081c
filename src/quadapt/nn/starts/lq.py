r"""LQ-LoRA's start: split a matrix into a quantized and a low-rank part, in turns.

    Q = 0;  repeat:  L1 L2 = the best rank-r part of W - Q;   Q = quantize(W - L1 L2)

The error ||W - Q - L1 L2|| falls at first and rises in the end, since quantizing is no projection: the scales move with
what is quantized. What is returned is the best turn's Q with the L1 and L2 that it was made for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quadapt.errors import CalibrationError, ConfigError
from quadapt.nn.starts.base import STARTS, Begun, Quantize, Start, folded
from quadapt.nn.starts.fit import randomized_svd
from quadapt.quant.fixed import mean, one_thread, total
from quadapt.quant.grids import as_float
from quadapt.quant.rounding import Statistics
from quadapt.setting import setting

OVERSAMPLED = 10
"""Directions beyond the rank that the randomized SVD follows (LQ-LoRA's code)."""

POWER_ITERATIONS = 2
"""How many power iterations the randomized SVD makes (torch's default)."""

SMALLEST_WEIGHT = 1e-6
"""Smallest root of a row's or column's mean Fisher information, relative to the mean of these roots."""


@STARTS.register("lq")
@dataclass(frozen=True, kw_only=True)
class LQ(Start):
    """Alternating low-rank and quantized parts, of which the best pair is kept.

    With Fisher information `F` `[out, in]` the low-rank step minimizes `||D_row (W - Q - L1 L2) D_col||`, with
    `D_row = sqrt(mean of a row of F)` and `D_col` likewise: the optimum of `||sqrt(F) * (W - Q - L1 L2)||` where `F`
    has rank one, and a bound's elsewhere. Quantizing stays as it is; which turn is best is judged with `F` itself.

    Source: LQ-LoRA (Guo et al. 2024, arXiv 2311.12023) sections 3.1 and 3.4, algorithms 1 and 2; means before roots as
        in its code.
    Differs: its code returns the last turn, by then worse, where the paper asks for the best. Rows and columns without
        any Fisher information are weighted a millionth of the average, not zero, by which its code would divide.
        The random directions of the SVD come from `seed`, and later turns start from those of the turn before.
    """

    summary: ClassVar[str] = "a decomposition of the matrix into codes and a low-rank term"
    shared: ClassVar[bool] = True

    iterations: int = 100
    """The most turns that are taken; fewer are if a turn is no better than the one before."""

    fisher: bool = setting(panel="Adapter", default=False)
    """Weight errors by the diagonal Fisher information of the full-precision model on the calibration text."""

    tolerance: float = 0.0
    """The search also ends with a turn that lowers the error by less than this share. 0, as in the paper: any gain
    counts."""

    seed: int = 0
    """The seed of the random directions in which the SVD starts to look."""

    def shortened(self, turns: int, tolerance: float, *, fisher: bool) -> LQ:
        return replace(self, iterations=min(turns, self.iterations), tolerance=tolerance, fisher=fisher)

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigError(f"iterations={self.iterations}: LQ-LoRA needs at least one. Use 1 to 100")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance={self.tolerance} is not a share. Use 0 (as the paper), or 0.01, say")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # it depends on a setting
        return frozenset({"fisher"}) if self.fisher else frozenset()

    def __call__(
        self, weight: Tensor, quantize: Quantize, rank: int, statistics: Statistics, *, pooled: bool = False
    ) -> Begun:
        information = self._information(weight, statistics)
        if rank < 1:
            return Begun(quantize(weight))
        if pooled:
            base = quantize(weight)
            return folded(base, weight.double() - base.dequantize().double(), None)
        dense = as_float(weight)
        sides = scaling_of(information) if information is not None else None
        best, least, directions, rest = None, float("inf"), None, dense
        for _ in range(self.iterations):
            up, down, directions = low_rank(rest, rank, sides=sides, seed=self.seed, directions=directions)
            quantized = quantize(torch.addmm(dense, up, down, alpha=-1))
            rest = dense - quantized.dequantize()
            error = squared_error(rest, up, down, information) ** 0.5
            if error < least:
                best = Begun(quantized, (up.float(), down.float()))
            if not error < least * (1 - self.tolerance):
                break
            least = error
        assert best is not None, "an error was not finite, which quantize refuses"
        return best

    def _information(self, weight: Tensor, statistics: Statistics) -> Tensor | None:
        if not self.fisher:
            return None
        found = statistics.get("fisher")
        if found is None:
            raise CalibrationError("LQ-LoRA with fisher=True needs Fisher information of the layer. Give training text")
        if found.shape != weight.shape:
            raise CalibrationError(
                f"Fisher information is {tuple(found.shape)}, the weight {tuple(weight.shape)}: it is of another model"
            )
        if not bool(torch.isfinite(found).all() & (found >= 0).all()):
            raise CalibrationError("Fisher information is negative, NaN or infinite. Gather it again, in float32")
        return found.to(weight.device)


def scaling_of(information: Tensor) -> tuple[Tensor, Tensor]:
    """`D_row` `[out, 1]` and `D_col` `[1, in]` of Fisher information `[out, in]`, never zero, about 1 on average.

    Only ratios matter: the factors are those of `c * information` for any `c > 0`.
    """
    whole = mean(information)
    if float(whole) == 0:
        return information.new_ones(len(information), 1), information.new_ones(1, information.shape[1])
    rows, columns = ((information.mean(axis, keepdim=True, dtype=torch.float64) / whole).sqrt() for axis in (1, 0))
    sides = (side.clamp_min(SMALLEST_WEIGHT * mean(side)).to(as_float(information).dtype) for side in (rows, columns))
    return next(sides), next(sides)


def low_rank(
    matrix: Tensor,
    rank: int,
    *,
    sides: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    directions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The best approximation of `matrix` by `up @ down`, the singular values shared out between both.

    Args:
        matrix: Float32 or float64 `[out, in]`.
        rank: The rank of the product; where the matrix has less, the rest is zero.
        sides: Weights of rows `[out, 1]` and columns `[1, in]`: `||D_row (matrix - up @ down) D_col||` is least.
        seed: That of the randomized SVD, for matrices whose sides are over four times the directions it follows;
            others are decomposed exactly.
        directions: Row space to start from `[in, rank + 10]`, if a similar matrix has been decomposed.

    Returns:
        `up` `[out, rank]`, `down` `[rank, in]`, and the directions for the next similar matrix (None for exact SVDs).
    """
    scaled = matrix if sides is None else sides[0] * matrix * sides[1]
    followed = rank + OVERSAMPLED
    if min(matrix.shape) <= 4 * followed:
        with one_thread():
            U, S, Vh = torch.linalg.svd(scaled, full_matrices=False)
        found = None
    else:
        U, S, Vh = randomized_svd(
            scaled, followed, seed=seed, directions=directions, power=POWER_ITERATIONS if directions is None else 1
        )
        found = Vh.T
    kept = min(rank, len(S))
    root = S[:kept].sqrt()
    up, down = U[:, :kept] * root, root[:, None] * Vh[:kept]
    if sides is not None:
        up, down = up / sides[0], down / sides[1]
    missing = rank - kept
    if missing:
        up, down = torch.nn.functional.pad(up, (0, missing)), torch.nn.functional.pad(down, (0, 0, 0, missing))
    return up, down, found


def squared_error(rest: Tensor, up: Tensor, down: Tensor, information: Tensor | None) -> float:
    """`||sqrt(F) * (rest - up @ down)||^2`, all weights 1 without Fisher information; summed in float64."""
    missed = torch.addmm(rest, up, down, alpha=-1).square_()
    if information is not None:
        missed *= information
    return float(total(missed))
