"""What each way to hold a matrix costs in error: the table that a plan is made from.

NormalFloat has 288 ways, and LQ-LoRA decomposes the matrix anew for each. Here it is decomposed once for each width and
group, with exact scales. From there another turn is made for each width of scales: coarse ones leave errors that the
low-rank part can make up for, up to half of them. The six forms of such scales, which differ little, are tried on
the same remainder: first on a sample of its rows, where a form that is no better than another in no more bits is left
out. The others are measured on the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quadapt.budget.candidates import Candidate
from quadapt.budget.program import Option
from quadapt.errors import ShapeError
from quadapt.kernels import kernels_for
from quadapt.methods import Method
from quadapt.nn.starts import LQ, Begun, Start
from quadapt.nn.starts.lq import low_rank, scaling_of, squared_error
from quadapt.quant.fixed import total
from quadapt.quant.format import Format
from quadapt.quant.grids import implied_offsets
from quadapt.quant.rounding import (
    Nearest,
    ScaleUnderflow,
    Statistics,
    find_grid,
    row_chunks,
)
from quadapt.quant.storage import Linear, Storage
from quadapt.quant.weight import Layout

TURNS = 5
"""Turns of LQ-LoRA's decomposition for the table, at most: errors rank alike long before they stop falling."""

TOLERANCE = 0.01
"""A turn that lowers the error by less than this share is the last, for the table."""

MORE_TURNS = 1
"""Further turns for scales of 2, 3 and 4 bits, from where those for exact scales ended."""

SAMPLED = 8
"""One in so many rows is in the sample, .."""

FEWEST = 128
""".. but at least so many rows."""

GAIN = 1e-3
"""A form is measured in full only if on the sample it lowers the error by this share, against all forms that take no
more bits. An optimum may lose about this share of its error by that, and what the sample is off by."""

Factors = tuple[Tensor, Tensor]
"""`up` `[out, rank]` and `down` `[rank, in]`."""

_Family = tuple[Format, int]
"""Ways with the same grid and the same width of scales."""


def measure(
    weight: Tensor,
    ways: Sequence[Candidate],
    method: Method,
    *,
    rank: int,
    statistics: Statistics = {},  # noqa: B006
) -> list[Option]:
    """Bits and error of ways to hold a matrix; of ways that cannot be on the front of both, not all are listed.

    Args:
        weight: The dense matrix, float `[out, in]`.
        ways: The ways to measure, see `candidates`.
        method: The method, whose start decides what is measured: for `lq-lora` the error of both parts, else that of
            quantizing, to nearest with the method's range (GPTQ is not run).
        rank: The rank of the low-rank part; 0 for none.
        statistics: `fisher` `[out, in]` to weight squared errors with, if there is some.

    Returns:
        Options in the order of `ways`; bits are those of the matrix alone.

    Raises:
        ShapeError: No way can hold the matrix, or it is not finite.
    """
    start, rounding = table_start(method, "fisher" in statistics), method.rounding.without_data()
    shared = start.shared and all(isinstance(way.storage.of_scales, Linear) for way in ways)
    table = _Table(weight.float().contiguous(), start, rounding, rank, statistics)
    found = table.shared(ways) if shared else table.each(ways)
    if not found:
        raise ShapeError("no grid can hold these weights: fp16 scales underflow or overflow. Skip the layer")
    return found


def table_start(method: Method, fisher: bool) -> Start:
    """The method's start as the table runs it: fewer turns, and weighted as the errors are."""
    return method.start.shortened(TURNS, TOLERANCE, fisher=fisher)


@dataclass(frozen=True)
class _Table:
    """One matrix, and how it is to be measured."""

    weight: Tensor
    start: Start
    rounding: Nearest
    rank: int
    statistics: Statistics

    def each(self, ways: Sequence[Candidate]) -> list[Option]:
        """Start and round anew for each way."""
        options = []
        for way in ways:
            layout = way.layout(*self.weight.shape)
            try:
                begun = self._begin(layout)
            except ScaleUnderflow:  # this matrix is not for this way
                continue
            rest = self.weight - begun.weight.dequantize()
            up, down = begun.factors or (rest.new_zeros(len(rest), 0), rest.new_zeros(0, rest.shape[1]))
            error = squared_error(rest, up, down, self.statistics.get("fisher"))
            options.append(Option(way, layout.bits, error))
        return options

    def shared(self, ways: Sequence[Candidate]) -> list[Option]:
        """Start once for each grid, go on for each width of scales; try the forms of scales on what remains."""
        families: dict[_Family, list[Candidate]] = {}
        for way in ways:
            families.setdefault((way.format, _scale_bits(way)), []).append(way)
        rough: list[Option] = []
        remainders: dict[_Family, _Remainder] = {}
        exact: dict[Format, Factors | None] = {}
        for (format, bits), forms in families.items():
            if format not in exact:
                exact[format] = self._first(forms[0])
            factors = self._again(exact[format], forms[0], bits)
            layout = forms[0].layout(*self.weight.shape)
            remainder = _Remainder(self.weight, factors, layout, self.rounding, self.statistics.get("fisher"))
            remainders[format, bits] = remainder
            rough += remainder.measure(forms, sampled=True)
        kept = _plausible(rough)
        return [
            option
            for family, forms in families.items()
            for option in remainders[family].measure([way for way in forms if way in kept])
        ]

    def _begin(self, layout: Layout) -> Begun:
        return self.start(self.weight, lambda dense: self.rounding(dense, layout), self.rank, self.statistics)

    def _first(self, way: Candidate) -> Factors | None:
        """The low-rank part for a grid with exact scales."""
        if not self.rank or not self.start.fits:
            return None
        layout = way.layout(*self.weight.shape)
        return self._begin(replace(layout, storage=way.storage.widest())).factors

    def _again(self, factors: Factors | None, way: Candidate, bits: int) -> Factors | None:
        """The low-rank part after more turns with scales of so many bits, which it makes up for if they are coarse.

        At eight bits the scales are as good as exact, and codes of eight bits leave nothing for it to make up for.
        """
        if factors is None or bits == 8 or way.format.bits == 8:
            return factors
        assert isinstance(self.start, LQ)
        storage = replace(way.storage, scales=Linear(bits, 64, "fp32").name)
        layout = replace(way.layout(*self.weight.shape), storage=storage)
        fisher = self.statistics.get("fisher")
        sides = None if fisher is None else scaling_of(fisher)
        up, down = factors
        for _ in range(MORE_TURNS):
            quantized = self.rounding(torch.addmm(self.weight, up, down, alpha=-1), layout)
            rest = self.weight - quantized.dequantize()
            up, down, _ = low_rank(rest, self.rank, sides=sides, seed=self.start.seed)
        return up, down


