"""LoRA (Hu et al. 2021, arXiv:2106.09685): a low-rank branch beside a frozen matrix, as in QLoRA and GPTQ-LoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quadapt.nn.adapters.base import ADAPTERS, FIRST, Begins, Dropout, LowRank, Param, Params, Source, add_low_rank
from quadapt.nn.adapters.codes import CodesAdapter
from quadapt.quant.weight import Layout
from quadapt.setting import setting


@ADAPTERS.register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank, CodesAdapter):
    """`y = x W^T + scaling * x A^T B^T`. Cannot merge into codes: stays base + adapter, or is requantized by name.

    Where a start has fitted factors `A0 [rank, in]` and `B0 [out, rank]`, these are what `A` and `B` begin with. With
    `train_start=False` they stay as they are, and an adapter that begins at zero stands beside them:

        y = x W^T + scaling * (x A0^T B0^T + x A^T B^T)

    That is an ordinary LoRA of twice the rank, `[A; A0]` and `[B, B0]`, and is handed over as such. Dropout is on the
    inputs of the part that trains.
    """

    train_start: bool = setting(panel="Adapter", default=True)
    """Train the factors that a start (--start) has fitted. If not, they are frozen, and an adapter of the same rank
    that begins at zero trains beside them: what is served has twice the rank."""

    @property
    def begins(self) -> Begins:
        return "factors"

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        found = self.low_rank(layout, layout.columns, rank, started=started)
        if self.train_start:
            return found
        return {name: replace(param, serves=True) for name, param in found.items()}

    def begin(self, params: Params, up: Tensor, down: Tensor) -> None:
        if self.train_start:
            super().begin(params, up, down)
            return
        for name, value in zip(FIRST, (down, up), strict=True):
            params[name].copy_(value)

    def beside(self, x: Tensor, y: Tensor, params: Params, scaling: float) -> Tensor:
        """`y [.., out]` plus what the frozen factors of a start add to it for inputs `x [.., in]`, if there are any."""
        if self.train_start or FIRST[0] not in params:
            return y
        return add_low_rank(y, x, params[FIRST[0]], params[FIRST[1]], scaling)

    def side(self, x: Tensor, y: Tensor, source: Source, params: Params, scaling: float, dropout: Dropout) -> Tensor:
        return add_low_rank(self.beside(x, y, params, scaling), dropout(x), *self.factors(params), scaling)

    def as_lora(self, source: Source, params: Params) -> tuple[Tensor, Tensor]:
        A, B = self.factors(params)
        if self.train_start or FIRST[0] not in params:
            return A, B
        return torch.cat([A, params[FIRST[0]]]), torch.cat([B, params[FIRST[1]]], dim=1)
