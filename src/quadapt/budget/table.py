"""What each way to hold a matrix costs in error: the table that a plan is made from.

NormalFloat has 288 ways, and LQ-LoRA decomposes the matrix anew for each. How scales are held hardly moves the low-rank
part, so here the matrix is decomposed once for each width and group, with exact scales; the 24 forms of these scales
are then tried on the same remainder. First on a sample of its rows: a form that another beats clearly there, in no more
bits, is left out. The others are measured on the whole matrix.
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
from quadapt.nn.starts import LQ, Begun, Start, Zero
from quadapt.nn.starts.lq import squared_error
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import (
    Nearest,
    ScaleUnderflow,
    Statistics,
    find_grid,
    implied_offsets,
    row_chunks,
)
from quadapt.quant.storage import Linear, Storage, through
from quadapt.quant.weight import Layout

TURNS = 5
"""Turns of LQ-LoRA's decomposition for the table, at most: errors rank alike long before they stop falling."""

TOLERANCE = 0.01
"""A turn that lowers the error by less than this share is the last, for the table."""

SAMPLED = 16
"""One in so many rows is in the sample, .."""

FEWEST = 64
""".. but at least so many rows."""

GAIN = 1e-3
"""By what share a form must lower the error on the sample, against all that take no more bits, to be measured in full.
An optimum may lose this share of its error by that, and the sum over the matrices no more."""


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
        weight: Float `[out, in]`.
        ways: Those to measure, see `candidates`.
        method: Its start decides what is measured: for `lq-lora` the error of both parts together, else that of
            quantizing, to nearest with the method's range (GPTQ is not run).
        rank: Of the low-rank part; 0 for none.
        statistics: `fisher` `[out, in]` to weight squared errors with, if there is some.

    Returns:
        Options in the order of `ways`; bits are those of the matrix alone.

    Raises:
        ShapeError: No way can hold the matrix, or it is not finite.
    """
    start, rounding = table_start(method, "fisher" in statistics), table_rounding(method)
    shared = isinstance(start, (Zero, LQ)) and all(Linear.of(way.storage.scales) for way in ways)
    table = _Table(weight.float().contiguous(), start, rounding, rank, statistics)
    found = table.shared(ways) if shared else table.each(ways)
    if not found:
        raise ShapeError("no grid can hold these weights: fp16 scales underflow or overflow. Skip the layer")
    return found


def table_start(method: Method, fisher: bool) -> Start:
    """The method's start as the table runs it: fewer turns, and weighted as the errors are."""
    if isinstance(method.start, LQ):
        turns = min(TURNS, method.start.iterations)
        return replace(method.start, iterations=turns, tolerance=TOLERANCE, fisher=fisher)
    return method.start


def table_rounding(method: Method) -> Nearest:
    """The method's rounding to nearest."""
    if isinstance(method.rounding, Nearest):
        return method.rounding
    return Nearest(range=method.rounding.range) if isinstance(method.rounding, GPTQ) else Nearest()


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
        """Start once for each grid; try the forms of scales on what remains for the codes."""
        grids: dict[object, list[Candidate]] = {}
        for way in ways:
            grids.setdefault(way.format, []).append(way)
        rough: list[Option] = []
        remainders: dict[object, _Remainder] = {}
        for format, forms in grids.items():
            remainders[format] = remainder = self._remainder(forms[0])
            sample = remainder.sample()
            for way in forms:
                error = remainder.error(way, sample)
                if error is not None:
                    rough.append(Option(way, way.layout(*self.weight.shape).bits, error))
            remainder.release()
        kept = _plausible(rough)
        options = []
        for format, forms in grids.items():
            wanted = [way for way in forms if way in kept]
            if wanted:
                options += remainders[format].measure(wanted, self.weight)
        return options

    def _begin(self, layout: Layout) -> Begun:
        return self.start(self.weight, lambda dense: self.rounding(dense, layout), self.rank, self.statistics)

    def _remainder(self, way: Candidate) -> _Remainder:
        """What is left for the codes of a grid once the low-rank part is taken off, with exact scales."""
        offsets = "fp32" if way.storage.offsets in ("fp16", "fp32", "double") else way.storage.offsets
        layout = replace(way.layout(*self.weight.shape), storage=Storage(scales="fp32", offsets=offsets))
        factors = self._begin(layout).factors if self.rank and not isinstance(self.start, Zero) else None
        return _Remainder(self.weight, factors, layout, self.rounding, self.statistics.get("fisher"))


