"""Building blocks of the Triton kernels: reading packed words, scales as they are stored, rounding to a code.

A word is what the kernels unpack at once: eight codes, which fill exactly `bits` bytes, or four of six or eight bits.
It is an int32; but eight codes of five bits are 40 bits, and an int64. As group widths are multiples of 16 (or whole
rows), all codes of a word share one scale.

Kernels are launched by :func:`launch`, which forbids the compiler to fuse a product and a sum into one operation with
one rounding: the stored form rounds twice, and so do the reference and the CPU kernels. Where `TRITON_INTERPRET=1` was
set before the first import, the kernels run on CPU tensors through Triton's interpreter (the tests do this).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadapt.kernels.reference import midpoints

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

FLOATS, DOUBLE, INTEGER, IMPLIED = (tl.constexpr(number) for number in range(4))
"""How scales or offsets are held: as floats `[out, groups]`; as doubly quantized codes; as zero-points of a byte (the
offset is `-scale * zero`); or not at all (zero for a table of levels, the middle for integers)."""

SUPER = tl.constexpr(256)
"""How many doubly quantized values share a constant (`reference.SUPER`)."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, fuse: bool = False, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor; `fuse` allows fused multiply-add."""
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*arguments, enable_fp_fusion=fuse, **constants)


def word_codes(bits: int) -> int:
    """Codes in a word: eight, or four where these fill whole bytes too."""
    return 8 if bits <= 5 else 4


def words_of(packed: Tensor, bits: int) -> tuple[Tensor, bool]:
    """Packed rows as the kernels read them: whole words in one load where rows are aligned to them, or bytes."""
    packed = packed.contiguous()
    word = {2: torch.int16, 4: torch.int32, 8: torch.int32}.get(bits)
    places = (packed.shape[1], packed.storage_offset(), packed.data_ptr())
    if word is None or any(place % word.itemsize for place in places):
        return packed, False
    return packed.view(word), True


def thresholds(levels: Tensor | None, scales: Tensor) -> Tensor:
    """Midpoints of a table; something of a tensor for integers, which need none."""
    return scales if levels is None else midpoints(levels).contiguous()


def power(count: int) -> int:
    """The smallest power of two that is not less than `count`."""
    return 1 << max(0, count - 1).bit_length()


def parts(count: int, size: int) -> int:
    """How many tiles of `size` cover `count`."""
    return -(-count // size)


@triton.jit
def read_words(packed, row, word, rows, row_bytes, BITS: tl.constexpr, CODES: tl.constexpr, WIDE: tl.constexpr):
    """Words of rows and words that broadcast against each other, int32 (int64 for 40 bits); zero past the ends."""
    SIZE: tl.constexpr = BITS * CODES // 8
    WORD: tl.constexpr = tl.int64 if SIZE > 4 else tl.int32
    start, there = row.to(tl.int64), row < rows
    if WIDE:
        count = row_bytes // SIZE
        found = tl.load(packed + start * count + word, mask=there & (word < count), other=0).to(WORD)
    else:
        at = word * SIZE
        found = tl.load(packed + start * row_bytes + at, mask=there & (at < row_bytes), other=0).to(WORD)
        for byte in tl.static_range(1, SIZE):
            inside = there & (at + byte < row_bytes)
            more = tl.load(packed + start * row_bytes + at + byte, mask=inside, other=0).to(WORD)
            found = found | (more << (8 * byte))
    return found


@triton.jit
def decoded(values, absmax, mean, unit, at, inside, STORAGE: tl.constexpr):
    """Scales or offsets at the flat positions `at`, float32, in the operations of `ValueStorage.decode`."""
    if STORAGE == DOUBLE:
        code = tl.load(values + at, mask=inside, other=0).to(tl.int32)
        scaled = tl.load(unit + code) * tl.load(absmax + at // SUPER, mask=inside, other=0)
        return scaled + tl.load(mean)
    else:
        return tl.load(values + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def grid_of(scales, offsets, at, there, SHIFTED: tl.constexpr):
    """Scale and offset of some rows' groups at the flat positions `at`, float32 `[rows, 1]`."""
    scale = tl.load(scales + at, mask=there, other=1)[:, None]
    shift = tl.zeros_like(scale)
    if SHIFTED:
        shift = tl.load(offsets + at, mask=there, other=0)[:, None]
    return scale, shift


@triton.jit
def rounded(value):
    """The nearest whole number, halves to even, of float32 below 2**22: the sum has no bits left for a fraction."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def narrowed(value, dtype: tl.constexpr):
    """Float32 rounded to `dtype`, to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off, where a card rounds
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def nearest_code(value, mids, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Code of the nearest level, int32: a whole number for `COUNT == 0`, or how many of the thresholds lie below."""
    if COUNT == 0:
        top = 2.0**BITS - 1
        return tl.minimum(tl.maximum(rounded(tl.minimum(tl.maximum(value, -1.0), top + 1)), 0.0), top).to(tl.int32)
    elif COUNT == 255:
        code = tl.zeros_like(value).to(tl.int32)
        for half in tl.static_range(8):
            code += tl.where(value > tl.load(mids + code + ((128 >> half) - 1)), 128 >> half, 0)
        return code
    else:
        code = tl.zeros_like(value).to(tl.int32)
        for threshold in tl.static_range(COUNT):
            code += (value > tl.load(mids + threshold)).to(tl.int32)
        return code


@triton.jit
def level_of(code, levels, LOOKUP: tl.constexpr):
    """The level that belongs to each code, as float32."""
    if LOOKUP:
        return tl.load(levels + code)
    else:
        return code.to(tl.float32)
