"""The compute-heavy steps, each written once per kind of device, behind one dispatch.

`reference.py` (plain torch) serves every device and is what the others are tested against; `cpu.py` (numba) serves the
CPU. A further set of kernels is one module with the same signatures and one line in :func:`kernels_for`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from quadapt.kernels import reference
from quadapt.kernels.reference import expand, midpoints, pack, pool, unpack

__all__ = ["dequantize", "expand", "kernels_for", "midpoints", "pack", "pool", "unpack"]


def kernels_for(device: torch.device) -> ModuleType:
    """The fastest set of kernels for tensors on `device`."""
    if device.type == "cpu":
        from quadapt.kernels import cpu  # numba takes half a second to import: only when a weight is first touched

        return cpu
    return reference


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

    One opaque operator, so that `torch.compile` traces past it; the matrix product stays outside, where autocast sees
    it.

    Args:
        packed: uint8 `[out, ceil(columns * bits / 8)]`.
        scales: float32 `[out, groups]`.
        offsets: float32 `[out, groups]`, or None for zero.
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
