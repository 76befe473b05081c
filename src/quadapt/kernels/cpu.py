"""The kernels for the CPU: numba, one pass over the packed bytes, rows shared out over threads.

Tensors are handed over as addresses. Turning a parameter into a NumPy array would make its storage non-resizable, which
FSDP2 needs it to be. The signatures are those of `reference.py`, whose results these equal: codes exactly, weights bit
for bit.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from torch import Tensor

from quadapt.kernels import reference
from quadapt.kernels.compiled import jit
from quadapt.kernels.lanes import BF16, FP16, FP32, LANES, decode16, pointer
from quadapt.kernels.reference import SUPER
from quadapt.kernels.threads import over_rows

__all__ = ["compensate", "dequantize", "group_error", "group_range", "nearest_codes", "widen"]

_DTYPES = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}
_u8, _f32 = pointer(types.uint8), pointer(types.float32)


@jit
def _decode_run(dtype, lookup, source, runs, bits, scale, offset, table, target):
    """Decode `runs` runs of 16 codes that share one scale and offset."""
    size = 4 if dtype == FP32 else 2
    for _ in range(runs):
        if lookup:
            if dtype == BF16:
                decode16(BF16, 1, source, bits, scale, offset, table, target)
            elif dtype == FP16:
                decode16(FP16, 1, source, bits, scale, offset, table, target)
            else:
                decode16(FP32, 1, source, bits, scale, offset, table, target)
        elif dtype == BF16:
            decode16(BF16, 0, source, bits, scale, offset, table, target)
        elif dtype == FP16:
            decode16(FP16, 0, source, bits, scale, offset, table, target)
        else:
            decode16(FP32, 0, source, bits, scale, offset, table, target)
        source += 2 * bits
        target += LANES * size


@jit
def _decode_rows(
    dtype, lookup, packed, rows, row_bytes, scales, offsets, shifted, table, target, first, last, columns, bits, group
):
    """Rows `first` to `last`. The vector step reads ahead: the last runs of all, and broken ones, are copied first."""
    size = 4 if dtype == FP32 else 2
    groups = -(-columns // group)
    scale, offset = numba.carray(_f32(scales), (rows, groups)), numba.carray(_f32(offsets), (rows, groups))
    bytes_in, bytes_out = (
        numba.carray(_u8(packed), (rows, row_bytes)),
        numba.carray(_u8(target), (rows, columns * size)),
    )
    spare_in, spare_out = np.zeros(32, np.uint8), np.zeros(64, np.uint8)
    for row in range(first, last):
        for k in range(groups):
            start = k * group
            count = min(group, columns - start)
            at = start * bits // 8
            shift = offset[row, k] if shifted else np.float32(0)
            left = (rows - row) * row_bytes - at
            safe = min(count // LANES, max(0, (left - 8 + bits) // (2 * bits)))
            _decode_run(
                dtype,
                lookup,
                packed + row * row_bytes + at,
                safe,
                bits,
                scale[row, k],
                shift,
                table,
                target + (row * columns + start) * size,
            )
            for i in range(safe * LANES, count, LANES):
                here = (start + i) * bits // 8
                spare_in[:] = 0
                for j in range(min(2 * bits, row_bytes - here)):
                    spare_in[j] = bytes_in[row, here + j]
                _decode_run(
                    dtype, lookup, spare_in.ctypes.data, 1, bits, scale[row, k], shift, table, spare_out.ctypes.data
                )
                for j in range(min(LANES, count - i) * size):
                    bytes_out[row, (start + i) * size + j] = spare_out[j]


@jit
def _decode_bytes(packed, scales, offsets, shifted, levels, weight, first, last, group):
    """Eight-bit tables have too many levels for one register: look up one by one."""
    columns = weight.shape[1]
    codes = numba.carray(_u8(packed), weight.shape)
    for row in range(first, last):
        for start in range(0, columns, group):
            scale, offset = scales[row, start // group], offsets[row, start // group] if shifted else np.float32(0)
            for i in range(start, min(start + group, columns)):
                weight[row, i] = levels[codes[row, i]] * scale + offset


@jit
def _below(value, mids):
    """How many thresholds lie below `value`: all are compared at once, but of the 255 of eight bits, eight."""
    code = 0
    if len(mids) < 255:
        for t in range(len(mids)):
            code += value > mids[t]
        return code
    step = 128
    while step:
        code += step * (value > mids[code + step - 1])
        step >>= 1
    return code


@jit
def _encode_rows(weight, scales, offsets, shifted, mids, bits, group, packed, first, last):
    """Nearest code of each weight, then eight codes into `bits` bytes. No thresholds: levels 0 .. 2**bits - 1."""
    columns = weight.shape[1]
    top = np.float32(2**bits - 1)
    codes = np.zeros(columns + 8, np.uint8)
    value = np.zeros(group, np.float32)
    for row in range(first, last):
        for start in range(0, columns, group):
            count = min(group, columns - start)
            scale, offset = scales[row, start // group], offsets[row, start // group] if shifted else np.float32(0)
            for i in range(count):
                value[i] = (weight[row, start + i] - offset) / scale
            if len(mids) == 0:
                for i in range(count):
                    codes[start + i] = np.uint8(min(max(np.rint(value[i]), np.float32(0)), top))
            elif len(mids) == 255:
                for i in range(count):
                    codes[start + i] = np.uint8(_below(value[i], mids))
            else:
                for i in range(count):
                    codes[start + i] = 0
                for t in range(len(mids)):
                    for i in range(count):
                        codes[start + i] += np.uint8(value[i] > mids[t])
        for j in range(-(-columns // 8)):
            word = np.uint64(0)
            for i in range(8):
                word |= np.uint64(codes[8 * j + i]) << np.uint64(i * bits)
            for b in range(min(bits, packed.shape[1] - j * bits)):
                packed[row, j * bits + b] = np.uint8((word >> np.uint64(8 * b)) & np.uint64(255))


@jit
def _range_rows(weight, group, low, high, first, last):
    columns = weight.shape[1]
    for row in range(first, last):
        for start in range(0, columns, group):
            smallest = largest = weight[row, start]
            bad = np.float32(0)
            for i in range(start, min(start + group, columns)):
                value = weight[row, i]
                smallest = min(smallest, value)
                largest = max(largest, value)
                bad += value - value  # stays zero unless some weight is NaN or infinite
            low[row, start // group] = smallest + bad
            high[row, start // group] = largest + bad


@jit
def _error_rows(weight, scales, offsets, shifted, mids, levels, bits, group, error, first, last):
    columns = weight.shape[1]
    top = np.float32(2**bits - 1)
    for row in range(first, last):
        for start in range(0, columns, group):
            scale, offset = scales[row, start // group], offsets[row, start // group] if shifted else np.float32(0)
            total = np.float32(0)
            for i in range(start, min(start + group, columns)):
                value = (weight[row, i] - offset) / scale
                if len(mids) == 0:
                    value = min(max(np.rint(value), np.float32(0)), top)
                else:
                    value = levels[_below(value, mids)]
                miss = value * scale + offset - weight[row, i]
                total += miss * miss
            error[row, start // group] = total


@jit
def _compensate_rows(weight, upper, scales, offsets, shifted, mids, levels, bits, codes, first, last):
    """GPTQ's inner loop over a few columns: round one, hand its error on. Leaves the errors in `weight`."""
    columns = weight.shape[1]
    zero = scales[0] - scales[0]  # of their dtype: a literal would turn float32 arithmetic into float64
    top = zero + np.float32(2**bits - 1)
    for row in range(first, last):
        scale, offset = scales[row], offsets[row] if shifted else zero
        for i in range(columns):
            value = (weight[row, i] - offset) / scale
            if len(mids) == 0:
                level = min(max(np.rint(value), zero), top)
                code = np.uint8(level)
            else:
                code = np.uint8(0)
                for t in range(len(mids)):
                    code += np.uint8(value > mids[t])
                level = levels[code]
            codes[row, i] = code
            miss = (weight[row, i] - (level * scale + offset)) / upper[i, i]
            weight[row, i] = miss
            for j in range(i + 1, columns):
                weight[row, j] -= miss * upper[i, j]


