"""LoRA with `A` frozen (Zhang et al. 2023, arXiv:2308.03303): half of the parameters, and hardly any activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quadapt.nn.adapters.base import ADAPTERS, Param
from quadapt.nn.adapters.lora import LoRA
from quadapt.nn.adapters.pooled import Pooled
from quadapt.quant.weight import Layout


def _frozen_a(params: dict[str, Param]) -> dict[str, Param]:
    """The given parameters, with an `A` that stays as it begins."""
    return {**params, "A": replace(params["A"], trains=False)}


@ADAPTERS.register("lora-fa")
@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """`y = x W^T + scaling * x A^T B^T` with `A [rank, in]` frozen at its random start, and `B [out, rank]` trained.

    The gradient of `B` needs `x A^T [tokens, rank]` alone, so nothing of the size of the inputs is kept for backward.
    """

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        return _frozen_a(super().params(layout, rank, started=started))


@ADAPTERS.register("pooled-fa")
@dataclass(frozen=True, kw_only=True)
class PooledFA(Pooled):
    """QA-LoRA's adapter with `A [rank, groups]` frozen: it merges as exactly, and keeps `pooled A^T [tokens, rank]`.

    Differs: the paper freezes `A` over all inputs; here it sees them summed over each group.
    """

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        return _frozen_a(super().params(layout, rank, started=started))
