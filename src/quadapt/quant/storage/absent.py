"""Offsets that are not stored, since the format implies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quadapt.quant.storage.base import ValueStorage, register


@dataclass(frozen=True)
class Absent(ValueStorage):
    """No offsets: symmetric integers have `-scale * 2**(bits - 1)`, NormalFloat has none."""

    summary: ClassVar[str] = "nothing is stored: the grid is symmetric"
    zero: ClassVar[Literal["none"]] = "none"
    for_scales: ClassVar[bool] = False
    suffixes: ClassVar[tuple[str, ...]] = ()

    @property
    def together(self) -> int:
        return 1

    @property
    def name(self) -> str:
        return "absent"

    def encode(self, values: Tensor, *, centre: bool) -> dict[str, Tensor]:
        return {}

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        raise ValueError("absent offsets are not stored: the format implies them (see QuantWeight.offsets)")

    def held(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> list[Tensor]:
        return []

    def shapes(self, out: int, groups: int) -> dict[str, tuple[int, int]]:
        return {}

    def exact_in(self, dtype: torch.dtype) -> bool:
        return True


ABSENT = register(Absent())
"""The storage of offsets that the format implies, which keeps nothing."""
