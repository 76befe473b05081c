"""LoRA (Hu et al. 2021, arXiv:2106.09685): a low-rank branch beside a frozen matrix, as in QLoRA and GPTQ-LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from quadapt.nn.adapters.base import Begins, CodesAdapter, add_low_rank
from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True, kw_only=True)
class LoRA(CodesAdapter):
    """`y = x W^T + scaling * x A^T B^T`. Cannot merge into codes: stays base + adapter, or is requantized by name."""

    kind: ClassVar[str] = "lora"

    @property
    def begins(self) -> Begins:
        return "factors"

    def inputs(self, layout: Layout) -> int:
        return layout.columns

    def reset(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        nn.init.zeros_(lora_B)

    def side(self, x: Tensor, y: Tensor, weight: QuantWeight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        return add_low_rank(y, x, lora_A, lora_B, scaling)

    def as_lora(self, weight: QuantWeight, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        return lora_A, lora_B
