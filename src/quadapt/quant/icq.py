r"""Information calibration quantization (IR-QLoRA, Qin et al. 2024, arXiv:2402.05445, section 3.2): grids by entropy.

A group's codes carry `H = -sum_c p_c log2 p_c` bits each (eq. 6), `p_c` the share of code `c`. Two searches raise it,
both values of `range` of a rounding:

* icq, the paper's: subtract `tau` before rounding, and add it back, `W = s * levels[codes] + tau`. Of `2 n + 1` shifts
  `median + f * max|w - median|`, `f` evenly spaced in `+-lambda * sigma`, the one of highest entropy is taken.
* icq-scale, that of the authors' code for integers: both ends of a group's range are scaled by one factor.

Differs: sigma is the code's 0.5411 (the standard deviation of NormalFloat's weights over their largest), where the text
    says 1: the entropies that the paper reports are those of the former. Zero is a candidate too, so that no group has
    less entropy than without a shift. Ties go to the shift nearest to the median, not to the lowest. icq serves
    integers too, with levels symmetric about the shift; icq-scale has a bound on the error (`GUARD`). Codes may be
    made against scales and shifts as they are stored (`code_against="stored"`, the preset's), where the authors' are
    against the exact ones: doubly quantized, normal weights then keep 3.755 of 3.764 bits, at 0.15 % less error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from scipy.special import ndtri
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels.entropy import entropy_shift, group_crowding
from quadapt.kernels.reference import midpoints
from quadapt.quant.format import DELTA, Format
from quadapt.quant.grids import by_scale, implied_offsets, rounded, spanning, squared_error, where
from quadapt.quant.ranges import RANGES, Range
from quadapt.quant.weight import Layout

STEPS = 100
"""Candidates on either side of the median (the paper's n)."""

LAMBDA = 0.1
"""Reach of the candidates, in standard deviations."""

SIGMA = 1 / float(ndtri(DELTA))
"""Standard deviation of a group's weights over the largest, if NormalFloat's assumption holds: 0.541087."""

FACTORS = tuple(1 + 0.1 * step / 50 for step in sorted(range(-50, 51), key=lambda step: (abs(step), step)) if step)
"""Factors of a range, besides 1: within a tenth of it, the nearest first."""

GUARD = 1.1
"""A scaled range may have this many times the squared error of the whole one, and no more.

More entropy is not less error, and GPTQ hands errors on. For normal weights in int4 groups of 32, entropy rises by
0.075 bits under this bound, at the error of the whole range; without a bound by 0.11, at 14 % more error.
"""


@cache
def fractions() -> Tensor:
    """The candidates `f`, float64 `[2 * STEPS + 1]`, ascending, with zero in the middle."""
    return torch.arange(-STEPS, STEPS + 1, dtype=torch.float64) * (LAMBDA * SIGMA / STEPS)


def shifted_range(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Ends of a range symmetric about the best shift, which no weight exceeds.

    Args:
        weight: Float32 or float64 `[rows, in]`, finite.
        format: The format, whose levels decide what codes there are.

    Returns:
        `tau - s` and `tau + s`, `[rows, groups]`, in the dtype of `weight`.
    """
    levels = format.table(weight)
    if levels is None:
        levels = torch.linspace(-1, 1, 2**format.bits, dtype=torch.float64, device=weight.device)
    else:  # from -1 to 1, as the range that they are to span
        least, most = format.ends
        levels = (levels - (most + least) / 2) / ((most - least) / 2)
    tau, reach = entropy_shift(weight, midpoints(levels), fractions(), format.width(weight.shape[1]))
    return tau - reach, tau + reach


@RANGES.register("icq")
@dataclass(frozen=True, kw_only=True)
class ICQ(Range):
    """Levels symmetric about the shift whose codes have the highest entropy (the paper's search)."""

    summary: ClassVar[str] = "symmetric about the shift of highest entropy (needs zero float)"

    def check(self, format: Format) -> None:
        if format.zero != "float":
            raise ConfigError(
                f"range='icq' shifts each group, and {format.name} has no free offsets. Use zero='float'"
                + (", or range='icq-scale'" if format.levels == "int" else "")
            )

    def ends(self, weight: Tensor, low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        return shifted_range(weight, layout.format)


@RANGES.register("icq-scale")
@dataclass(frozen=True, kw_only=True)
class ICQScale(Range):
    """The range times the factor whose codes have the highest entropy (the authors' code for integers)."""

    summary: ClassVar[str] = "scaled for the highest entropy of codes (integers)"

    def check(self, format: Format) -> None:
        if format.levels != "int":
            raise ConfigError(
                f"range='icq-scale' scales the span of integers, and {format.name} has no such. Use range='icq' with "
                "zero='float'"
            )

    def __call__(self, weight: Tensor, low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        kept, kept_offsets = rounded(layout.storage, *spanning(low, high, layout))
        best = _crowding(weight, layout, kept, kept_offsets)
        bound = GUARD * by_scale(squared_error(weight, layout, kept, kept_offsets), layout)
        for factor in FACTORS:
            tried, tried_offsets = rounded(layout.storage, *spanning(low * factor, high * factor, layout))
            crowding = _crowding(weight, layout, tried, tried_offsets)
            error = by_scale(squared_error(weight, layout, tried, tried_offsets), layout)
            better = (crowding < best) & (error <= bound)
            best = torch.where(better, crowding, best)
            kept, kept_offsets = where(better, tried, tried_offsets, kept, kept_offsets)
        return kept, kept_offsets


def _crowding(weight: Tensor, layout: Layout, scales: Tensor, offsets: Tensor | None) -> Tensor:
    format, shift = layout.format, implied_offsets(layout, scales, offsets)
    found = group_crowding(weight, scales, shift, format.bits, format.width(weight.shape[1]))
    return by_scale(found, layout)
