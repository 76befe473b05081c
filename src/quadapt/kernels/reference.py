"""The kernels in plain torch: any device, any float dtype, meant to be read and to be compared with.

A packed row is a little-endian stream of bits: code `i` occupies bits `i * bits` to `(i + 1) * bits - 1` of the row, so
eight codes fill exactly `bits` bytes. Rows are worked on in chunks, so that the temporaries stay small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quadapt.errors import ShapeError
from quadapt.widths import check_width

_CHUNK = 1 << 22
"""Weights that one step works on: bounds the temporaries (some eight times as large) at 100 to 300 MB."""


def rows_per_chunk(columns: int) -> int:
    """Rows of `columns` weights that one step works on."""
    return max(1, _CHUNK // max(1, columns))


def check_codes(levels: Tensor | None, bits: int) -> None:
    """Refuse codes that the kernels would get wrong: every kernel calls this before it computes.

    Args:
        levels: A table of levels `[2**bits]`, or None for integers.
        bits: Width of a code.

    Raises:
        ConfigError: There are no such codes of so many bits (`quadapt.widths`).
        ShapeError: The table has another number of levels than there are codes.
    """
    check_width("int" if levels is None else "table", bits)
    if levels is not None and len(levels) != 2**bits:
        raise ShapeError(f"a table of {len(levels)} levels does not fit codes of {bits} bits. Give {2**bits} levels")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (uint8 `[out, in]`, each below `2**bits`) into uint8 `[out, ceil(in * bits / 8)]`."""
    check_codes(None, bits)
    columns = codes.shape[1]
    nbytes = -(-columns * bits // 8)
    shifts = torch.arange(8, device=codes.device) * bits
    byte = torch.arange(bits, device=codes.device) * 8
    padded = torch.nn.functional.pad(codes, (0, -columns % 8)).unflatten(1, (-1, 8)).long()
    words = (padded << shifts).sum(-1)  # one word of 8 * bits <= 64 bits for eight codes
    return ((words[..., None] >> byte) & 0xFF).to(torch.uint8).flatten(1)[:, :nbytes].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo :func:`pack`: uint8 codes `[out, columns]`."""
    check_codes(None, bits)
    shifts = torch.arange(8, device=packed.device) * bits
    byte = torch.arange(bits, device=packed.device) * 8
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits)).long()
    words = (padded << byte).sum(-1)
    return ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(1)[:, :columns]


def expand(groups: Tensor, group_size: int, columns: int) -> Tensor:
    """Repeat one value a group `[out, groups]` to one a weight `[out, columns]`; the last group may be shorter."""
    return groups.repeat_interleave(group_size, dim=1)[:, :columns]


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
    """Compute `scales * levels[codes] + offsets` in float32 (float64 for float64), then round once to `dtype`."""
    check_codes(levels, bits)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.empty(packed.shape[0], columns, dtype=dtype, device=packed.device)
    step = rows_per_chunk(columns)
    for start in range(0, packed.shape[0], step):
        rows = slice(start, start + step)
        codes = unpack(packed[rows], bits, columns)
        value = codes.to(compute) if levels is None else levels.to(compute)[codes.int()]
        value = value * expand(scales[rows].to(compute), group_size, columns)
        if offsets is not None:
            value = value + expand(offsets[rows].to(compute), group_size, columns)
        weight[rows] = value.to(dtype)
    return weight


def as_floats(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Read bytes (uint8 `[.., n * itemsize]`) as floats `[.., n]`.

    A tensor read from a file may start at any byte; torch views only aligned ones.
    """
    if torch.compiler.is_compiling() or stored.storage_offset() % dtype.itemsize or not stored.is_contiguous():
        stored = stored.clone(memory_format=torch.contiguous_format)
    return stored.view(dtype)


SUPER = 256
"""How many doubly quantized values share a constant."""


def widen(codes: Tensor, absmax: Tensor, mean: Tensor, unit: Tensor) -> Tensor:
    """Compute :func:`quadapt.kernels.widen` in torch, on any device."""
    scaled = unit[codes.int()].flatten() * absmax.repeat_interleave(SUPER)[: codes.numel()]
    return (scaled + mean).view(codes.shape)


def nearest_codes(
    weight: Tensor, scales: Tensor, offsets: Tensor | None, levels: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """Pack the code of the nearest level for each weight (float `[out, in]`), given scales and offsets `[out, groups]`.

    Integers: `round((w - offset) / scale)`, halves to even, clamped. Tables: the nearest level, ties to the lower one.
    """
    check_codes(levels, bits)
    columns = weight.shape[1]
    value = weight.to(scales.dtype)
    if offsets is not None:
        value = value - expand(offsets, group_size, columns)
    value = value / expand(scales, group_size, columns)
    if levels is None:
        codes = value.round().clamp(0, 2**bits - 1).to(torch.uint8)
    else:
        codes = torch.bucketize(value, midpoints(levels).to(value.dtype)).to(torch.uint8)
    return pack(codes, bits)


def midpoints(levels: Tensor) -> Tensor:
    """Thresholds between neighbouring levels, `[levels - 1]`, in the dtype of `levels`."""
    return (levels[1:] + levels[:-1]) / 2


def group_error(
    weight: Tensor, scales: Tensor, offsets: Tensor | None, levels: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """Sum over each group of the squared error of rounding to nearest, in the dtype of `scales`, `[out, groups]`."""
    check_codes(levels, bits)
    columns = weight.shape[1]
    packed = nearest_codes(weight, scales, offsets, levels, bits, group_size)
    rounded = dequantize(packed, scales, offsets, levels, bits, group_size, columns, scales.dtype)
    missed = torch.nn.functional.pad(rounded - weight, (0, -columns % group_size))
    return missed.square().unflatten(1, (-1, group_size)).sum(-1)


def compensate(
    weight: Tensor, upper: Tensor, scales: Tensor, offsets: Tensor | None, levels: Tensor | None, bits: int
) -> Tensor:
    """GPTQ's inner loop over columns that share a scale: round one column, hand its error on to those after it.

    Args:
        weight: `[out, n]`, float. On return it holds the errors `(w - w_rounded) / upper[i, i]`, column by column.
        upper: `[n, n]`, the block of the upper Cholesky factor of the inverse second moment that belongs to these
            columns.
        scales: `[out]`, the scale that the columns of each row share.
        offsets: `[out]`, or None for zero.
        levels: A table of levels `[2**bits]`, or None for integers.
        bits: Width of a code.

    Returns:
        uint8 codes `[out, n]`.
    """
    check_codes(levels, bits)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = scales.to(weight.dtype)
    shift = torch.zeros_like(scales) if offsets is None else offsets.to(weight.dtype)
    table = torch.arange(2**bits, device=weight.device) if levels is None else levels
    for i in range(weight.shape[1]):
        value = (weight[:, i] - shift) / scales
        if levels is None:
            codes[:, i] = value.round().clamp(0, 2**bits - 1).to(torch.uint8)
        else:
            codes[:, i] = torch.bucketize(value, midpoints(levels).to(value.dtype)).to(torch.uint8)
        rounded = table.to(weight.dtype)[codes[:, i].int()] * scales + shift
        weight[:, i] = (weight[:, i] - rounded) / upper[i, i]
        weight[:, i + 1 :] -= weight[:, i : i + 1] * upper[i, i + 1 :]
    return codes


def group_range(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, float32 `[out, groups]` (float64 for float64)."""
    columns = weight.shape[1]
    value = weight if weight.dtype == torch.float64 else weight.float()
    fill = -columns % group_size
    if fill:  # repeat the row's last weight: it belongs to the short group already
        value = torch.cat([value, value[:, -1:].expand(-1, fill)], dim=1)
    grouped = value.unflatten(1, (-1, group_size))
    return grouped.amin(-1), grouped.amax(-1)


def pool(x: Tensor, group_size: int) -> Tensor:
    """Sum inputs over each group: `[..., in]` to float32 `[..., groups]` (float64 for float64)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    fill = -x.shape[-1] % group_size
    if fill:
        x = torch.nn.functional.pad(x, (0, fill))
    return x.unflatten(-1, (-1, group_size)).sum(-1, dtype=dtype)
