"""Fake quantization on the CPU: numba, one pass over each row, rows shared out over threads.

A row is read into a buffer that ends in a whole vector, and worked on there, vector by vector (`fake_lanes.py`):
widened to float32, moved by `B @ A`, rounded, and turned into weights, codes or gradients. Weights, codes and masked
gradients equal those of `fake_reference.py` bit for bit; sums over groups differ in their order.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from quadapt.kernels import fake_reference
from quadapt.kernels.compiled import jit
from quadapt.kernels.cpu import _DTYPES, _decode_run, _f32, _u8
from quadapt.kernels.fake_lanes import CODES, LEVELS, WEIGHTS, add_low_rank16, gradient16, quantize16, sum16
from quadapt.kernels.fake_reference import Grid
from quadapt.kernels.lanes import BF16, FP16, FP32, LANES, convert16
from quadapt.kernels.threads import over_rows

_BYTES = 3
"""Codes, beside the dtypes of `lanes.py`: packed where a row is read, a byte each where it is written."""


@jit
def _copy(source, target, nbytes):
    """Bytes, a vector at a time: left alone, the compiler copies one by one."""
    for _ in range(nbytes // 64):
        convert16(FP32, FP32, source, target)
        source += 64
        target += 64
    for i in range(nbytes % 64):
        numba.carray(_u8(target), 64)[i] = numba.carray(_u8(source), 64)[i]


@jit
def _convert(have, want, source, count, target):
    """At least `count` numbers of one dtype into another; one of the two is float32."""
    for _ in range(0, count, LANES):
        if have == BF16:
            convert16(BF16, FP32, source, target)
        elif have == FP16:
            convert16(FP16, FP32, source, target)
        elif want == BF16:
            convert16(FP32, BF16, source, target)
        elif want == FP16:
            convert16(FP32, FP16, source, target)
        else:
            convert16(FP32, FP32, source, target)
        source += LANES * (4 if have == FP32 else 2)
        target += LANES * (4 if want == FP32 else 2)


@jit
def _read(row, base, spare, value, runs):
    """One row of the base as float32: weights, real codes (multiples of `unit`), or the levels of codes."""
    dtype, _, nbytes, bits, unit, lookup, table = base
    _copy(row, spare, nbytes)
    if dtype != _BYTES:
        _convert(dtype, FP32, spare, runs * LANES, value)
    elif lookup and bits == 8:
        levels, codes, found = (
            numba.carray(_f32(table), 256),
            numba.carray(_u8(spare), nbytes),
            numba.carray(_f32(value), nbytes),
        )
        for i in range(nbytes):
            found[i] = levels[codes[i]]
    else:
        _decode_run(FP32, lookup, spare, runs, bits, unit, np.float32(0), table, value)


@jit
def _write(dtype, value, done, row, columns):
    """One row of float32 as weights, or as codes of a byte each."""
    if dtype == _BYTES:
        values, codes = numba.carray(_f32(value), columns), numba.carray(_u8(done), columns)
        for i in range(columns):
            codes[i] = np.uint8(values[i])
    else:
        _convert(FP32, dtype, value, columns, done)
    _copy(done, row, columns * (4 if dtype == FP32 else (1 if dtype == _BYTES else 2)))


@jit
def _quantize_run(mode, dense, runs, value, scale, offset, top):
    """Runs of 16 that share one scale."""
    for _ in range(runs):
        if mode == LEVELS:
            quantize16(LEVELS, 1, value, scale, offset, top)
        elif mode == CODES and dense:
            quantize16(CODES, 1, value, scale, offset, top)
        elif mode == CODES:
            quantize16(CODES, 0, value, scale, offset, top)
        elif dense:
            quantize16(WEIGHTS, 1, value, scale, offset, top)
        else:
            quantize16(WEIGHTS, 0, value, scale, offset, top)
        value += 4 * LANES


@jit
def _gradient_run(mode, runs, value, G, sums, scale, offset, top, mask):
    rounds, low, high = mask
    for _ in range(runs):
        if mode == LEVELS:
            gradient16(LEVELS, value, G, sums, scale, offset, top, rounds, low, high)
        elif mode == CODES:
            gradient16(CODES, value, G, sums, scale, offset, top, rounds, low, high)
        else:
            gradient16(WEIGHTS, value, G, sums, scale, offset, top, rounds, low, high)
        value += 4 * LANES
        G += 4 * LANES


@jit
def _rows(shape, base, factors, grid, mode, top, target, mask, G, sums, first, last):
    """Rows `first` to `last`: their weights or codes to `target`; with `G`, gradients as in `fake.fake_gradients`."""
    rows, columns, group, rank = shape
    dtype, written, row_written = target
    groups, runs = -(-columns // group), -(-columns // LANES)
    scales, offsets = numba.carray(_f32(grid[0]), (rows, groups)), numba.carray(_f32(grid[1]), (rows, groups))
    total = numba.carray(_f32(sums), (2, rows, groups))
    scratch = np.zeros((5, (runs + 2) * LANES), np.float32)  # what lies past a row's end stays zero, and adds nothing
    spare, value, masked = scratch[0].ctypes.data, scratch[1].ctypes.data, scratch[2].ctypes.data
    done, added = scratch[3].ctypes.data, scratch[4].ctypes.data
    for row in range(first, last):
        _read(base[1] + row * base[2], base, spare, value, runs)
        for i in range(runs if rank else 0):
            add_low_rank16(value + 4 * LANES * i, factors[0] + 4 * LANES * rank * i, factors[1] + 4 * rank * row, rank)
        if G:
            _copy(G + 4 * row * columns, masked, 4 * columns)
        for k in range(groups):
            at, count = 4 * k * group, -(-min(group, columns - k * group) // LANES)
            scale, offset = scales[row, k], offsets[row, k]
            if G:
                _gradient_run(mode, count, value + at, masked + at, added, scale, offset, top, mask)
                total[0, row, k], total[1, row, k] = sum16(added), sum16(added + 4 * LANES)
            else:
                _quantize_run(mode, dtype != _BYTES, count, value + at, scale, offset, top)
        if G:
            _copy(masked, G + 4 * row * columns, 4 * columns)
        if dtype >= 0:
            _write(dtype, value, done, written + row * row_written, columns)


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
    """Quantize on the CPU a matrix that trains, bit for bit as `fake_reference.quantize` does."""
    grid.check(levels)
    if scales.dtype != torch.float32 or dtype == torch.float64 or not _whole_vectors(grid):
        return fake_reference.quantize(base, A, B, scales, offsets, levels, grid, dtype)
    result = torch.empty(len(base), grid.columns, dtype=dtype)
    kept, arguments = _arguments(base, A, B, scales, offsets, levels, grid, result)
    none = (False, np.float32(0), np.float32(0))
    over_rows(lambda first, last: _rows(*arguments, none, 0, 0, first, last), len(base), _work(A, grid))
    del kept
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
    plain = (
        G.dtype == torch.float32
        and G.is_contiguous()
        and (dense is None or (dense.is_contiguous() and dense.dtype in _DTYPES))
    )
    if scales.dtype != torch.float32 or not plain or not _whole_vectors(grid):
        return fake_reference.gradients(G, base, A, B, scales, offsets, levels, grid, slack, dense)
    sums = torch.empty(2, *scales.shape)
    kept, arguments = _arguments(base, A, B, scales, offsets, levels, grid, dense)
    low, high = (0.0, float(grid.top)) if slack is None else (-slack, grid.top + slack)
    mask = (slack is None, np.float32(low), np.float32(high))
    over_rows(
        lambda first, last: _rows(*arguments, mask, G.data_ptr(), sums.data_ptr(), first, last),
        len(base),
        _work(A, grid),
    )
    del kept
    return sums


def _whole_vectors(grid: Grid) -> bool:
    return grid.group_size % LANES == 0 or grid.group_size >= grid.columns


def _work(A: Tensor | None, grid: Grid) -> int:
    """What a row costs, in weights decoded."""
    return grid.columns * (2 if A is None else 2 + len(A) // 4)


def _arguments(
    base: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor | None,
    grid: Grid,
    target: Tensor | None,
) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Tensors to keep alive, and the compiled loops' arguments, in which they are addresses."""
    if base.dtype == torch.float64:
        base = base.float()
    base, scales, offsets = base.contiguous(), scales.contiguous(), offsets.contiguous()
    A, B = (scales if A is None else _blocks(A)), (scales if B is None else B.contiguous())
    table = scales if levels is None else torch.nn.functional.pad(levels, (0, max(0, LANES - len(levels))))
    dtypes = {**_DTYPES, torch.uint8: _BYTES}
    unit, row_bytes = np.float32(2.0 ** (grid.bits - grid.base_bits)), base.shape[1] * base.itemsize
    read = (dtypes[base.dtype], base.data_ptr(), row_bytes, grid.base_bits, unit, levels is not None, table.data_ptr())
    written = (-1, 0, 0)
    if target is not None:
        written = (dtypes[target.dtype], target.data_ptr(), grid.columns * target.itemsize)
    shape = (len(base), grid.columns, grid.group_size, 0 if A is scales else A.shape[1])
    where = (A.data_ptr(), B.data_ptr()), (scales.data_ptr(), offsets.data_ptr())
    mode = WEIGHTS if base.is_floating_point() else (CODES if levels is None else LEVELS)
    return [base, A, B, scales, offsets, table], (shape, read, *where, mode, np.float32(grid.top), written)


def _blocks(A: Tensor) -> Tensor:
    """`[rank, in]` as `[in / 16, rank, 16]`: what one vector of weights needs lies together."""
    padded = torch.nn.functional.pad(A, (0, -A.shape[1] % LANES))
    return padded.unflatten(1, (-1, LANES)).transpose(0, 1).contiguous()
