"""The product of few tokens with a quantized matrix on the CPU, without making the dense matrix.

A dense matrix made for one token is written to memory and read again, many times the bytes of its codes. Here codes are
read once, and levels stay in registers. Scale and offset are taken out of the sum over a group, as on a GPU:

    y[t, o] = sum_g scales[o, g] * sum_i levels[codes[o, i]] x[t, i] + offsets[o, g] * sum_i x[t, i]

All is summed in float32, in an order that depends on the shape alone, so the same inputs give the same bits on any
number of threads. The inner loop is in `product_lanes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from torch import Tensor

from quadapt.kernels.compiled import jit
from quadapt.kernels.dispatch import codes_of_lane
from quadapt.kernels.fake_cpu import _convert, _copy
from quadapt.kernels.lanes import _HAS_FP16, BF16, FP16, FP32, LANES, pointer
from quadapt.kernels.product_lanes import multiply_row
from quadapt.kernels.reference import check_codes
from quadapt.kernels.threads import over_rows

_DTYPES = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}
_HALVES, _SINGLES, _DOUBLE, _ZEROS, _IMPLIED = range(5)
"""How scales or offsets are held: float16, float32, doubly quantized, as zero-points, not at all."""

_SIZES = {_HALVES: 2, _SINGLES: 4} if _HAS_FP16 else {_SINGLES: 4}
"""Bytes of a number of the kinds that the inner loop reads where they are stored."""

_u8, _f32 = pointer(types.uint8), pointer(types.float32)


@jit
def _arrange(x, dtype, tokens, columns, codes, count, vectors, inputs, sums):
    """Lay out up to `count` tokens as the inner loop reads them; sums over lanes beside them. The rest is zeros."""
    size = 4 if dtype == FP32 else 2
    row, copied = np.zeros(vectors * LANES * codes + LANES, np.float32), np.zeros((columns + LANES) * size, np.uint8)
    ordered = numba.carray(_f32(inputs), (vectors, count, codes, LANES))
    ones = numba.carray(_f32(sums), (vectors, count, LANES))
    if tokens < count:
        ordered[:], ones[:] = 0, 0
    for t in range(tokens):
        _copy(x + t * columns * size, copied.ctypes.data, columns * size)  # sixteen at a time go past the end
        _convert(dtype, FP32, copied.ctypes.data, columns, row.ctypes.data)
        for v in range(vectors):
            for lane in range(LANES):
                total = np.float32(0)
                for k in range(codes):
                    value = row[(v * LANES + lane) * codes + k]
                    ordered[v, t, k, lane] = value
                    total += value
                ones[v, t, lane] = total


@jit
def _values(kind, values, absmax, unit, mean, row, rows, groups, target, spare):
    """The scales or offsets of one row, in float32; `target` and `spare` are addresses with room for 16 more."""
    if kind == _DOUBLE:
        codes, table = numba.carray(_u8(values), (rows, groups)), numba.carray(_f32(unit), (256,))
        tops, found = numba.carray(_f32(absmax), (-(-rows * groups // 256),)), numba.carray(_f32(target), (groups,))
        for g in range(groups):
            product = table[codes[row, g]] * tops[(row * groups + g) // 256]
            found[g] = product + mean
        return
    size = 2 if kind == _HALVES else 4
    source = values + row * groups * size
    if (rows - row) * groups < groups + LANES - 1:  # the last ones are copied: sixteen at a time go past the end
        own = groups * size
        _copy(source, spare, own)
        numba.carray(_u8(spare), (own + LANES * size,))[own:] = 0
        source = spare
    _convert(FP16 if kind == _HALVES else FP32, FP32, source, groups, target)


@jit
def _shifts(kind, zeros, half, row, rows, groups, scales, offsets):
    """Offsets of one row that follow from its scales: of zero-points, or implied by the format (`half` the codes)."""
    scale, offset = numba.carray(_f32(scales), (groups,)), numba.carray(_f32(offsets), (groups,))
    if kind == _IMPLIED:
        for g in range(groups):
            offset[g] = -half * scale[g]
        return
    stored = numba.carray(_u8(zeros), (rows, groups))
    for g in range(groups):
        offset[g] = -scale[g] * np.float32(stored[row, g])


@cache
def _rows_of(bits: int, lookup: int, lanes: int, count: int, scale_kind: int, offset_kind: int) -> Any:
    """The loop over rows for one width, kind of levels, length of groups (in lanes), number of tokens, and storages.

    Floats are read where they are stored, which for a short row saves a fifth of the time. What is held otherwise is
    made into floats row by row; so is what belongs to the last codes of a row, if these are not a whole vector.
    """
    step = 2 * bits * codes_of_lane(bits)
    half = np.float32(0 if lookup else 2 ** (bits - 1))
    sizes = _SIZES if bits <= 4 else {}  # wider codes have fewer groups in a vector
    scale_size, offset_size = sizes.get(scale_kind, 0), sizes.get(offset_kind, 0)
    follow = offset_kind in (_IMPLIED, _ZEROS)
    whole_scale, whole_offset = scale_size or 4, offset_size or 4

    @jit
    def multiply(packed, row_bytes, rows, groups, scales, offsets, table, inputs, sums, target, first, last):
        whole, vectors = row_bytes // step, -(-row_bytes // step)
        room = np.zeros((3, groups + 2 * LANES), np.float32)
        codes = np.zeros(step, np.uint8)
        scale = room.ctypes.data
        offset, spare = scale + 4 * room.shape[1], scale + 8 * room.shape[1]
        for row in range(first, last):
            source, y = packed + row * row_bytes, target + 4 * count * row
            if not scale_size or follow or whole < vectors:
                _values(scale_kind, scales[0], scales[1], scales[2], scales[3], row, rows, groups, scale, spare)
            if follow:
                _shifts(offset_kind, offsets[0], half, row, rows, groups, scale, offset)
            elif not offset_size or whole < vectors:
                _values(offset_kind, offsets[0], offsets[1], offsets[2], offsets[3], row, rows, groups, offset, spare)
            s = scales[0] + row * groups * scale_size if scale_size else scale
            o = offsets[0] + row * groups * offset_size if offset_size else offset
            multiply_row(
                bits, lookup, lanes, count, source, 0, whole, s, whole_scale, o, whole_offset, table, inputs, sums, y
            )
            if whole < vectors:  # the last codes are copied: a whole vector would read past them
                left, end = numba.carray(_u8(source + whole * step), (step,)), codes.ctypes.data
                for j in range(row_bytes - whole * step):
                    codes[j] = left[j]
                multiply_row(
                    bits, lookup, lanes, count, end, whole, vectors, scale, 4, offset, 4, table, inputs, sums, y
                )
        return room.size  # so that it lives until here: the loop knows its address alone

    return multiply


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
    """Compute :func:`quadapt.kernels.product` on the CPU: `[tokens, out]` in the dtype of `x`."""
    check_codes(levels, bits)
    (rows, row_bytes), tokens = packed.shape, len(x)
    groups, codes = -(-columns // group_size), codes_of_lane(bits)
    vectors = -(-row_bytes // (2 * bits * codes))
    x, packed = x.contiguous(), packed.contiguous()
    held = [*_held(scales), *_held(offsets)]
    table = _table(bits) if levels is None else _filled(levels)
    count = 1 if tokens == 1 else 2 if tokens == 2 else 4
    lanes = 0 if groups == 1 else group_size // codes
    loop = _rows_of(bits, int(levels is not None), lanes, count, held[0], held[3])
    arranged = torch.empty(vectors * count * (codes + 1) * LANES)
    inputs, sums = arranged.data_ptr(), arranged.data_ptr() + 4 * vectors * count * codes * LANES
    y = torch.zeros(-(-tokens // count), rows, count)
    known = (packed.data_ptr(), row_bytes, rows, groups, held[1], held[4], table.data_ptr(), inputs, sums)
    for chunk in range(len(y)):
        first = chunk * count
        some, begin = min(count, tokens - first), x.data_ptr() + first * columns * x.itemsize
        _arrange(begin, _DTYPES[x.dtype], some, columns, codes, count, vectors, inputs, sums)
        over_rows(partial(loop, *known, y.data_ptr() + 4 * first * rows), rows, columns)
    found = y.view(1, rows) if tokens == 1 else y.transpose(1, 2).reshape(-1, rows)[:tokens].contiguous()
    return found.to(x.dtype)


def _held(tensors: Sequence[Tensor]) -> tuple[int, tuple[int, int, int, float], list[Tensor]]:
    """How scales or offsets are held, and where: values, second-level constants, their table, their mean.

    The tensors beside it are those that the addresses are of.
    """
    if not tensors:
        return _IMPLIED, (0, 0, 0, 0.0), []
    narrow = (torch.uint8, torch.float16, torch.float32)
    kept = [each.contiguous() if each.dtype in narrow else each.float().contiguous() for each in tensors]
    values = kept[0].data_ptr()
    if len(kept) == 4:
        return _DOUBLE, (values, kept[1].data_ptr(), kept[3].data_ptr(), kept[2].item()), kept
    kind = {torch.uint8: _ZEROS, torch.float16: _HALVES}.get(kept[0].dtype, _SINGLES)
    return kind, (values, 0, 0, 0.0), kept


@cache
def _table(bits: int) -> Tensor:
    """The levels of integers, 16 of them: those of fewer bits repeated."""
    return _filled(torch.arange(2.0 ** min(bits, 4)))


def _filled(levels: Tensor) -> Tensor:
    """Sixteen levels or more: fewer are repeated."""
    return levels if len(levels) >= LANES else levels.repeat(LANES // len(levels))