@jit
def _widen_blocks(codes, absmax, mean, unit, values, count, first, last):
    """Blocks `first` to `last` of values that share a constant."""
    code, value = numba.carray(_u8(codes), count), numba.carray(_f32(values), count)
    constant, level = numba.carray(_f32(absmax), last), numba.carray(_f32(unit), 256)
    middle = numba.carray(_f32(mean), 1)[0]
    for block in range(first, last):
        for i in range(block * SUPER, min((block + 1) * SUPER, count)):
            value[i] = level[code[i]] * constant[block] + middle


def widen(codes: Tensor, absmax: Tensor, mean: Tensor, unit: Tensor) -> Tensor:
    """Decode doubly quantized values on the CPU, float32, bit for bit as `reference.widen` does."""
    codes, values = codes.contiguous(), torch.empty(codes.shape)
    constants = [each.contiguous() for each in (absmax, mean, unit)]
    arrays = codes.data_ptr(), *(each.data_ptr() for each in constants), values.data_ptr(), codes.numel()
    over_rows(lambda first, last: _widen_blocks(*arrays, first, last), -(-codes.numel() // SUPER), SUPER)
    return values


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
    """Dequantize on the CPU to `[out, columns]` in `dtype`, bit for bit as `reference.dequantize` does."""
    reference.check_codes(levels, bits)
    if dtype not in _DTYPES or (group_size % LANES and group_size < columns):
        return reference.dequantize(packed, scales, offsets, levels, bits, group_size, columns, dtype)
    rows = packed.shape[0]
    scales, shifts = (each.float().contiguous() for each in (scales, scales if offsets is None else offsets))
    if levels is not None and len(levels) > LANES:
        weight = torch.empty(rows, columns)
        packed = packed.contiguous()
        arrays = (
            packed.data_ptr(),
            _numpy(scales),
            _numpy(shifts),
            offsets is not None,
            _numpy(levels),
            weight.numpy(),
        )
        over_rows(lambda first, last: _decode_bytes(*arrays, first, last, group_size), rows, columns)
        return weight.to(dtype)
    weight = torch.empty(rows, columns, dtype=dtype)
    packed = packed.contiguous()
    table = scales if levels is None else torch.nn.functional.pad(levels, (0, LANES - len(levels)))
    over_rows(
        lambda first, last: _decode_rows(
            _DTYPES[dtype],
            levels is not None,
            packed.data_ptr(),
            rows,
            packed.shape[1],
            scales.data_ptr(),
            shifts.data_ptr(),
            offsets is not None,
            table.data_ptr(),
            weight.data_ptr(),
            first,
            last,
            columns,
            bits,
            group_size,
        ),
        rows,
        columns,
    )
    return weight


def nearest_codes(
    weight: Tensor, scales: Tensor, offsets: Tensor | None, levels: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """Pack on the CPU the codes of the nearest levels, as `reference.nearest_codes` does."""
    reference.check_codes(levels, bits)
    if scales.dtype != torch.float32:
        return reference.nearest_codes(weight, scales, offsets, levels, bits, group_size)
    rows, columns = weight.shape
    packed = torch.empty(rows, -(-columns * bits // 8), dtype=torch.uint8)
    grid = (*_grid(weight, scales, offsets, levels)[:5], bits, group_size, packed.numpy())
    over_rows(lambda first, last: _encode_rows(*grid, first, last), rows, columns)
    return packed


def group_range(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Find each group's extremes as `reference.group_range` does; NaN where a weight is not finite."""
    if weight.dtype == torch.float64:
        return reference.group_range(weight, group_size)
    rows, columns = weight.shape
    low, high = torch.empty(2, rows, -(-columns // group_size))
    arrays = (_numpy(weight.float()), group_size, low.numpy(), high.numpy())
    over_rows(lambda first, last: _range_rows(*arrays, first, last), rows, columns)
    return low, high


def group_error(
    weight: Tensor, scales: Tensor, offsets: Tensor | None, levels: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """Sum each group's squared rounding errors on the CPU, `[out, groups]`, as `reference.group_error` does."""
    reference.check_codes(levels, bits)
    if scales.dtype != torch.float32:
        return reference.group_error(weight, scales, offsets, levels, bits, group_size)
    error = torch.empty_like(scales)
    grid = (*_grid(weight, scales, offsets, levels), bits, group_size, error.numpy())
    over_rows(lambda first, last: _error_rows(*grid, first, last), *weight.shape)
    return error


def compensate(
    weight: Tensor, upper: Tensor, scales: Tensor, offsets: Tensor | None, levels: Tensor | None, bits: int
) -> Tensor:
    """Run GPTQ's inner loop as `reference.compensate` does; leave the errors in `weight`, which must be contiguous."""
    reference.check_codes(levels, bits)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    mids = reference.midpoints(levels) if levels is not None else scales[:0]
    arrays = [_numpy(t.to(weight.dtype)) for t in (upper, scales, scales if offsets is None else offsets)]
    tables = [_numpy(t.to(weight.dtype)) for t in (mids, mids if levels is None else levels)]
    over_rows(
        lambda first, last: _compensate_rows(
            _numpy(weight), *arrays, offsets is not None, *tables, bits, codes.numpy(), first, last
        ),
        weight.shape[0],
        weight.shape[1] ** 2,
    )
    return codes


def _grid(weight: Tensor, scales: Tensor, offsets: Tensor | None, levels: Tensor | None) -> tuple[Any, ...]:
    """Weight, scales, offsets, whether there are any, thresholds, levels: as the compiled loops take them."""
    mids = scales[0, :0] if levels is None else reference.midpoints(levels)
    shifts = scales if offsets is None else offsets
    arrays = [_numpy(t) for t in (weight.float(), scales, shifts)]
    return (*arrays, offsets is not None, _numpy(mids), _numpy(mids if levels is None else levels))


class _Memory:
    """The memory of a tensor as NumPy asks for it: by address, and kept alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.__array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": {torch.float32: "<f4", torch.float64: "<f8"}[tensor.dtype],
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _numpy(tensor: Tensor) -> Any:
    """A NumPy array over a tensor's memory. Not by `.numpy()`: it may be a view of a parameter, see above."""
    memory = _Memory(tensor.detach().contiguous())
    if not tensor.numel():  # has no address, which NumPy before 2.4 takes for no memory at all
        return np.empty(tuple(tensor.shape), memory.__array_interface__["typestr"])
    return np.asarray(memory)