class _Remainder:
    """A matrix without its low-rank part. Between uses it keeps the factors alone."""

    def __init__(
        self, weight: Tensor, factors: Factors | None, layout: Layout, rounding: Nearest, fisher: Tensor | None
    ) -> None:
        self.weight, self.factors, self.layout = weight, factors, layout
        self.rounding, self.fisher = rounding, fisher

    def measure(self, ways: Sequence[Candidate], *, sampled: bool = False) -> list[Option]:
        """Bits and errors of the ways that can hold it; `sampled`: errors on some rows, evenly spaced."""
        if not ways:
            return []
        rest = self.weight if self.factors is None else torch.addmm(self.weight, *self.factors, alpha=-1)
        plain = replace(self.layout, storage=replace(self.layout.storage, scales="fp32"))
        grid = find_grid(rest, plain, self.rounding.range)
        largest = float(grid[0].max())
        rows: list[Tensor | slice] = list(row_chunks(rest))
        if sampled:
            count = min(len(rest), max(FEWEST, len(rest) // SAMPLED))
            rows = [torch.linspace(0, len(rest) - 1, count, device=rest.device).round().long()]
        found = []
        for way in ways:
            if not _fits(way.storage, largest):
                continue
            layout = way.layout(self.layout.out, self.layout.columns)
            found.append(Option(way, layout.bits, self._error(rest, grid, layout, rows)))
        return found

    def _error(
        self, rest: Tensor, grid: tuple[Tensor, Tensor | None], layout: Layout, rows: Sequence[Tensor | slice]
    ) -> float:
        """Squared error on some rows, with the scales and offsets of `grid` held as `layout` says."""
        scales = layout.storage.of_scales.through(grid[0], centre=True)
        offsets = None if grid[1] is None else layout.storage.of_offsets.through(grid[1], centre=False)
        stored = scales, implied_offsets(layout, scales, offsets)
        exact = grid[0], implied_offsets(layout, *grid)
        against = stored if self.rounding.code_against == "stored" else exact
        return sum(self._missed(rest, layout, part, against, stored) for part in rows)

    def _missed(
        self,
        rest: Tensor,
        layout: Layout,
        rows: Tensor | slice,
        against: tuple[Tensor, Tensor | None],
        stored: tuple[Tensor, Tensor | None],
    ) -> float:
        """Squared error of some rows: coded against some scales and offsets, decoded with the stored ones."""
        format, width = layout.format, layout.format.width(layout.columns)
        part, table, kernel = rest[rows], layout.format.table(rest), kernels_for(rest.device)

        def of(grid: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
            return grid[0][rows], None if grid[1] is None else grid[1][rows]

        if self.fisher is None and against is stored:
            return float(total(kernel.group_error(part, *of(stored), table, format.bits, width)))
        packed = kernel.nearest_codes(part, *of(against), table, format.bits, width)
        rounded = kernel.dequantize(packed, *of(stored), table, format.bits, width, layout.columns, torch.float32)
        missed = (part - rounded).square_()
        if self.fisher is not None:
            missed *= self.fisher[rows]
        return float(total(missed))


def _scale_bits(way: Candidate) -> int:
    linear = way.storage.of_scales
    assert isinstance(linear, Linear)
    return linear.bits


def _fits(storage: Storage, largest: float) -> bool:
    """Whether scales up to `largest` are held well, with room for those that a full decomposition ends in."""
    return all(storage.of_scales.fits_scales(each, each) for each in (largest / 8, largest * 4))


def _plausible(rough: Sequence[Option]) -> set[Candidate]:
    """Ways that are better by `GAIN` than any that takes no more bits."""
    best, kept = float("inf"), set()
    for option in sorted(rough, key=lambda each: (each.bits, each.error)):
        if option.error < best * (1 - GAIN):
            kept.add(option.candidate)
            best = option.error
    return kept or {option.candidate for option in rough}
