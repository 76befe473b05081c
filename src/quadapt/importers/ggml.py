"""GGML's blocks, read straight into codes, scales and offsets; the writing side is `exporters/ggml.py`.

A plain block holds 32 weights of a row: a scale and perhaps an offset, both float16, and codes (of IQ4_NL into a table
of levels). A super-block
(K-quants) holds 256 weights in groups of 16 or 32: one or two float16, a code of each group's scale and offset, and
codes of weights. Both are our stored form, in the same order of operations, and so are the numbers that they mean.

Where a scale is zero, so that all weights of a group are equal, the smallest scale and the code of that value stand for
it: nothing here divides by a scale of zero, and the numbers stay what they were. IQ4_NL has no level of zero, so there
a scale of zero stays.

Source: llama.cpp, `ggml/src/ggml-common.h` (the structs) and `ggml-quants.c` (`dequantize_row_q4_K` and its like).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quadapt import kernels
from quadapt.kernels.reference import rows_per_chunk
from quadapt.quant.format import Format, Levels, Zero
from quadapt.quant.storage import Storage
from quadapt.quant.storage.super_block import SUPER_BLOCK, SuperBlock
from quadapt.quant.weight import Layout, QuantWeight

Read = dict[str, Tensor]
"""What blocks hold, by name: `codes` uint8 `[rows, blocks, weights]`; of plain blocks `scales`, `offsets`, float16
`[rows, blocks, 1]`; of super-blocks their codes uint8 `[rows, blocks, groups]`, with `scales_constant` and
`offsets_constant`, float16 `[rows, blocks, 1]`."""

_LEAST = 2.0**-24
"""The smallest positive float16."""


@dataclass(frozen=True)
class Blocks:
    """One of GGML's types of blocks, as it is read."""

    bits: int
    """The width of the codes in bits."""

    zero: Zero
    """Whether it has offsets (float) or levels symmetric about zero (none)."""

    scales: str
    """The name of the storage that holds its scales as they are."""

    group_size: int
    """How many weights share a scale."""

    weights: int
    """How many weights a block has."""

    size: int
    """How many bytes a block has."""

    read: Callable[[Tensor], Read]
    """Takes blocks apart, uint8 `[rows, blocks, bytes]`."""

    levels: Levels = "int"
    """The kind of levels that codes stand for."""

    def layout(self, out: int, columns: int) -> Layout:
        """The layout of a matrix of such blocks."""
        format = Format(levels=self.levels, bits=self.bits, group_size=self.group_size, zero=self.zero)
        return Layout(format=format, storage=Storage.floating(self.scales, self.zero), out=out, columns=columns)

    def weight(self, rows: Tensor, layout: Layout) -> QuantWeight:
        """A matrix in the stored form, of its rows of blocks, uint8 `[out, bytes of a row]`."""
        step, count = rows_per_chunk(layout.columns), layout.columns // self.weights
        chunks = [self._stored(self.read(part.unflatten(1, (count, -1))), layout) for part in rows.split(step)]
        tensors = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        return QuantWeight(layout, {name: tensors[name].view(shape) for name, shape in layout.shapes.items()})

    def _stored(self, found: Read, layout: Layout) -> dict[str, Tensor]:
        """The tensors of some rows in the stored form."""
        scales, constant, held = found["scales"], found.get("scales_constant"), layout.storage.of_scales
        width = held.bits if isinstance(held, SuperBlock) else 0  # of the code of a scale, where it has one
        middle = 2 ** (width - 1) if width and self.zero == "none" else 0  # the code of a scale of zero
        empty = scales == middle if constant is None else (scales == middle) | (constant == 0)
        level = 0 if self.zero == "float" else 2 ** (self.bits - 1)
        codes = found["codes"].unflatten(-1, (scales.shape[-1], -1)).masked_fill(empty[..., None], level)
        smallest = 0.0 if self.levels == "iq4-nl" else _LEAST
        numbers = {**found, "scales": scales.masked_fill(empty, smallest if constant is None else middle + 1)}
        if constant is not None:
            numbers["scales_constant"] = constant.masked_fill(constant == 0, _LEAST)
        tensors = {"weight": kernels.pack(codes.flatten(1).contiguous(), self.bits)}
        for name in numbers.keys() - {"codes"}:
            flat = numbers[name].flatten(1).contiguous()
            tensors[name] = kernels.pack(flat, width) if flat.dtype == torch.uint8 else flat.view(torch.uint8)
        return tensors


def _half(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float16)


def _nibbles(blocks: Tensor) -> Tensor:
    """Codes of sixteen bytes: those in the low halves first."""
    return torch.cat((blocks & 15, blocks >> 4), -1)


