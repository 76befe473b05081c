r"""The range of least squares: scales and offsets that fit the weights, given the codes to which these are rounded.

For the codes `c` of a group with levels `t = levels[c]`, the scale and the offset of least squared error are those of a
line through the points `(t, w)`:

    s = cov(t, w) / var(t),    b = mean(w) - s * mean(t)

and with an offset of `s` times a constant (symmetric, whole zero-points), `s = sum(t w) / sum(t t)`. Several spans are
tried for the codes, as llama.cpp's quantizer of K-quants does; the fit for which rounding anew errs least is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quadapt.kernels import kernels_for, pool
from quadapt.quant.grids import implied_offsets, rounded, spanning, squared_error, where
from quadapt.quant.ranges import RANGES, Range
from quadapt.quant.weight import Layout

FACTORS = tuple(1.1 - 0.5 * step / 19 for step in range(20))
"""Factors of a group's span for which codes are made, from 1.1 to 0.6."""

TURNS = 2
"""Times that codes are made anew with the best fit, and the fit with these codes."""


@RANGES.register("least-squares")
@dataclass(frozen=True, kw_only=True)
class LeastSquares(Range):
    """The scale and offset of least squared error for the codes, which are those of 20 spans in turn, then of the fit.

    Source: the search of llama.cpp's `make_qkx2_quants` and `make_qx_quants`.
    Differs: the error is not weighted. Offsets that K-quants must not have above zero are then zero, as there.
    """

    summary: ClassVar[str] = "what fits the rounded weights best"

    def __call__(self, weight: Tensor, low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        kept, kept_offsets = rounded(layout.storage, *spanning(low, high, layout))
        best = squared_error(weight, layout, kept, kept_offsets)
        w_sums = _sums(weight, layout.format.width(weight.shape[1]))
        for factor in (*FACTORS, *TURNS * (None,)):
            begun = (kept, kept_offsets) if factor is None else spanning(low * factor, high * factor, layout)
            tried, tried_offsets = fitted(weight, layout, *rounded(layout.storage, *begun), w_sums)
            error = squared_error(weight, layout, tried, tried_offsets)
            better = error < best
            best = torch.where(better, error, best)
            kept, kept_offsets = where(better, tried, tried_offsets, kept, kept_offsets)
        return kept, kept_offsets


def fitted(
    weight: Tensor, layout: Layout, scales: Tensor, offsets: Tensor | None, w_sums: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets `[rows, groups]` of least squared error for the codes that given ones make, as stored.

    Args:
        weight: Float32 or float64 `[rows, in]`.
        layout: The layout, whose storage rounds what is found.
        scales: Scales that make the codes, `[rows, groups]`.
        offsets: What is stored for offsets: offsets, whole zero-points, which stay, or None.
        w_sums: The sum of each group's weights, float64 `[rows, groups]`, if it is known.
    """
    format, storage = layout.format, layout.storage
    bits, width, columns = format.bits, format.width(weight.shape[1]), weight.shape[1]
    table, shift = format.table(weight), implied_offsets(layout, scales, offsets)
    kernel, ones = kernels_for(weight.device), weight.new_ones(len(weight), 1)
    packed = kernel.nearest_codes(weight, scales, shift, table, bits, width)
    t = kernel.dequantize(packed, ones, None, table, bits, columns, columns, weight.dtype)
    counts = _sums(weight.new_ones(1, columns), width)
    whole = table is None and width * (2**bits - 1) ** 2 < 2**24
    t_sums, squares = (_sums(each, width, whole=whole) for each in (t, t * t))
    w_sums = _sums(weight, width) if w_sums is None else w_sums
    products = _sums(t * weight, width)
    if offsets is None or not storage.of_offsets.free:  # about the level that stands for zero
        middle = 0.0 if table is not None else 2.0 ** (bits - 1) if offsets is None else offsets.double()
        squares, products = squares - middle * (2 * t_sums - middle * counts), products - middle * w_sums
        found = torch.where(squares > 0, products / squares.clamp_min(1e-300), 0)
        return storage.of_scales.rounded(_usable(found, scales, signed=storage.of_scales.signed)), offsets
    variance, covariance = squares - t_sums * t_sums / counts, products - t_sums * w_sums / counts
    found = torch.where(variance > 0, covariance / variance.clamp_min(1e-300), 0)
    if storage.of_offsets.never_positive:  # the line goes through zero where the best offset is above it
        above = w_sums - found * t_sums > 0
        found = torch.where(above & (squares > 0), products / squares.clamp_min(1e-300), found)
    kept = storage.of_scales.rounded(_usable(found, scales, signed=False))
    return kept, storage.of_offsets.rounded(((w_sums - kept.double() * t_sums) / counts).to(scales.dtype))


def _usable(found: Tensor, before: Tensor, *, signed: bool) -> Tensor:
    """Scales that were found, or those before where they are zero, or negative though they must not be."""
    found = found.to(before.dtype)
    return torch.where((found != 0) if signed else (found > 0), found, before)


def _sums(values: Tensor, width: int, *, whole: bool = False) -> Tensor:
    """Sums over the groups of each row, `[rows, in]` to float64 `[rows, groups]`.

    Args:
        values: float32 or float64.
        width: How many weights a full group has.
        whole: Whether they are whole numbers whose sums are exact in their own dtype.
    """
    return pool(values if whole else values.double(), width).double()
