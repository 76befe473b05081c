"""Scales as evenly spaced codes, as in LQ-LoRA."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quadapt.kernels import narrow, pack, unpack
from quadapt.kernels.reference import as_floats
from quadapt.quant.storage.base import ValueStorage, as_bytes, register
from quadapt.quant.storage.floats import FLOATS, LARGEST, SMALLEST_SCALE


@dataclass(frozen=True)
class Linear(ValueStorage):
    """Scales as evenly spaced codes (LQ-LoRA): written `linear8-256-fp32` for 8 bits, 256 to a constant of fp32.

        scale = code * largest / (2**bits - 1) + smallest

    `smallest` is that of the whole matrix (float32), `largest` the largest distance from it among `block` scales. No
    scale comes out below `smallest`, and larger scales get no smaller codes within a block. Codes are packed, all rows
    in one stream.

    Source: LQ-LoRA (arXiv 2311.12023) section 3.1 and its code.
    Differs: bfloat16 constants are left out, since they cost what fp16 ones do and are coarser. Scales that are all
        equal are held exactly; its code divides by zero.
    """

    summary: ClassVar[str] = "an evenly spaced code of 2 to 8 bits, and a float for every 16 to 256 (LQ-LoRA)"
    for_offsets: ClassVar[bool] = False
    suffixes: ClassVar[tuple[str, ...]] = ("", "_largest", "_smallest")

    bits: int = 8
    """The width of a scale's code: 2, 3, 4 or 8."""

    block: int = 256
    """How many scales share a constant: 16, 64 or 256, in row-major order."""

    constant: str = "fp32"
    """How the constant is held: fp16 or fp32."""

    @property
    def name(self) -> str:
        return f"linear{self.bits}-{self.block}-{self.constant}"

    @property
    def family(self) -> str:
        return "linear"

    def serves(self, bits: int) -> bool:
        return self == Linear()

    @property
    def spelling(self) -> str:
        return "linearB-N-F with B 2, 3, 4 or 8 bits, N 16, 64 or 256 scales to a constant, and F fp16 or fp32"

    def encode(self, values: Tensor, *, centre: bool) -> dict[str, Tensor]:
        """Codes against the constants as they are stored, all in float32."""
        values = values.float()
        smallest, top = values.min(), 2**self.bits - 1
        above = torch.nn.functional.pad((values - smallest).flatten(), (0, -values.numel() % self.block))
        above = above.view(-1, self.block)
        largest = narrow(above.amax(1, keepdim=True), FLOATS[self.constant])
        unit = largest.float()
        # A constant of zero (equal scales, or below fp16's smallest number) leaves all codes zero. One that fp16 has
        # rounded down would give codes above the top.
        codes = torch.where(unit > 0, above * top / torch.where(unit > 0, unit, 1), 0).round().clamp_max(top)
        return {
            "": pack(codes.flatten()[None, : values.numel()].to(torch.uint8), self.bits),
            "_largest": as_bytes(largest),
            "_smallest": as_bytes(smallest.view(1, 1)),
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        count = shape[0] * shape[1]
        codes = unpack(tensors[""], self.bits, count).flatten().float()
        largest = as_floats(tensors["_largest"], FLOATS[self.constant]).float().flatten()
        largest = largest.repeat_interleave(self.block)[:count]
        smallest = as_floats(tensors["_smallest"], torch.float32).flatten()
        return (codes * largest / (2**self.bits - 1) + smallest).view(shape)

    def shapes(self, out: int, groups: int) -> dict[str, tuple[int, int]]:
        constants = (-(-out * groups // self.block), FLOATS[self.constant].itemsize)
        return {"": (1, -(-out * groups * self.bits // 8)), "_largest": constants, "_smallest": (1, 4)}

    def fits_scales(self, least: float, most: float) -> bool:
        """Whether scales up to `most` are held well: the constants alone are floats, so the largest scale counts."""
        return self.constant == "fp32" or SMALLEST_SCALE <= most <= LARGEST


for _each in itertools.starmap(Linear, itertools.product((2, 3, 4, 8), (16, 64, 256), FLOATS)):
    register(_each)

LINEAR = Linear().name
"""LQ-LoRA's choice where it has one grid for all matrices."""
