r"""GPTQ: round column by column, and move each column's error onto the columns not yet rounded.

With `H = X^T X / n` (the layer's second moment) it greedily lowers `||(W - Q) X^T||^2`. `U` is the upper Cholesky
factor of the damped inverse of `H`; after column `i` is rounded, its error over `U[i, i]`, times row `i` of `U`, is
taken from the later columns. Columns are worked on group by group (a group's scale is chosen from its columns as they
then are), and the errors of 128 columns are handed to the rest of the matrix in one product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quadapt.errors import CalibrationError, ConfigError, ShapeError
from quadapt.kernels import kernels_for, pack
from quadapt.quant.fixed import cholesky, inverse_of_lower, mean
from quadapt.quant.grids import as_float, check_choice, implied_offsets, rounded
from quadapt.quant.ranges import RANGES
from quadapt.quant.rounding import (
    ROUNDINGS,
    Nearest,
    Rounding,
    Statistics,
    check_finite,
    check_grid,
    codes_of_zero,
    find_grid,
    real_codes,
)
from quadapt.quant.weight import Layout, QuantWeight


@ROUNDINGS.register("gptq")
@dataclass(frozen=True, kw_only=True)
class GPTQ(Rounding):
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323, Algorithm 1) for any levels.

    Differs: a group's scale is chosen from columns that carry all errors so far; the authors' code uses, for groups
        smaller than its block of 128, columns that still lack the errors of the block at hand.
    """

    summary: ClassVar[str] = "calibrated column by column"
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    damping: float = 0.01
    """Added to the diagonal of the second moment, as a fraction of its mean."""

    block: int = 128
    """Columns whose errors are handed to the rest of the matrix in one product. Changes speed, not the result."""

    range: str = "minmax"
    """How a group's span is chosen, as in `Nearest`."""

    act_order: bool = False
    """Round the columns of largest second moment first. Stores an input permutation, which block formats cannot hold.
    """

    static_groups: bool = False
    """Choose all scales from the original weights, before any error has moved. Double-quantized scales need it."""

    true_sequential: bool = True
    """Within a block too, calibrate each layer on the already quantized layers before it (k, q, v; then o; then gate,
    up; ..)."""

    def without_data(self) -> Nearest:
        return Nearest(range=self.range)

    def check(self, layout: Layout) -> None:
        super().check(layout)
        check_choice("range", self.range, tuple(RANGES))
        RANGES[self.range]().check(layout.format)
        if not 0 < self.damping < 1:
            raise ConfigError(f"damping={self.damping} is not between 0 and 1. The paper uses 0.01")
        if layout.storage.together is None and not self.static_groups:
            raise ConfigError(
                "GPTQ chooses scales as it goes, double quantization needs them all at once. "
                "Use static_groups=True, or fp16 scales and offsets"
            )

    def __call__(self, weight: Tensor, layout: Layout, statistics: Statistics) -> QuantWeight:
        return self._quantized(weight, layout, statistics, None)

    def with_real_codes(self, weight: Tensor, layout: Layout, statistics: Statistics) -> tuple[QuantWeight, Tensor]:
        compensated = torch.empty_like(as_float(weight))
        quantized = self._quantized(weight, layout, statistics, compensated)
        return quantized, real_codes(compensated, quantized)

    def _quantized(
        self, weight: Tensor, layout: Layout, statistics: Statistics, compensated: Tensor | None
    ) -> QuantWeight:
        """The quantized weight; `compensated` is filled with what was rounded, in stored order, if it is given."""
        self.check(layout)
        if "second_moment" not in statistics:
            raise CalibrationError(
                "GPTQ needs second moments of the layer's inputs. Give calibration data (--calibration-data)"
            )
        moment = statistics["second_moment"]
        if tuple(moment.shape) != (layout.columns, layout.columns):
            raise ShapeError(f"second_moment is {tuple(moment.shape)}, the layer has {layout.columns} inputs")
        if tuple(weight.shape) != (layout.out, layout.columns):
            raise ShapeError(f"the weight is {tuple(weight.shape)}, its layout {(layout.out, layout.columns)}")
        work = as_float(weight.detach()).clone()
        check_finite(work)
        work[:, moment.diagonal() == 0] = 0  # dead inputs: what they hold must not widen their group's range
        perm = None
        if self.act_order:
            order = torch.argsort(moment.diagonal(), descending=True, stable=True)
            work, moment, perm = work[:, order].contiguous(), moment[order][:, order], torch.argsort(order)
        upper = inverse_factor(moment.to(work.dtype), self.damping)
        quantized = self._round(work, upper, replace(layout, permuted=self.act_order), perm)
        if compensated is not None:  # `work` now holds each column's error over the diagonal
            dense = quantized.decode(quantized.operand("offsets"), compensated.dtype)
            torch.addcmul(dense, work, upper.diagonal(), out=compensated)
        return quantized

    def _round(self, work: Tensor, upper: Tensor, layout: Layout, perm: Tensor | None) -> QuantWeight:
        """Round `work`, whose columns are in stored order; on return it holds errors over the diagonal of `upper`."""
        kernel, bits, table = kernels_for(work.device), layout.format.bits, layout.format.table(work)
        grid = _Grid(layout, work, self.range, static=self.static_groups or layout.groups == 1)
        codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
        for start, stop in _spans(0, layout.columns, self._block(layout)):
            for first, last in _spans(start, stop, layout.format.width(layout.columns)):
                scale, offset = grid.choose(work, first, last)
                part, rest = slice(first, last), slice(last, stop)
                errors = work[:, part].contiguous()
                codes[:, part] = kernel.compensate(errors, upper[part, part].contiguous(), scale, offset, table, bits)
                work[:, part] = errors
                work[:, rest] -= errors @ upper[part, rest]
            work[:, stop:] -= work[:, start:stop] @ upper[start:stop, stop:]
        grid.check()
        return QuantWeight.build(layout, pack(codes, bits), grid.scales, grid.offsets, perm)

    def _block(self, layout: Layout) -> int:
        """Whole runs of the groups that are stored together, about `block` columns; a whole row is cut anywhere.

        At the first column of a run all of its columns must carry all errors so far, for then its grids are chosen.
        """
        run = layout.format.width(layout.columns) * (1 if self.static_groups else layout.storage.together or 1)
        return self.block if layout.groups == 1 else max(1, self.block // run) * run


class _Grid:
    """Scales and offsets of one matrix, chosen all at once, or as the columns are reached.

    Then group by group, or for a whole super-block of groups where these are stored together.
    """

    def __init__(self, layout: Layout, weight: Tensor, range_: str, *, static: bool) -> None:
        self.layout, self.range, self.static = layout, range_, static
        self._chosen: list[tuple[Tensor, Tensor | None]] = []
        shape = (weight.shape[0], layout.groups)
        self.scales = weight.new_empty(shape)
        self.offsets = None if layout.format.zero == "none" else weight.new_empty(shape)
        if static:
            self._keep(slice(None), *find_grid(weight, layout, range_))
            plain, empty = replace(layout, permuted=False), codes_of_zero(layout, weight)
            self._stored = QuantWeight.build(plain, empty, self.scales, self.offsets)

    def _keep(self, groups: slice, scales: Tensor, offsets: Tensor | None) -> None:
        self.scales[:, groups], self.offsets = scales, self.offsets
        if self.offsets is not None and offsets is not None:
            self.offsets[:, groups] = offsets

    def choose(self, work: Tensor, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """Scale and offset `[out]` of columns `first` to `last`, as they will be stored."""
        group = first // self.layout.format.width(self.layout.columns)
        if self.static:
            scales, offsets = self._stored.scales, self._stored.offsets
            return scales[:, group], None if offsets is None else offsets[:, group]
        run = self.layout.storage.together or 1
        if group % run == 0:
            exact = find_grid(work[:, first : first + run * (last - first)], self.layout, self.range, check=False)
            self._chosen.append(exact)
            self._keep(slice(group, group + run), *rounded(self.layout.storage, *exact))
        zero = None if self.offsets is None else self.offsets[:, group]
        return self.scales[:, group], implied_offsets(self.layout, self.scales[:, group], zero)

    def check(self) -> None:
        """Raise ShapeError if what was chosen group by group cannot be stored: in the end, since a GPU waits for it."""
        if self._chosen:
            offsets = [offset for _, offset in self._chosen if offset is not None]
            scales = torch.cat([scale for scale, _ in self._chosen], 1)
            check_grid(scales, torch.cat(offsets, 1) if offsets else None, self.layout.storage)


def inverse_factor(second_moment: Tensor, damping: float) -> Tensor:
    """Upper `U` with `U^T U` the inverse of the damped second moment.

    By factoring the matrix with its axes reversed, which needs neither the inverse nor a second factorization.

    Raises:
        CalibrationError: It has NaN or infinite entries, or is not positive definite after damping.
    """
    moment = second_moment.clone()
    if not bool(torch.isfinite(moment).all()):
        raise CalibrationError(
            "the second moment of the inputs has NaN or infinite entries. The model overflows on this data; "
            "calibrate in float32 (--dtype float32)"
        )
    diagonal = moment.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += (damping * mean(diagonal)).to(moment.dtype)
    lower, found = cholesky(moment.flip(0, 1))
    if not found:
        raise CalibrationError(
            f"the second moment is not positive definite with damping={damping}. Use more calibration "
            "sequences, or a larger damping"
        )
    return inverse_of_lower(lower).flip(0, 1)


def _spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
