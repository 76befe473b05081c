"""GGML's Q4_1 blocks, written straight from codes, scales and offsets.

A block holds 32 weights of a row in 20 bytes: scale (float16), offset (float16), and 16 bytes of which byte `j` has the
code of weight `j` in its low half and that of weight `j + 16` in its high half. It means `scale * code + offset`,
computed in float32 and in this order: our own stored form. A wider group is the same scale and offset in several
blocks, and 2- and 3-bit codes are small 4-bit codes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quadapt.kernels import dequantize
from quadapt.kernels.reference import rows_per_chunk
from quadapt.quant.weight import QuantWeight

BLOCK = 32
"""Weights in a block."""

BLOCK_BYTES = 20
"""Bytes of a block: 5.0 bits per weight."""


def cannot_hold(weight: QuantWeight) -> str:
    """Why Q4_1 blocks cannot hold a weight bit for bit; an empty string if they can."""
    format, columns = weight.format, weight.layout.columns
    if format.levels != "int":
        return f"the levels of {format.name} are not evenly spaced"
    if format.bits > 4:
        return f"{format.bits}-bit codes do not fit the block's 4 bits"
    if weight.layout.permuted:
        return "its inputs are permuted"
    if columns % BLOCK:
        return f"{columns} inputs are not a multiple of {BLOCK}"
    if format.width(columns) % BLOCK:
        return f"groups of {format.width(columns)} inputs are not a multiple of {BLOCK}"
    for name, values in (("scales", weight.scales), ("offsets", weight.offsets)):
        if values is None or not _exact_in_half(values):
            return f"its {name} ({getattr(weight.layout.storage, name)}) are not all exact in float16"
    return ""


def _exact_in_half(values: Tensor) -> bool:
    half = values.half()
    return bool((half.float() == values).all() & torch.isfinite(half).all())


def q4_1(weight: QuantWeight) -> np.ndarray:
    """The blocks of a weight for which :func:`cannot_hold` has no objection.

    Returns:
        uint8 `[out, in / 32 * 20]`; a row of the matrix is a row here.
    """
    out, blocks, offsets = weight.layout.out, weight.layout.columns // BLOCK, weight.offsets
    assert offsets is not None  # integers have them, stored or implied
    heads = torch.stack((weight.scales, offsets), -1).half().view(torch.uint8)
    heads = heads.repeat_interleave(weight.format.width(weight.layout.columns) // BLOCK, dim=1)
    result = torch.empty(out, blocks, BLOCK_BYTES, dtype=torch.uint8)
    result[..., :4] = heads[:, :blocks]  # the last group of a row may be shorter
    step = rows_per_chunk(weight.layout.columns)
    for packed, part in zip(weight.packed.split(step), result.split(step), strict=True):
        codes = _codes(packed, weight).view(-1, blocks, 2, BLOCK // 2)
        part[..., 4:] = codes[:, :, 0] | codes[:, :, 1] << 4
    return result.flatten(1).numpy()


def _codes(packed: Tensor, weight: QuantWeight) -> Tensor:
    """Codes of some packed rows, uint8 `[rows, in]`: with a scale of one, the fastest way to unpack them."""
    columns, ones = weight.layout.columns, torch.ones(packed.shape[0], 1, device=packed.device)
    return dequantize(packed, ones, None, None, weight.format.bits, columns, columns, torch.float32).to(torch.uint8)
