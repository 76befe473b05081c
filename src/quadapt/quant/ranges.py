"""Ranges: which span of a group of weights its levels cover. A wide span clips nothing, a narrow one has finer steps.

`MinMax` and `MSE` are here, the two of IR-QLoRA in `icq.py`, a fit in `least_squares.py`. A rounding names its range:
`GPTQ(range="mse")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quadapt.quant.format import Format
from quadapt.quant.grids import by_scale, rounded, spanning, squared_error, where
from quadapt.quant.weight import Layout
from quadapt.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Range:
    """How the span of a group's levels is chosen."""

    summary: ClassVar[str] = ""
    """A few words that say what the range covers, for `--help`."""

    def check(self, format: Format) -> None:
        """Raise ConfigError unless a grid of this format can be chosen in this way."""

    def ends(self, weight: Tensor, low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The ends to begin with, `[rows, groups]`, instead of a group's extremes `low` and `high`."""
        return low, high

    def __call__(self, weight: Tensor, low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets `[rows, groups]`, not rounded to their stored dtype, for what `ends` gave.

        Args:
            weight: Float32 or float64 `[rows, in]`.
            low: Lower ends, `[rows, groups]`.
            high: Upper ends, `[rows, groups]`.
            layout: The layout, whose format decides the kind of grid, and whose storage what of it is kept.
        """
        return spanning(low, high, layout)


RANGES: Registry[type[Range]] = Registry("range", "quadapt.quant")
"""Every range that is known, by name."""


@RANGES.register("minmax")
@dataclass(frozen=True, kw_only=True)
class MinMax(Range):
    """The whole of the group: nothing is clipped."""

    summary: ClassVar[str] = "all of it"


@RANGES.register("mse")
@dataclass(frozen=True, kw_only=True)
class MSE(Range):
    """The part of the group's range with the least squared error: both ends are shrunk alike, in 100 steps to a fifth.

    The search of GPTQ's authors (their option `mse`), with the squared error itself for its norm of 2.4.
    """

    summary: ClassVar[str] = "the part of least squared error"

    def __call__(self, weight: Tensor, low: Tensor, high: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        best = torch.full_like(low, torch.inf)
        kept, kept_offsets = spanning(low, high, layout)
        for shrink in (1 - 0.8 * step / 100 for step in range(100)):
            tried, tried_offsets = rounded(layout.storage, *spanning(low * shrink, high * shrink, layout))
            error = by_scale(squared_error(weight, layout, tried, tried_offsets), layout)
            better = error < best
            best = torch.where(better, error, best)
            kept, kept_offsets = where(better, tried, tried_offsets, kept, kept_offsets)
        return kept, kept_offsets
