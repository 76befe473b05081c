"""The kernels for CUDA devices, in Triton: signatures and results are those of `reference.py`, weights bit for bit.

Two shapes of work. Decoding and encoding go by words: a program has some rows and words, and unpacks each word into its
eight codes in registers, so that eight weights are written by one wide store. What is summed over a group, or goes
through one in order, has a program for some rows of one group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadapt.kernels import reference
from quadapt.kernels.reference import group_range
from quadapt.kernels.tiles import (
    DOUBLE,
    decoded,
    grid_of,
    launch,
    level_of,
    narrowed,
    nearest_code,
    parts,
    power,
    read_words,
    thresholds,
    word_codes,
    words_of,
)

__all__ = ["compensate", "dequantize", "group_error", "group_range", "nearest_codes", "widen"]

_WORDS, _WARPS = 128, 2
"""Words and warps of a program that decodes: two words for each thread, 32 bytes of bfloat16. Measured on an H200, as
the fastest of thirteen (`python -m benchmarks.gpu.tuning`): 0.93 of the time that 512 words and four warps took."""

_CHUNK = 256
"""Most columns of a group that a program takes at once."""

_WIDEST = 512
"""Most columns that GPTQ's inner loop holds in registers."""

_HELD = 1024
"""Weights of a program of that loop."""


