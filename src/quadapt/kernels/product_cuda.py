"""The product of few tokens with a quantized matrix on CUDA devices, in Triton, without making the dense matrix.

With one token to decode, time goes into reading weights: four bits of each are read here, where a dense matrix has
sixteen. What is left must be cheap, so scale and offset are taken out of the sum over a group,

    y[t, o] = sum_g scales[o, g] * sum_i levels[codes[o, i]] x[t, i] + offsets[o, g] * sum_i x[t, i]

which leaves one multiply-add for each weight and token. A word of eight codes is a thread's; rows of a program share
its inputs. All is summed in float32, in an order that depends on the shape alone: the same inputs give the same bits.
Integers become floats without a conversion: placed below the exponent of one, a code reads as `1 + code / 2**bits`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadapt.kernels.reference import check_codes
from quadapt.kernels.tiles import (
    DOUBLE,
    FLOATS,
    IMPLIED,
    INTEGER,
    decoded,
    launch,
    narrowed,
    parts,
    power,
    read_words,
    word_codes,
    words_of,
)


def _sizes(tokens: int) -> tuple[int, int, int]:
    """Rows of a program, words of a row that it takes at once, and its warps.

    For one token they are the fastest of 24 on an H200 (`python -m benchmarks.gpu.tuning`): 0.89 of the time that eight
    rows, 128 words and four warps took. Of several tokens, rows share the inputs that a program has read.
    """
    return (1, 256, 2) if tokens == 1 else (max(1, min(4, 32 // tokens)), 128, 4)


@triton.jit
def _product(
    x,
    packed,
    scales,
    scales_absmax,
    scales_mean,
    offsets,
    offsets_absmax,
    offsets_mean,
    unit,
    levels,
    y,
    tokens,
    rows,
    columns,
    row_bytes,
    groups,
    group,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    WIDE: tl.constexpr,
    LOOKUP: tl.constexpr,
    SCALES: tl.constexpr,
    OFFSETS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    # Everything has the axes tokens, rows, words, so that the compiler keeps one layout from the loads to the sum.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :, None]
    token = tl.arange(0, TOKENS)[:, None, None]
    start, total = row.to(tl.int64), tl.zeros([TOKENS, ROWS, WORDS], tl.float32)
    for first in range(0, tl.cdiv(columns, CODES), WORDS):
        word = tl.max_contiguous(first + tl.arange(0, WORDS), 1)[None, None, :]
        words = read_words(packed, row, word, rows, row_bytes, BITS, CODES, WIDE)
        inside = (row < rows) & (word * CODES < columns)
        at = start * groups + word * CODES // group
        scale = decoded(scales, scales_absmax, scales_mean, unit, at, inside, SCALES)
        dot = tl.zeros([TOKENS, ROWS, WORDS], tl.float32)
        ones = tl.zeros([TOKENS, 1, WORDS], tl.float32)
        for k in tl.static_range(CODES):
            column = word * CODES + k
            some = (token < tokens) & (column < columns)
            value = tl.load(x + token * columns + column, mask=some, other=0).to(tl.float32)
            if LOOKUP:
                level = tl.load(levels + ((words >> (k * BITS)) & ((1 << BITS) - 1)))
            else:
                # To the top of the fraction's 23 bits.
                if BITS * CODES > 32:
                    moved = (words >> (k * BITS)).to(tl.int32) << (23 - BITS)
                else:
                    moved = words >> (k * BITS + BITS - 23) if k * BITS + BITS > 23 else words << (23 - BITS - k * BITS)
                level = ((moved & (((1 << BITS) - 1) << (23 - BITS))) | 0x3F800000).to(tl.float32, bitcast=True)
            dot += value * level
            ones += value
        if not LOOKUP:
            dot = (dot - ones) * (1 << BITS)
        total += dot * scale
        if OFFSETS == IMPLIED:
            if not LOOKUP:
                total -= ones * (scale * (1 << (BITS - 1)))
        elif OFFSETS == INTEGER:
            total -= ones * (scale * tl.load(offsets + at, mask=inside, other=0).to(tl.float32))
        else:
            total += ones * decoded(offsets, offsets_absmax, offsets_mean, unit, at, inside, OFFSETS)
    done = narrowed(tl.sum(total, axis=2, keep_dims=True), y.dtype.element_ty)
    tl.store(y + token.to(tl.int64) * rows + row, done, mask=(token < tokens) & (row < rows))


def product(
    x: Tensor,
    packed: Tensor,
    scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    levels: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
) -> Tensor:
    """Compute :func:`quadapt.kernels.product` on a GPU: `[tokens, out]` in the dtype of `x`."""
    check_codes(levels, bits)
    (rows, row_bytes), tokens = packed.shape, len(x)
    words, wide = words_of(packed, bits)
    y = x.new_empty(tokens, rows)
    size = power(tokens)
    tile, chunk, warps = _sizes(size)
    unit = next((each[3] for each in (scales, offsets) if len(each) == 4), scales[0])
    launch(
        _product,
        (parts(rows, tile),),
        x.contiguous(),
        words,
        *_held(scales, unit),
        *_held(offsets, unit),
        unit,
        unit if levels is None else levels,
        y,
        tokens,
        rows,
        columns,
        row_bytes,
        parts(columns, group_size),
        group_size,
        fuse=True,
        num_warps=warps,
        BITS=bits,
        CODES=word_codes(bits),
        WIDE=wide,
        LOOKUP=levels is not None,
        SCALES=_storage(scales),
        OFFSETS=_storage(offsets),
        TOKENS=size,
        ROWS=tile,
        WORDS=min(chunk, power(parts(columns, word_codes(bits)))),
    )
    return y


def _held(tensors: Sequence[Tensor], other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, second-level constants and mean: something of a tensor where there is none."""
    values = tensors[0].contiguous() if tensors else other
    return (values, tensors[1], tensors[2]) if len(tensors) == 4 else (values, other, other)


def _storage(tensors: Sequence[Tensor]) -> int:
    """How scales or offsets are held, by what there is of them."""
    if not tensors:
        return IMPLIED.value
    if len(tensors) == 4:
        return DOUBLE.value
    return INTEGER.value if tensors[0].dtype == torch.uint8 else FLOATS.value
