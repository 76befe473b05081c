"""Double quantization: scales or offsets as 8-bit codes of a dynamic map, as in QLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from quadapt.kernels import widen
from quadapt.kernels.reference import SUPER
from quadapt.quant import fixed
from quadapt.quant.constants import per_device
from quadapt.quant.storage.base import ValueStorage, as_bytes, register


@dataclass(frozen=True)
class Double(ValueStorage):
    """8-bit codes of QLoRA's dynamic map, with a float32 constant for every 256 of them, and one mean.

        value = map[code] * absmax + mean

    Codes are uint8 `[out, groups]`; `absmax` is the largest absolute value among 256 in row-major order, after the mean
    was taken off; where the mean stays (offsets), it is stored as zero.

    Source: QLoRA (arXiv 2305.14314) section 3 and its code; IR-QLoRA (arXiv 2402.05445) for offsets.
    """

    summary: ClassVar[str] = "an 8-bit code of a dynamic map, and a float32 for every 256 (QLoRA)"
    suffixes: ClassVar[tuple[str, ...]] = ("", "_absmax", "_mean")

    @property
    def name(self) -> str:
        return "double"

    def encode(self, values: Tensor, *, centre: bool) -> dict[str, Tensor]:
        values = values.float()
        mean = fixed.mean(values).float() if centre else values.new_zeros(())
        blocks = torch.nn.functional.pad((values - mean).flatten(), (0, -values.numel() % SUPER)).view(-1, SUPER)
        absmax = blocks.abs().amax(1)
        unit = blocks / torch.where(absmax == 0, 1, absmax)[:, None]
        table = dynamic_map(device=values.device)
        codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2)
        return {
            "": codes.to(torch.uint8).flatten()[: values.numel()].view(values.shape),
            "_absmax": as_bytes(absmax[:, None]),
            "_mean": as_bytes(mean.view(1, 1)),
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return widen(*self.held(tensors, shape))

    def held(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> list[Tensor]:
        return [*(tensors[suffix] for suffix in self.suffixes), dynamic_map(device=tensors[""].device)]

    def shapes(self, out: int, groups: int) -> dict[str, tuple[int, int]]:
        return {"": (out, groups), "_absmax": (-(-out * groups // SUPER), 4), "_mean": (1, 4)}


@per_device
@cache
def dynamic_map() -> tuple[float, ...]:
    """QLoRA's signed dynamic 8-bit map: 256 values from -0.993 to 1, dense near zero.

    As bitsandbytes' `create_dynamic_map`: decade `d` of seven, `10**(d - 6)`, has the `2**d` midpoints of an even
    division of [0.1, 1], with both signs; 0 and 1 are added.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middle = (edges[1:] + edges[:-1]) / 2
        for sign in (-1.0, 1.0):
            values += (sign * 10.0 ** (decade - 6) * middle).tolist()
    return tuple(sorted(values))


DOUBLE = register(Double())
"""The storage as QLoRA's double quantization has it, for scales and for offsets."""