@triton.jit
def _dequantize(
    packed,
    scales,
    offsets,
    levels,
    weight,
    rows,
    columns,
    row_bytes,
    groups,
    group,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    WIDE: tl.constexpr,
    LOOKUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    words = read_words(packed, row[:, None], word[None, :], rows, row_bytes, BITS, CODES, WIDE)
    start = row.to(tl.int64)[:, None]
    inside = (row < rows)[:, None] & (word * CODES < columns)[None, :]
    at = start * groups + (word * CODES // group)[None, :]
    code = ((words[:, :, None] >> (tl.arange(0, CODES) * BITS)[None, None, :]) & ((1 << BITS) - 1)).to(tl.int32)
    value = level_of(code, levels, LOOKUP) * tl.load(scales + at, mask=inside, other=0).to(tl.float32)[:, :, None]
    if SHIFTED:
        value += tl.load(offsets + at, mask=inside, other=0).to(tl.float32)[:, :, None]
    column = tl.program_id(1) * WORDS * CODES + tl.arange(0, WORDS * CODES)
    tl.store(
        weight + start * columns + column[None, :],
        tl.reshape(narrowed(value, weight.dtype.element_ty), (ROWS, WORDS * CODES)),
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )


@triton.jit
def _widen(codes, absmax, mean, unit, values, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    tl.store(values + at, decoded(codes, absmax, mean, unit, at, inside, DOUBLE), mask=inside)


@triton.jit
def _nearest_codes(
    weight,
    scales,
    offsets,
    mids,
    packed,
    rows,
    columns,
    row_bytes,
    groups,
    group,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    COUNT: tl.constexpr,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    k = tl.arange(0, CODES)
    start = row.to(tl.int64)
    there = (row < rows)[:, None] & (word * CODES < columns)[None, :]
    at = start[:, None] * groups + (word * CODES // group)[None, :]
    column = word[:, None] * CODES + k[None, :]
    inside = (row < rows)[:, None, None] & (column < columns)[None, :, :]
    value = tl.load(weight + start[:, None, None] * columns + column[None, :, :], mask=inside, other=0).to(tl.float32)
    if SHIFTED:
        value -= tl.load(offsets + at, mask=there, other=0)[:, :, None]
    value = tl.div_rn(value, tl.broadcast_to(tl.load(scales + at, mask=there, other=1)[:, :, None], value.shape))
    code = tl.where(inside, nearest_code(value, mids, BITS, COUNT), 0)
    if BITS * CODES > 32:
        code = code.to(tl.int64)
    words = tl.sum(code << (k * BITS)[None, None, :], axis=2)
    for byte in tl.static_range(BITS * CODES // 8):
        spot = (word * (BITS * CODES // 8) + byte)[None, :]
        tl.store(
            packed + start[:, None] * row_bytes + spot,
            ((words >> (8 * byte)) & 255).to(tl.uint8),
            mask=(row < rows)[:, None] & (spot < row_bytes),
        )


@triton.jit
def _group_error(
    weight,
    scales,
    offsets,
    mids,
    levels,
    error,
    rows,
    columns,
    groups,
    group,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, g = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    start, there = row.to(tl.int64), row < rows
    scale, shift = grid_of(scales, offsets, start * groups + g, there, SHIFTED)
    total = tl.zeros([ROWS], tl.float32)
    last = tl.minimum(columns, (g + 1) * group)
    for first in range(g * group, last, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = there[:, None] & (column < last)[None, :]
        want = tl.load(weight + start[:, None] * columns + column[None, :], mask=inside, other=0).to(tl.float32)
        value = tl.div_rn(want - shift, tl.broadcast_to(scale, want.shape))
        miss = level_of(nearest_code(value, mids, BITS, COUNT), levels, COUNT > 0) * scale + shift - want
        total += tl.sum(tl.where(inside, miss * miss, 0.0), axis=1)
    tl.store(error + start * groups + g, total, mask=there)


@triton.jit
def _compensate(
    weight,
    upper,
    scales,
    offsets,
    mids,
    levels,
    codes,
    rows,
    columns,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    left = tl.load(weight + at, mask=inside, other=0)
    code = tl.zeros([ROWS, COLUMNS], tl.int32)
    scale = tl.load(scales + row, mask=row < rows, other=1)
    shift = tl.zeros([ROWS], tl.float32)
    if SHIFTED:
        shift = tl.load(offsets + row, mask=row < rows, other=0)
    for i in range(columns):
        here = (column == i)[None, :]
        value = tl.sum(tl.where(here, left, 0.0), axis=1)
        chosen = nearest_code(tl.div_rn(value - shift, scale), mids, BITS, COUNT)
        miss = value - (level_of(chosen, levels, COUNT > 0) * scale + shift)
        miss = tl.div_rn(miss, tl.zeros_like(miss) + tl.load(upper + i * columns + i))[:, None]
        share = tl.load(upper + i * columns + column, mask=(column > i) & (column < columns), other=0)[None, :]
        left = tl.where(here, miss, left - miss * share)
        code = tl.where(here, chosen[:, None], code)
    tl.store(weight + at, left, mask=inside)
    tl.store(codes + at, code.to(tl.uint8), mask=inside)


def whole_words(group_size: int, columns: int) -> bool:
    """Whether all codes of a word share a scale."""
    return group_size % 8 == 0 or group_size >= columns


def dequantize(
    packed: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    levels: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantize on a GPU, bit for bit as `reference.dequantize` does; scales and offsets may be float16."""
    reference.check_codes(levels, bits)
    if dtype == torch.float64 or not whole_words(group_size, columns):
        return reference.dequantize(packed, scales, offsets, levels, bits, group_size, columns, dtype)
    rows, row_bytes = packed.shape
    words, wide = words_of(packed, bits)
    weight = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    count = parts(columns, word_codes(bits))
    size = min(128, power(count))
    tile = _WORDS // size
    launch(
        _dequantize,
        (parts(rows, tile), parts(count, size)),
        words,
        scales.contiguous(),
        scales if offsets is None else offsets.contiguous(),
        scales if levels is None else levels,
        weight,
        rows,
        columns,
        row_bytes,
        scales.shape[1],
        group_size,
        BITS=bits,
        CODES=word_codes(bits),
        WIDE=wide,
        LOOKUP=levels is not None,
        SHIFTED=offsets is not None,
        ROWS=tile,
        WORDS=size,
        num_warps=_WARPS,
    )
    return weight


def widen(codes: Tensor, absmax: Tensor, mean: Tensor, unit: Tensor) -> Tensor:
    """Decode doubly quantized values on a GPU, float32, bit for bit as `reference.widen` does."""
    values = torch.empty(codes.shape, device=codes.device)
    count = values.numel()
    launch(_widen, (parts(count, 1024),), codes.contiguous(), absmax, mean, unit, values, count, SIZE=1024)
    return values


def nearest_codes(
    weight: Tensor, scales: Tensor, offsets: Tensor | None, levels: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """Pack on a GPU the codes of the nearest levels, as `reference.nearest_codes` does."""
    reference.check_codes(levels, bits)
    rows, columns = weight.shape
    if scales.dtype != torch.float32 or not whole_words(group_size, columns):
        return reference.nearest_codes(weight, scales, offsets, levels, bits, group_size)
    packed = torch.empty(rows, parts(columns * bits, 8), dtype=torch.uint8, device=weight.device)
    count = parts(columns, word_codes(bits))
    size = min(32, power(count))
    tile = 128 // size
    launch(
        _nearest_codes,
        (parts(rows, tile), parts(count, size)),
        _floats(weight),
        scales.contiguous(),
        scales if offsets is None else offsets.contiguous(),
        thresholds(levels, scales),
        packed,
        rows,
        columns,
        packed.shape[1],
        scales.shape[1],
        group_size,
        BITS=bits,
        CODES=word_codes(bits),
        COUNT=0 if levels is None else len(levels) - 1,
        SHIFTED=offsets is not None,
        ROWS=tile,
        WORDS=size,
    )
    return packed


def group_error(
    weight: Tensor, scales: Tensor, offsets: Tensor | None, levels: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """Sum each group's squared rounding errors as `reference.group_error` does, but in another order."""
    reference.check_codes(levels, bits)
    if scales.dtype != torch.float32:
        return reference.group_error(weight, scales, offsets, levels, bits, group_size)
    (rows, columns), error = weight.shape, torch.empty_like(scales, memory_format=torch.contiguous_format)
    chunk = min(_CHUNK, power(min(group_size, columns)))
    tile = max(1, 1024 // chunk)
    launch(
        _group_error,
        (parts(rows, tile), scales.shape[1]),
        _floats(weight),
        scales.contiguous(),
        scales if offsets is None else offsets.contiguous(),
        thresholds(levels, scales),
        scales if levels is None else levels,
        error,
        rows,
        columns,
        scales.shape[1],
        group_size,
        BITS=bits,
        COUNT=0 if levels is None else len(levels) - 1,
        SHIFTED=offsets is not None,
        ROWS=tile,
        CHUNK=chunk,
    )
    return error


def compensate(
    weight: Tensor, upper: Tensor, scales: Tensor, offsets: Tensor | None, levels: Tensor | None, bits: int
) -> Tensor:
    """Run GPTQ's inner loop as `reference.compensate` does; leave the errors in `weight`, which must be contiguous."""
    reference.check_codes(levels, bits)
    rows, columns = weight.shape
    if weight.dtype != torch.float32 or columns > _WIDEST:
        return reference.compensate(weight, upper, scales, offsets, levels, bits)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    size = power(columns)
    tile = max(1, _HELD // size)
    scales = scales.float().contiguous()
    launch(
        _compensate,
        (parts(rows, tile),),
        weight,
        upper.contiguous(),
        scales,
        scales if offsets is None else offsets.float().contiguous(),
        thresholds(levels, scales),
        scales if levels is None else levels,
        codes,
        rows,
        columns,
        BITS=bits,
        COUNT=0 if levels is None else len(levels) - 1,
        SHIFTED=offsets is not None,
        ROWS=tile,
        COLUMNS=size,
    )
    return codes


def _floats(weight: Tensor) -> Tensor:
    """A weight as the kernels read it: any float but float64, which is rounded."""
    return (weight.float() if weight.dtype == torch.float64 else weight).contiguous()
