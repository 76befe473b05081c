"""Fake quantization in plain torch: any device, float64 too; meant to be read and to be compared with.

A trained quantizer rounds in every step. Its unrounded codes are

    v = (W0 + B @ A - offsets) / scales      over a float base W0
    v = codes + B @ A                        over a base of codes

and the weight is `scales * u + offsets` with `u = clamp(round(v), 0, 2**bits - 1)`. Everything that decides a code is
computed in the dtype of `scales`. `B @ A` is summed over the rank one product after another, each rounded before it is
added: then a code depends neither on the device, nor on threads, nor on how rows are divided.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quadapt.kernels.reference import check_codes, expand, rows_per_chunk, unpack


class Grid(NamedTuple):
    """The whole numbers that describe a trained quantizer."""

    bits: int
    """The width of a code in bits."""

    base_bits: int
    """The width of a code of the base: `bits`, or 8 for fixed point with `8 - bits` places after the point."""

    group_size: int
    """How many inputs share a scale; at least `columns` for whole rows."""

    columns: int
    """How many inputs a row has."""

    @property
    def top(self) -> int:
        """The largest code of this width."""
        return 2**self.bits - 1

    def check(self, levels: Tensor | None) -> None:
        """Raise ConfigError or ShapeError as :func:`quadapt.kernels.reference.check_codes` does, for both widths."""
        check_codes(levels, self.bits)
        check_codes(levels, self.base_bits)


def quantize(
    base: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor | None,
    grid: Grid,
    dtype: torch.dtype,
) -> Tensor:
    """Compute :func:`quadapt.kernels.fake.fake_quantize` in torch, on any device."""
    grid.check(levels)
    result = torch.empty(len(base), grid.columns, dtype=dtype, device=base.device)
    step = rows_per_chunk(grid.columns)
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        factor = None if B is None else B[rows]
        v = _unrounded(base[rows], A, factor, scales[rows], offsets[rows], levels, grid)
        u = v if levels is not None else _rounded(v, grid)
        result[rows] = u.to(dtype) if dtype == torch.uint8 else _weights(u, scales[rows], offsets[rows], grid, dtype)
    return result


def gradients(
    G: Tensor,
    base: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor | None,
    grid: Grid,
    slack: float | None,
    dense: Tensor | None,
) -> Tensor:
    """Compute :func:`quadapt.kernels.fake.fake_gradients` in torch, on any device."""
    grid.check(levels)
    v = _unrounded(base, A, B, scales, offsets, levels, grid)
    u = v if levels is not None else _rounded(v, grid)
    if dense is not None:
        dense.copy_(_weights(u, scales, offsets, grid, dense.dtype))
    masked, slack = (v.round(), 0.0) if slack is None else (v, slack)
    inside = (masked >= -slack) & (masked <= grid.top + slack)
    if base.is_floating_point():
        dscales = _sums(G * torch.where(inside, u - v, u), grid)
        doffsets = _sums(torch.where(inside, 0, G), grid)
        G.copy_(torch.where(inside, G, 0))
    else:
        dscales, doffsets = _sums(G * u, grid), _sums(G, grid)
        G.copy_(torch.where(inside, G * expand(scales, grid.group_size, grid.columns), 0))
    return torch.stack([dscales, doffsets])


def _unrounded(
    base: Tensor, A: Tensor | None, B: Tensor | None, scales: Tensor, offsets: Tensor, levels: Tensor | None, grid: Grid
) -> Tensor:
    """`v` in the dtype of `scales`; for a table of levels, the levels themselves."""
    if base.is_floating_point():
        value = base.to(scales.dtype)
    else:
        codes = unpack(base, grid.base_bits, grid.columns)
        if levels is not None:
            return levels.to(scales.dtype)[codes.int()]
        value = codes.to(scales.dtype) * 2.0 ** (grid.bits - grid.base_bits)
    if A is not None and B is not None:
        update = torch.zeros_like(value)
        for r in range(len(A)):
            update = update + B[:, r : r + 1] * A[r]
        value = value + update
    if base.is_floating_point():
        offset = expand(offsets, grid.group_size, grid.columns)
        value = (value - offset) / expand(scales, grid.group_size, grid.columns)
    return value


def _rounded(v: Tensor, grid: Grid) -> Tensor:
    """Halves to even, then clamped. No zero is negative, as no stored code is; NaN stays, so that a loss shows it."""
    u = v.round()
    return torch.where(u <= 0, 0, torch.where(u >= grid.top, grid.top, u))


def _weights(u: Tensor, scales: Tensor, offsets: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The order of operations of the stored form: product, sum, one rounding to `dtype`."""
    compute = torch.promote_types(scales.dtype, dtype)
    scale, offset = (expand(each.to(compute), grid.group_size, grid.columns) for each in (scales, offsets))
    return (u.to(compute) * scale + offset).to(dtype)


def _sums(values: Tensor, grid: Grid) -> Tensor:
    """Sums over the groups of each row: `[rows, columns]` to `[rows, groups]`."""
    fill = -grid.columns % grid.group_size
    return torch.nn.functional.pad(values, (0, fill)).unflatten(1, (-1, grid.group_size)).sum(-1)
