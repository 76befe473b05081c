"""Offsets as whole zero-points, one byte each, so that they stay whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quadapt.quant.storage.base import ValueStorage, register


@dataclass(frozen=True)
class ZeroPoints(ValueStorage):
    """Zero-points 0 to 255 in steps: the offset of a group is `-scale * zero`. uint8 `[out, groups]`."""

    summary: ClassVar[str] = "one byte for each group: the zero-point in steps"
    zero: ClassVar[Literal["integer"]] = "integer"
    for_scales: ClassVar[bool] = False

    @property
    def together(self) -> int:
        return 1

    @property
    def name(self) -> str:
        return "integer"

    def encode(self, values: Tensor, *, centre: bool) -> dict[str, Tensor]:
        return {"": values.to(torch.uint8)}

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return tensors[""].float()

    def held(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> list[Tensor]:
        return [tensors[""]]

    def shapes(self, out: int, groups: int) -> dict[str, tuple[int, int]]:
        return {"": (out, groups)}

    def exact_in(self, dtype: torch.dtype) -> bool:
        return True  # of zero-points; the offset is a product with the scale


INTEGER = register(ZeroPoints())
"""The storage of offsets that are whole numbers of steps, in one byte each."""
