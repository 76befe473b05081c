"""Fake quantization on CUDA devices, in Triton: a program for some rows of one group, tile after tile.

Weights, codes and masked gradients equal those of `fake_reference.py` bit for bit (`B @ A` is summed over the rank in
order, without matrix units: a code must not depend on the device); sums over groups differ in their order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadapt.kernels import fake_reference
from quadapt.kernels.fake_reference import Grid
from quadapt.kernels.tiles import grid_of, launch, narrowed, parts, power, rounded

_CHUNK = 256
"""Most columns of a group that a program takes at once."""

_TILE = 1024
"""Weights of a tile: eight for each thread."""


@triton.jit
def _unrounded(
    base,
    A,
    B,
    levels,
    start,
    row,
    there,
    column,
    inside,
    scale,
    shift,
    columns,
    row_bytes,
    rank,
    unit,
    BASE_BITS: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    """`v` of a tile, float32. `BASE_BITS` of zero: the base is of floats. `rank` of zero: no `A` and `B`."""
    if BASE_BITS == 0:
        value = tl.load(base + start[:, None] * columns + column[None, :], mask=inside, other=0).to(tl.float32)
    else:
        bit = column * BASE_BITS
        at = start[:, None] * row_bytes + (bit // 8)[None, :]
        word = tl.load(base + at, mask=inside, other=0).to(tl.int32)
        if 8 % BASE_BITS:  # a code may reach into the next byte
            more = inside & (bit % 8 > 8 - BASE_BITS)[None, :]
            word = word | (tl.load(base + at + 1, mask=more, other=0).to(tl.int32) << 8)
        code = (word >> (bit % 8)[None, :]) & ((1 << BASE_BITS) - 1)
        value = tl.load(levels + code) if LOOKUP else code.to(tl.float32) * unit
    update = tl.zeros_like(value)
    here = column < columns
    for r in range(rank):
        left = tl.load(B + row * rank + r, mask=there, other=0)
        right = tl.load(A + r * columns + column, mask=here, other=0)
        update += left[:, None] * right[None, :]
    value += update
    if BASE_BITS == 0:
        value = tl.div_rn(value - shift, tl.broadcast_to(scale, value.shape))
    return value


@triton.jit
def _clipped(value, top):
    """A little over the range at most, so that it can be rounded; NaN stays."""
    value = tl.where(value < -2.0, -2.0, value)
    return tl.where(value > top + 2.0, top + 2.0, value)


@triton.jit
def _codes(value, top):
    """Halves to even, then clamped. No zero is negative; NaN stays, so that a loss shows it."""
    u = rounded(_clipped(value, top))
    u = tl.where(u <= 0.0, 0.0, u)
    return tl.where(u >= top, top, u)


@triton.jit
def _quantize(
    base,
    A,
    B,
    scales,
    offsets,
    levels,
    result,
    rows,
    columns,
    row_bytes,
    groups,
    group,
    rank,
    unit,
    top,
    BASE_BITS: tl.constexpr,
    LOOKUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, g = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    start, there = row.to(tl.int64), row < rows
    scale, shift = grid_of(scales, offsets, start * groups + g, there, SHIFTED=True)
    last = tl.minimum(columns, (g + 1) * group)
    for first in range(g * group, last, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = there[:, None] & (column < last)[None, :]
        u = _unrounded(
            base, A, B, levels, start, row, there, column, inside, scale, shift, columns, row_bytes, rank, unit,
            BASE_BITS, LOOKUP,
        )  # fmt: skip
        if not LOOKUP:
            u = _codes(u, top)
        if result.dtype.element_ty != tl.uint8:
            u = u * scale + shift
        done = narrowed(u, result.dtype.element_ty)
        tl.store(result + start[:, None] * columns + column[None, :], done, mask=inside)


@triton.jit
def _gradients(
    G,
    base,
    A,
    B,
    scales,
    offsets,
    levels,
    dense,
    sums,
    rows,
    columns,
    row_bytes,
    groups,
    group,
    rank,
    unit,
    top,
    lowest,
    highest,
    BASE_BITS: tl.constexpr,
    LOOKUP: tl.constexpr,
    ROUNDS: tl.constexpr,
    DENSE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, g = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    start, there = row.to(tl.int64), row < rows
    scale, shift = grid_of(scales, offsets, start * groups + g, there, SHIFTED=True)
    dscale, doffset = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    last = tl.minimum(columns, (g + 1) * group)
    for first in range(g * group, last, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = there[:, None] & (column < last)[None, :]
        v = _unrounded(
            base, A, B, levels, start, row, there, column, inside, scale, shift, columns, row_bytes, rank, unit,
            BASE_BITS, LOOKUP,
        )  # fmt: skip
        u = v
        if not LOOKUP:
            u = _codes(v, top)
        at = start[:, None] * columns + column[None, :]
        if DENSE:
            tl.store(dense + at, narrowed(u * scale + shift, dense.dtype.element_ty), mask=inside)
        masked = v
        if ROUNDS:
            masked = rounded(_clipped(v, top))
        free = (masked >= lowest) & (masked <= highest)
        gradient = tl.load(G + at, mask=inside, other=0)
        if BASE_BITS == 0:
            dscale += tl.sum(tl.where(inside, gradient * tl.where(free, u - v, u), 0.0), axis=1)
            doffset += tl.sum(tl.where(free, 0.0, gradient), axis=1)
            gradient = tl.where(free, gradient, 0.0)
        else:
            dscale += tl.sum(tl.where(inside, gradient * u, 0.0), axis=1)
            doffset += tl.sum(gradient, axis=1)
            gradient = tl.where(free, gradient * scale, 0.0)
        tl.store(G + at, gradient, mask=inside)
    tl.store(sums + start * groups + g, dscale, mask=there)
    tl.store(sums + (start + rows) * groups + g, doffset, mask=there)


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
    """Quantize on a GPU a matrix that trains, bit for bit as `fake_reference.quantize` does."""
    grid.check(levels)
    if scales.dtype != torch.float32 or dtype == torch.float64:
        return fake_reference.quantize(base, A, B, scales, offsets, levels, grid, dtype)
    result = torch.empty(len(base), grid.columns, dtype=dtype, device=base.device)
    read, shape, constants, programs = _arguments(base, A, B, scales, offsets, levels, grid)
    launch(_quantize, programs, *read, result, *shape, **constants)
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
    """Compute a quantizer's gradients as `fake_reference.gradients` does, but sum each group in another order."""
    grid.check(levels)
    plain = G.is_contiguous() and (dense is None or (dense.is_contiguous() and dense.dtype != torch.float64))
    if scales.dtype != torch.float32 or G.dtype != torch.float32 or not plain:
        return fake_reference.gradients(G, base, A, B, scales, offsets, levels, grid, slack, dense)
    sums = torch.empty(2, *scales.shape, device=scales.device)
    read, shape, constants, programs = _arguments(base, A, B, scales, offsets, levels, grid)
    launch(
        _gradients,
        programs,
        G,
        *read,
        G if dense is None else dense,
        sums,
        *shape,
        *((0.0, float(grid.top)) if slack is None else (-slack, grid.top + slack)),
        ROUNDS=slack is None,
        DENSE=dense is not None,
        **constants,
    )
    return sums


