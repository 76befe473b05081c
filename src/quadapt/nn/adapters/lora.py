"""LoRA (Hu et al. 2021, arXiv:2106.09685): a low-rank branch beside a frozen matrix, as in QLoRA and GPTQ-LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quadapt.nn.adapters.base import ADAPTERS, Begins, Dropout, LowRank, Param, Params, Source, add_low_rank
from quadapt.nn.adapters.codes import CodesAdapter
from quadapt.quant.weight import Layout


@ADAPTERS.register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank, CodesAdapter):
    """`y = x W^T + scaling * x A^T B^T`. Cannot merge into codes: stays base + adapter, or is requantized by name."""

    @property
    def begins(self) -> Begins:
        return "factors"

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        return self.low_rank(layout, layout.columns, rank, started=started)

    def side(self, x: Tensor, y: Tensor, source: Source, params: Params, scaling: float, dropout: Dropout) -> Tensor:
        return add_low_rank(y, dropout(x), *self.factors(params), scaling)

    def as_lora(self, source: Source, params: Params) -> tuple[Tensor, Tensor]:
        return self.factors(params)
