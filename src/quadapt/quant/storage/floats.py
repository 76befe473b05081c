"""Scales and offsets as floats: float16 or float32, as their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quadapt.kernels import narrow
from quadapt.kernels.reference import as_floats
from quadapt.quant.storage.base import ValueStorage, as_bytes, register

FLOATS = {"fp16": torch.float16, "fp32": torch.float32}
"""The floats that every kernel reads, by their name on disk."""

SMALLEST_SCALE = 32 * 2.0**-24
"""The smallest scale that fp16 holds within 1/64."""

LARGEST = torch.finfo(torch.float16).max
"""The largest number that fp16 can hold."""


@dataclass(frozen=True)
class Floats(ValueStorage):
    """Each number as one float. uint8 `[out, groups * itemsize]`."""

    summary: ClassVar[str] = "one float for each group"

    dtype_name: str
    """The name of the dtype: fp16 or fp32."""

    @property
    def together(self) -> int:
        return 1

    @property
    def name(self) -> str:
        return self.dtype_name

    @property
    def dtype(self) -> torch.dtype:
        return FLOATS[self.dtype_name]

    def encode(self, values: Tensor, *, centre: bool) -> dict[str, Tensor]:
        return {"": as_bytes(values.float().to(self.dtype))}

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return as_floats(tensors[""], self.dtype).float()

    def held(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> list[Tensor]:
        return [tensors[""]]

    def shapes(self, out: int, groups: int) -> dict[str, tuple[int, int]]:
        return {"": (out, groups * self.dtype.itemsize)}

    def rounded(self, values: Tensor) -> Tensor:
        return narrow(values.float(), self.dtype).to(values.dtype)

    def above(self, values: Tensor) -> Tensor:
        kept = narrow(values, self.dtype)
        return torch.where(kept.float() < values, kept * (1 + torch.finfo(self.dtype).eps), kept).float()

    def fits_scales(self, least: float, most: float) -> bool:
        return self.dtype == torch.float32 or (least >= SMALLEST_SCALE and most <= LARGEST)

    def fits_offsets(self, most: float) -> bool:
        return self.dtype == torch.float32 or most <= LARGEST

    def exact_in(self, dtype: torch.dtype) -> bool:
        return dtype in (self.dtype, torch.float32)


FP16 = register(Floats("fp16"))
"""Plain float16 numbers, which are the default."""

FP32 = register(Floats("fp32"))
"""Plain float32 numbers, where fp16 is too narrow."""