def _arguments(
    base: Tensor, A: Tensor | None, B: Tensor | None, scales: Tensor, offsets: Tensor, levels: Tensor | None, grid: Grid
) -> tuple[tuple[Tensor, ...], tuple[float, ...], dict[str, Any], tuple[int, int]]:
    """What the kernels read, the numbers that describe it, their constants, and how many programs there are."""
    base, scales = base.float() if base.dtype == torch.float64 else base, scales.contiguous()
    chunk = min(_CHUNK, power(grid.group_size))
    tile = max(1, _TILE // chunk)
    read = (
        base.contiguous(),
        scales if A is None else A.contiguous(),
        scales if B is None else B.contiguous(),
        scales,
        offsets.contiguous(),
        scales if levels is None else levels,
    )
    unit = 2.0 ** (grid.bits - grid.base_bits)
    rank = 0 if A is None or B is None else len(A)
    shape = (len(base), grid.columns, base.shape[1], scales.shape[1], grid.group_size, rank, unit, float(grid.top))
    bits = 0 if base.is_floating_point() else grid.base_bits
    constants = {"BASE_BITS": bits, "LOOKUP": levels is not None, "ROWS": tile, "CHUNK": chunk}
    return read, shape, constants, (parts(len(base), tile), scales.shape[1])
