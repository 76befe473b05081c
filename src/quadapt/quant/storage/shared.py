"""Scales that neighbouring groups share, while each group has an offset of its own.

So a pooled adapter, whose window is the group of the offsets, can see its inputs in finer windows than those for which
scales are paid: with groups of 16 and scales shared by 4, int4 takes 4 + 16 / 16 + 16 / 64 = 5.25 bits a weight, where
fp16 scales for every group take 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels.reference import as_floats, expand, pool
from quadapt.quant.format import WHOLE_ROW, Format
from quadapt.quant.storage.base import ValueStorage, as_bytes, register
from quadapt.quant.storage.floats import FLOATS, FP16


@dataclass(frozen=True)
class Shared(ValueStorage):
    """One float16 for every few neighbouring groups of a row, the largest of their scales: none of them is clipped.

    uint8 `[out, 2 * ceil(groups / shared)]`; it is decoded by repetition. Training moves the one number: each group's
    gradient counts.
    """

    summary: ClassVar[str] = "one float16 for 2, 4 or 8 neighbouring groups, the largest of their scales"
    for_offsets: ClassVar[bool] = False

    groups: int
    """How many neighbouring groups share a scale; the last of a row may be fewer."""

    @property
    def name(self) -> str:
        return f"fp16-shared{self.groups}"

    @property
    def spelling(self) -> str:
        return "fp16-sharedN with N 2, 4 or 8 groups to a scale"

    @property
    def together(self) -> int:
        return self.groups

    @property
    def shared(self) -> int:
        return self.groups

    @property
    def beside(self) -> str:
        return "fp16"

    @property
    def trained(self) -> str:
        return self.name

    def label(self, format: Format) -> str:
        return f"{format.name}-shared{self.groups}"

    def check(self, format: Format) -> None:
        if format.group_size == WHOLE_ROW:
            raise ConfigError(
                f"scales={self.name!r} are shared by neighbouring groups, and a row of {format.name} is one group. Use "
                "a group size, or scales='fp16'"
            )

    def encode(self, values: Tensor, *, centre: bool) -> dict[str, Tensor]:
        return {"": as_bytes(self._largest(values).to(FLOATS["fp16"]))}

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return expand(as_floats(tensors[""], FLOATS["fp16"]).float(), self.groups, shape[1])

    def shapes(self, out: int, groups: int) -> dict[str, tuple[int, int]]:
        return {"": (out, 2 * -(-groups // self.groups))}

    def rounded(self, values: Tensor) -> Tensor:
        return expand(FP16.rounded(self._largest(values)), self.groups, values.shape[1]).to(values.dtype)

    def above(self, values: Tensor) -> Tensor:
        largest = self._largest(values)
        return expand(FP16.above(torch.where(largest > 0, largest, 1)), self.groups, values.shape[1])

    def snap(self, values: Tensor) -> Tensor:
        """Round as :meth:`rounded` does; each group's number has the sum of the gradients of those that share it."""
        return _Tied.apply(values, self)

    def fits_scales(self, least: float, most: float) -> bool:
        return FP16.fits_scales(least, most)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return FP16.exact_in(dtype)

    def _largest(self, values: Tensor) -> Tensor:
        """The largest of each run, float32 `[rows, runs]`; scales are positive."""
        short = -values.shape[1] % self.groups
        return torch.nn.functional.pad(values.float(), (0, short)).unflatten(1, (-1, self.groups)).amax(-1)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, storage: Shared) -> Tensor:
        ctx.storage = storage
        return storage.rounded(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        run = ctx.storage.groups
        return expand(pool(gradient, run), run, gradient.shape[1]), None


for _groups in (2, 4, 8):
    register(Shared(_groups))
