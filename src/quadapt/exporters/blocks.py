"""GGML's legacy blocks, written straight from codes, scales and offsets.

A block holds 32 weights of a row: a scale (float16), an offset (float16, if it has one), and the codes. It means
`scale * code + offset`, computed in float32 and in this order: our own stored form. A block without an offset means
`scale * (code - middle)`, which is symmetric integers in our stored form, exactly: their offset is the scale times a
power of two. IQ4_NL looks codes up in a table of 16 whole numbers, `scale * table[code]`: our levels `iq4-nl`. A wider
group is the same scale and offset in several blocks, and codes may be narrower than a block's.

Of codes of four and five bits, byte `j` of sixteen has the four low bits of weight `j` in its low half and those of
weight `j + 16` in its high half. The fifth bits stand before them, as 32 bits in the order of the weights. Codes of
eight bits are signed bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quadapt.kernels import dequantize
from quadapt.kernels.reference import rows_per_chunk
from quadapt.quant.format import Format
from quadapt.quant.weight import Layout, QuantWeight

BLOCK = 32
"""How many weights share a scale in GGML's blocks."""


@dataclass(frozen=True)
class Block:
    """One of GGML's types of blocks."""

    name: str
    """The name of the type of block in GGML."""

    bits: int
    """The width of the block's codes in bits."""

    shifted: bool
    """Whether it has an offset of its own; otherwise its levels lie symmetric about zero."""

    holds: str
    """What it is used for, in plain words, as the subject of "cost .. bits per weight"."""

    levels: str = field(default="int", kw_only=True)
    """The kind of levels that its codes stand for."""

    weights: int = field(default=BLOCK, kw_only=True)
    """How many weights of a row a block holds."""

    file_type: str = field(default="", kw_only=True)
    """What llama.cpp calls a file of such blocks; empty if that is the name of the type."""

    @property
    def nbytes(self) -> int:
        """How many bytes one block takes."""
        return (4 if self.shifted else 2) + BLOCK * self.bits // 8

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, the scale and the offset included."""
        return 8 * self.nbytes / self.weights


BLOCKS = (
    Block("Q4_0", 4, shifted=False, holds="symmetric codes of 2, 3 and 4 bits all"),
    Block("IQ4_NL", 4, shifted=False, holds="codes of iq4-nl", levels="iq4-nl"),
    Block("Q4_1", 4, shifted=True, holds="2-, 3- and 4-bit codes all"),
    Block("Q5_0", 5, shifted=False, holds="symmetric 5-bit codes"),
    Block("Q5_1", 5, shifted=True, holds="5-bit codes"),
    Block("Q8_0", 8, shifted=False, holds="symmetric codes of 6 and 8 bits both"),
)
"""The types of blocks, smallest first."""


def block_for(format: Format) -> Block | None:
    """The smallest block for codes of a format, with an offset if its codes have one; None if there is none."""
    shifted = format.zero != "none"
    alike = (block for block in BLOCKS if block.levels == format.levels and block.shifted == shifted)
    return next((block for block in alike if format.bits <= block.bits), None)


def cannot_hold(weight: QuantWeight) -> str:
    """Why no block can hold a weight bit for bit; an empty string if one can."""
    why = _objection(weight.layout)
    if why:
        return why
    for name, values in _numbers(weight).items():
        if not _exact_in_half(values):
            return f"its {name} ({getattr(weight.layout.storage, name)}) are not all exact in float16"
    return ""


def cannot_hold_layout(layout: Layout) -> str:
    """Why no block can hold weights of a layout bit for bit, or may not; an empty string if one can."""
    why, storage = _objection(layout), layout.storage
    if why:
        return why
    if not storage.of_scales.exact_in(torch.float16):
        return f"its scales ({storage.scales}) may not be exact in float16"
    if layout.format.zero == "integer":
        return "its offsets (zero-points times scales) may not be exact in float16"
    if layout.format.zero == "float" and not storage.of_offsets.exact_in(torch.float16):
        return f"its offsets ({storage.offsets}) may not be exact in float16"
    return ""


def _objection(layout: Layout) -> str:
    """What keeps weights of a layout from any block, whatever their scales and offsets; empty if nothing does."""
    format = layout.format
    why = shape_objection(layout)
    if not why and block_for(format) is None and format.levels != "int":
        return f"{format.name} has offsets, and IQ4_NL none. Use --zero none"
    if not why and block_for(format) is None:
        return f"{format.bits}-bit codes with offsets fit no block (without offsets they do: --zero none)"
    return why


def shape_objection(layout: Layout) -> str:
    """What keeps codes from any block, whatever their width: levels, order and rows; empty if nothing does."""
    format, columns = layout.format, layout.columns
    if format.levels not in {block.levels for block in BLOCKS}:
        return f"the levels of {format.name} are not evenly spaced (--quant-type iq4-nl has those of IQ4_NL)"
    if layout.permuted:
        return "its inputs are permuted"
    if columns % BLOCK:
        return f"{columns} inputs are not a multiple of {BLOCK}"
    if format.width(columns) % BLOCK:
        return f"groups of {format.width(columns)} inputs are not a multiple of {BLOCK}"
    return ""


def _numbers(weight: QuantWeight) -> dict[str, Tensor]:
    """What a block holds beside codes, `[out, groups]` each."""
    offsets = weight.offsets if weight.format.zero != "none" else None
    return {"scales": weight.scales} if offsets is None else {"scales": weight.scales, "offsets": offsets}


def _exact_in_half(values: Tensor) -> bool:
    half = values.half()
    return bool((half.float() == values).all() & torch.isfinite(half).all())


def blocks_of(weight: QuantWeight) -> np.ndarray:
    """The blocks of a weight for which :func:`cannot_hold` has no objection, of the type that :func:`block_for` names.

    Returns:
        uint8 `[out, in / 32 * block.nbytes]`; a row of the matrix is a row here.
    """
    layout, block = weight.layout, block_for(weight.format)
    assert block is not None
    head = torch.stack(tuple(_numbers(weight).values()), -1).half().view(torch.uint8)
    head = head.repeat_interleave(layout.format.width(layout.columns) // BLOCK, dim=1)
    result = torch.empty(layout.out, layout.columns // BLOCK, block.nbytes, dtype=torch.uint8)
    result[..., : head.shape[-1]] = head[:, : result.shape[1]]  # the last group of a row may be shorter
    middle = 0 if block.shifted else 2 ** (block.bits - 1) - 2 ** (layout.format.bits - 1)
    step = rows_per_chunk(layout.columns)
    for packed, part in zip(weight.packed.split(step), result.split(step), strict=True):
        codes = codes_of(packed, weight).add_(middle).unflatten(1, (-1, BLOCK))
        part[..., head.shape[-1] :] = _laid_out(codes, block.bits)
    return result.flatten(1).numpy()


def _laid_out(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[rows, blocks, 32]` as the bytes of a block, `[rows, blocks, 4 * bits]`."""
    if bits == 8:
        return codes ^ 128  # to signed bytes: less the middle
    low, high = (codes & 15).unflatten(-1, (2, BLOCK // 2)).unbind(-2)
    bytes_ = low | high << 4
    if bits == 4:
        return bytes_
    fifth = ((codes >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return torch.cat((fifth, bytes_), -1)


def codes_of(packed: Tensor, weight: QuantWeight) -> Tensor:
    """Codes of some packed rows, uint8 `[rows, in]`: with a scale of one, the fastest way to unpack them."""
    columns, ones = weight.layout.columns, torch.ones(packed.shape[0], 1, device=packed.device)
    return dequantize(packed, ones, None, None, weight.format.bits, columns, columns, torch.float32).to(torch.uint8)