def _fifth(blocks: Tensor) -> Tensor:
    """The fifth bits, in place: 32 bits in the order of the weights."""
    bits = blocks[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2) << 4


def _q4_0(blocks: Tensor) -> Read:
    return {"scales": _half(blocks[..., :2]), "codes": _nibbles(blocks[..., 2:])}


def _q4_1(blocks: Tensor) -> Read:
    scales, offsets = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    return {"scales": scales, "offsets": offsets, "codes": _nibbles(blocks[..., 4:])}


def _q5_0(blocks: Tensor) -> Read:
    return {"scales": _half(blocks[..., :2]), "codes": _nibbles(blocks[..., 6:]) | _fifth(blocks[..., 2:6])}


def _q5_1(blocks: Tensor) -> Read:
    scales, offsets = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    return {"scales": scales, "offsets": offsets, "codes": _nibbles(blocks[..., 8:]) | _fifth(blocks[..., 4:8])}


def _q8_0(blocks: Tensor) -> Read:
    return {"scales": _half(blocks[..., :2]), "codes": blocks[..., 2:] ^ 128}  # signed bytes, from zero


def _plane(blocks: Tensor, bits: int, run: int = 32) -> Tensor:
    """Codes `[.., n * 8 / bits]` of a plane `[.., n]`: a byte holds `8 / bits` weights, each `run` apart."""
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8)
    runs = blocks.unflatten(-1, (-1, 1, run)) >> shifts[:, None] & 2**bits - 1
    return runs.flatten(-3)


def _six_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of eight scales and of eight offsets, six bits each, of twelve bytes."""
    low, low_min, high = blocks.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((low & 63, high & 15 | low >> 6 << 4), -1)
    return scales, torch.cat((low_min & 63, high >> 4 | low_min >> 6 << 4), -1)


def _q4_k(blocks: Tensor) -> Read:
    scales, offsets = _six_bits(blocks[..., 4:16])
    return {
        "scales_constant": _half(blocks[..., :2]),
        "offsets_constant": _half(blocks[..., 2:4]),
        "scales": scales,
        "offsets": offsets,
        "codes": _plane(blocks[..., 16:144], 4),
    }


def _q5_k(blocks: Tensor) -> Read:
    low = torch.cat((blocks[..., :16], blocks[..., 48:]), -1)
    found = _q4_k(low)
    return {**found, "codes": found["codes"] | _plane(blocks[..., 16:48], 1) << 4}


def _q2_k(blocks: Tensor) -> Read:
    return {
        "scales": blocks[..., :16] & 15,
        "offsets": blocks[..., :16] >> 4,
        "codes": _plane(blocks[..., 16:80], 2),
        "scales_constant": _half(blocks[..., 80:82]),
        "offsets_constant": _half(blocks[..., 82:84]),
    }


def _q3_k(blocks: Tensor) -> Read:
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    fifth = (high[..., None, :] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3).flatten(-2)
    return {
        "scales": _nibbles(low) | fifth << 4,
        "codes": _plane(blocks[..., 32:96], 2) | _plane(blocks[..., :32], 1) << 2,
        "scales_constant": _half(blocks[..., 108:110]),
    }


def _q6_k(blocks: Tensor) -> Read:
    return {
        "scales": blocks[..., 192:208] ^ 128,  # signed bytes, from zero
        "codes": _plane(blocks[..., :128], 4, run=64) | _plane(blocks[..., 128:192], 2) << 4,
        "scales_constant": _half(blocks[..., 208:210]),
    }


BLOCKS: dict[str, Blocks] = {
    "Q4_0": Blocks(4, "none", "fp16", 32, 32, 18, _q4_0),
    "Q4_1": Blocks(4, "float", "fp16", 32, 32, 20, _q4_1),
    "IQ4_NL": Blocks(4, "none", "fp16", 32, 32, 18, _q4_0, "iq4-nl"),
    "Q5_0": Blocks(5, "none", "fp16", 32, 32, 22, _q5_0),
    "Q5_1": Blocks(5, "float", "fp16", 32, 32, 24, _q5_1),
    "Q8_0": Blocks(8, "none", "fp16", 32, 32, 34, _q8_0),
    "Q2_K": Blocks(2, "float", "q2_k", 16, SUPER_BLOCK, 84, _q2_k),
    "Q3_K": Blocks(3, "none", "q3_k", 16, SUPER_BLOCK, 110, _q3_k),
    "Q4_K": Blocks(4, "float", "q4_k", 32, SUPER_BLOCK, 144, _q4_k),
    "Q5_K": Blocks(5, "float", "q4_k", 32, SUPER_BLOCK, 176, _q5_k),
    "Q6_K": Blocks(6, "none", "q6_k", 16, SUPER_BLOCK, 210, _q6_k),
}
"""The types that are read as they are, by GGML's names for them."""
