"""Checkpoints of HQQ with groups along the inputs (axis 1), as hqq and transformers write them to safetensors.

    W[o, i] = (code[o, i] - zero[o, g]) * scale[o, g],    g = i // group_size

Zero-points are floats. They are held as offsets `-zero * scale`, which float32 holds exactly if both are of 16 bits, as
is each product with a code. So in float32 the numbers are those of this equation, rounded once. hqq itself computes in
16 bits, where it rounds the difference and the product. Zero-points of float32, which `quadapt export` writes, become
offsets again.

Packed codes are those of the matrix `[out * groups, group_size]`, whose rows are cut into as many parts as a byte holds
codes (or an int32 word of ten codes of 3 bits): the first part lies in the highest bits.

Source: `BitPack` and `Quantizer.dequantize` in hqq's code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from quadapt.errors import CheckpointError, ShapeError
from quadapt.importers.base import FLOATS, IMPORTERS, Importer, Parts, by_group, expect, grid, offsets_of, packed_rows
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

_PACKED = {2: (torch.uint8, 4), 3: (torch.int32, 10), 4: (torch.uint8, 2), 8: (torch.uint8, 1)}
"""What codes of a width are packed into, and how many of them."""


@IMPORTERS.register("hqq")
class HQQ(Importer):
    """HQQ of 2, 3, 4 and 8 bits; each layer says its own width, group and axis."""

    summary: ClassVar[str] = "2, 3, 4 and 8 bits, axis 1 (safetensors); of hqq and transformers"
    parts: ClassVar[tuple[str, ...]] = ("W_q", "scale", "zero", "nbits", "group_size", "axis", "shape")
    optional: ClassVar[tuple[str, ...]] = (
        *("packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype"),
        *("offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
    )

    def layout(self, parts: Parts, out: int, columns: int) -> Layout:
        bits, width, axis = (_number(parts, name) for name in ("nbits", "group_size", "axis"))
        if axis != 1:
            raise CheckpointError(f"axis: is {axis}, and groups along the inputs (1) are read. Give the dense model")
        if bits not in _PACKED:
            raise CheckpointError(f"nbits: is {bits}, and 2, 3, 4 and 8 are read. Give the dense model")
        shape = parts["shape"].tolist()
        if shape != [out, columns]:
            raise CheckpointError(f"shape: is {shape}, and the model has {out} x {columns}. config.json is of another")
        if width < 1 or columns % width:
            raise ShapeError(
                f"has rows of {columns} inputs and groups of {width}, so that groups cross rows. Give the dense model"
            )
        groups = out * columns // width
        kind, many = _PACKED[bits]
        expect(parts, "W_q", (kind,), (-(-groups // many), width))
        scales, zeros = (expect(parts, name, FLOATS, (groups, 1)) for name in ("scale", "zero"))
        layout = grid(out=out, columns=columns, bits=bits, width=width, zero="float", scales=scales.dtype)
        wide = scales.dtype != torch.float16 or zeros.dtype == torch.bfloat16
        offsets = "fp16" if offsets_of(zeros, scales)[1] == torch.float16 and zeros.dtype == torch.float32 else "fp32"
        return replace(layout, storage=Storage(scales="fp32" if wide else "fp16", offsets=offsets))

    def weight(self, parts: Parts, layout: Layout) -> QuantWeight:
        codes = _unpacked(parts["W_q"], layout.format.bits)[: parts["scale"].numel()]
        packed = packed_rows(codes.reshape(layout.out, layout.columns), layout.format.bits)
        scales, zeros = (parts[name].view(layout.out, -1) for name in ("scale", "zero"))
        width = layout.columns // scales.shape[1]
        held = (by_group(values, layout, width) for values in (scales.float(), offsets_of(zeros, scales)[0]))
        return QuantWeight.build(layout, packed, *held)


def _number(parts: Parts, name: str) -> int:
    """A whole number that a layer says of itself."""
    held = parts[name]
    if held.numel() != 1:
        raise CheckpointError(f"{name}: has {held.numel()} numbers, where one belongs. The file is damaged")
    return int(held)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes of packed rows, uint8, and of rows that fill the last word up."""
    many = _PACKED[bits][1]
    parts = [(words >> bits * (many - 1 - at)) & (2**bits - 1) for at in range(many)]
    return torch.cat(parts).to(torch.uint8)
