"""The compute-heavy steps, each written once per kind of device, behind one dispatch (`dispatch.py`).

What runs in a training step is an opaque operator with a fake kernel: `torch.compile` traces past it, and CUDA graphs
record what it launches. Where nothing is traced, kernels are called without the operator (`dispatch.at_once`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quadapt.kernels.dispatch import few, kernels_for, operator
from quadapt.kernels.reference import as_floats, expand, midpoints, pack, pool, unpack

__all__ = [
    "dequantize",
    "expand",
    "few",
    "kernels_for",
    "midpoints",
    "narrow",
    "pack",
    "pool",
    "product",
    "unpack",
    "widen",
]


@operator("quadapt::dequantize")
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
    """Dequantize: `scales * levels[codes] + offsets`, computed in float32 and rounded once to `dtype`.

    The matrix product stays outside of the operator, where autocast sees it.

    Args:
        packed: uint8 `[out, ceil(columns * bits / 8)]`.
        scales: float16 or float32 `[out, groups]`, or the bytes of these, uint8 `[out, groups * itemsize]`.
        offsets: float16 or float32 `[out, groups]`, or the bytes of these; None for zero.
        levels: float32 `[2**bits]`, or None for the integers 0 to `2**bits - 1`.
        bits: The width of a code in bits.
        group_size: How many inputs share a scale; at least `columns` for whole rows.
        columns: How many inputs a row has.
        dtype: The dtype of the result.

    Returns:
        `[out, columns]`, on the device of `packed`.
    """
    groups = -(-columns // group_size)
    scales, offsets = _floats(scales, groups), None if offsets is None else _floats(offsets, groups)
    return kernels_for(packed.device).dequantize(packed, scales, offsets, levels, bits, group_size, columns, dtype)


def _floats(stored: Tensor, groups: int) -> Tensor:
    """Floats of `groups` in a row, which may come as their bytes: then traced programs need not copy to view them."""
    if stored.dtype != torch.uint8:
        return stored
    return as_floats(stored, {2: torch.float16, 4: torch.float32}[stored.shape[-1] // groups])


@dequantize.register_fake
def _(
    packed: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    levels: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(packed.shape[0], columns, dtype=dtype)


@operator("quadapt::widen")
def widen(codes: Tensor, absmax: Tensor, mean: Tensor, unit: Tensor) -> Tensor:
    """Doubly quantized scales or offsets, float32 `[out, groups]`: `unit[codes] * absmax + mean`, each rounded.

    Args:
        codes: uint8 `[out, groups]`.
        absmax: uint8 `[n, 4]`, the bytes of float32 numbers, one for 256 codes in row-major order.
        mean: uint8 `[1, 4]`, the bytes of a float32 number.
        unit: float32 `[256]`, the levels.
    """
    return kernels_for(codes.device).widen(codes, *(_floats(each, 1).flatten() for each in (absmax, mean)), unit)


@widen.register_fake
def _(codes: Tensor, absmax: Tensor, mean: Tensor, unit: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@operator("quadapt::product")
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
    """`x @ W.T` of few tokens, without making `W`; all in float32, rounded once. No gradients.

    Args:
        x: `[tokens, columns]`, float16, bfloat16 or float32.
        packed: uint8 `[out, ceil(columns * bits / 8)]`.
        scales: What is held: one tensor as :func:`dequantize` takes it, or the four that :func:`widen` takes.
        offsets: The same forms; or uint8 zero-points `[out, groups]`, the offset being `-scale * zero`; or nothing, for
            what the format implies: zero for a table of levels, `-scale * 2**(bits - 1)` for integers.
        levels: float32 `[2**bits]`, or None for the integers 0 to `2**bits - 1`.
        bits: The width of a code in bits.
        group_size: How many inputs share a scale; at least `columns` for whole rows.
        columns: How many inputs a row has.

    Returns:
        `[tokens, out]`, in the dtype of `x`.
    """
    groups = -(-columns // group_size)
    scales, offsets = _held(scales, groups), _held(offsets, groups)
    return kernels_for(x.device, "product").product(x, packed, scales, offsets, levels, bits, group_size, columns)


def _held(tensors: Sequence[Tensor], groups: int) -> list[Tensor]:
    """Bytes of floats as floats; codes and zero-points, one byte a group, stay."""
    if len(tensors) == 4:
        codes, absmax, mean, unit = tensors
        return [codes, _floats(absmax, 1).flatten(), _floats(mean, 1).flatten(), unit]
    return [each if each.shape[-1] == groups else _floats(each, groups) for each in tensors]


@product.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    levels: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as floats of a narrower dtype, which a program that `torch.compile` makes rounds to that dtype, too.

    A compiler leaves numbers wide that are made narrow and widened again in one program, and would train with scales
    that no merge stores: for it this is an operator that it cannot see into.
    """
    return _narrow_operator(values, dtype) if torch.compiler.is_compiling() else values.to(dtype)


def _narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype, copy=True)  # an operator may not give back what it was given


_narrow_operator = torch.library.custom_op("quadapt::narrow", _narrow, mutates_args=())


@_narrow_operator.register_fake
def _(values: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(values, dtype=dtype)
