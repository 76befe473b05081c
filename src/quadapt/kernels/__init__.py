"""The compute-heavy steps, each written once per kind of device, behind one dispatch (`dispatch.py`).

What runs in a training step is an opaque operator with a fake kernel: `torch.compile` traces past it, and CUDA graphs
record what it launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quadapt.kernels.dispatch import few, kernels_for
from quadapt.kernels.reference import expand, midpoints, pack, pool, unpack

__all__ = ["dequantize", "expand", "few", "kernels_for", "midpoints", "pack", "pool", "product", "unpack"]


@torch.library.custom_op("quadapt::dequantize", mutates_args=())
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
        scales: float16 or float32 `[out, groups]`.
        offsets: Likewise, or None for zero.
        levels: float32 `[2**bits]`, or None for the integers 0 to `2**bits - 1`.
        bits: Width of a code.
        group_size: Inputs that share a scale; at least `columns` for whole rows.
        columns: Inputs in a row.
        dtype: Of the result.

    Returns:
        `[out, columns]`, on the device of `packed`.
    """
    return kernels_for(packed.device).dequantize(packed, scales, offsets, levels, bits, group_size, columns, dtype)


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


@torch.library.custom_op("quadapt::product", mutates_args=())
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
        packed: As for :func:`dequantize`.
        scales: As they are held: floats `[out, groups]`; or, doubly quantized, uint8 codes `[out, groups]`, a float32
            constant for each 256, their mean, and the levels of codes `[256]`.
        offsets: Likewise; or uint8 zero-points `[out, groups]`, the offset being `-scale * zero`; or nothing, for
            what the format implies: zero for a table of levels, `-scale * 2**(bits - 1)` for integers.
        levels: As for :func:`dequantize`; so are `bits`, `group_size` and `columns`.
        bits: See there.
        group_size: See there.
        columns: See there.

    Returns:
        `[tokens, out]`, in the dtype of `x`.
    """
    from quadapt.kernels import product_cuda

    return product_cuda.product(x, packed, scales, offsets, levels, bits, group_size, columns)


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
