"""Training the scales of fixed codes: PEQA and EfficientQAT's E2E-QP, alone or together with QA-LoRA's adapter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.nn.adapters.base import ADAPTERS, Begins, LowRank, Param, Params, Source, xavier
from quadapt.nn.adapters.codes_grid import CodesGrid
from quadapt.nn.adapters.grid import grown
from quadapt.quant.weight import Layout


@ADAPTERS.register("scales")
@dataclass(frozen=True, kw_only=True)
class Scales(LowRank, CodesGrid):
    """Scales train, codes do not: PEQA (Kim et al. 2023, arXiv:2305.14152), EfficientQAT's E2E-QP (arXiv:2407.11062).

    Zero-points stay, in steps: `offsets = -s * z` move with their scale. For NormalFloat a float offset moves with its
    scale likewise. With `pooled`, QA-LoRA's adapter trains together with the scales, and merges as exactly.
    """

    pooled: bool = False
    """Also train QA-LoRA's low-rank shift of the offsets."""

    @property
    def begins(self) -> Begins:
        return "offsets" if self.pooled else "zero"

    def check(self, layout: Layout, rank: int, dropout: float) -> None:
        super().check(layout, rank, dropout)
        if not self.pooled and self.init_scale != 1:
            raise ConfigError(
                f"init_scale={self.init_scale}: nothing of a {self.kind} adapter without the pooled factors begins "
                "random. Use init_scale=1"
            )

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        factors = self.low_rank(layout, layout.groups, rank, xavier) if self.pooled else {}
        return {**factors, **self.grid_params(layout)}

    def inside(self, params: Params) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    @property
    def frees_offsets(self) -> bool:
        return self.pooled

    def grid(self, source: Source, params: Params, scaling: float) -> tuple[Tensor, Tensor | None]:
        change = None
        if self.pooled:  # in float64, as for the pooled adapter alone: it must round alike wherever it is merged
            change = scaling * (params["B"].double() @ params["A"].double()).float()
        return self.moved(source, growth=grown(params["rho"]), change=change)