class _Remainder:
    """A matrix without its low-rank part, and the scales of its groups. Between uses it keeps the factors alone."""

    def __init__(
        self,
        weight: Tensor,
        factors: tuple[Tensor, Tensor] | None,
        layout: Layout,
        rounding: Nearest,
        fisher: Tensor | None,
    ) -> None:
        self.factors, self.layout, self.rounding, self.fisher = factors, layout, rounding, fisher
        self.rest: Tensor | None = None
        self._make(weight)
        self.scales, self.offsets = find_grid(self._made(), layout, rounding.range)

    def _make(self, weight: Tensor) -> None:
        self.rest = weight if self.factors is None else torch.addmm(weight, *self.factors, alpha=-1)

    def _made(self) -> Tensor:
        assert self.rest is not None
        return self.rest

    def release(self) -> None:
        """Forget the dense remainder."""
        self.rest = None

    def sample(self) -> Tensor:
        """Rows on which the forms of scales are compared first: evenly spaced."""
        rows = len(self._made())
        count = min(rows, max(FEWEST, rows // SAMPLED))
        return torch.linspace(0, rows - 1, count, device=self.scales.device).round().long()

    def measure(self, ways: Sequence[Candidate], weight: Tensor) -> list[Option]:
        """Errors on the whole matrix."""
        self._make(weight)
        found = []
        for way in ways:
            error = self.error(way, None)
            assert error is not None
            found.append(Option(way, way.layout(self.layout.out, self.layout.columns).bits, error))
        self.release()
        return found

    def error(self, way: Candidate, rows: Tensor | None) -> float | None:
        """Squared error with scales held as `way` says, on some rows or all; None if it cannot hold them."""
        linear, rest = Linear.of(way.storage.scales), self._made()
        if linear and linear.constant == "fp16" and not _fits_fp16(self.scales):
            return None
        layout = way.layout(self.layout.out, self.layout.columns)
        scales = through(self.scales, way.storage.scales, centre=True)
        offsets = None if self.offsets is None else through(self.offsets, way.storage.offsets, centre=False)
        stored = scales, implied_offsets(layout, scales, offsets)
        exact = self.scales, implied_offsets(layout, self.scales, self.offsets)
        against = stored if self.rounding.code_against == "stored" else exact
        parts = [rows] if rows is not None else row_chunks(rest)
        return sum(self._missed(rest, layout, part, against, stored) for part in parts)

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
            return float(kernel.group_error(part, *of(stored), table, format.bits, width).sum(dtype=torch.float64))
        packed = kernel.encode(part, *of(against), table, format.bits, width)
        rounded = kernel.dequantize(packed, *of(stored), table, format.bits, width, layout.columns, torch.float32)
        missed = (part - rounded).square_()
        if self.fisher is not None:
            missed *= self.fisher[rows]
        return float(missed.sum(dtype=torch.float64))


def _fits_fp16(scales: Tensor) -> bool:
    """Whether fp16 constants hold such scales, with room for those that a full decomposition ends in."""
    largest = float(scales.max())
    return 2.0**-16 < largest < torch.finfo(torch.float16).max / 4


def _plausible(rough: Sequence[Option]) -> set[Candidate]:
    """Ways that are better by `GAIN` than any that takes no more bits."""
    best, kept = float("inf"), set()
    for option in sorted(rough, key=lambda each: (each.bits, each.error)):
        if option.error < best * (1 - GAIN):
            kept.add(option.candidate)
            best = option.error
    return kept or {option.candidate for option in rough}
