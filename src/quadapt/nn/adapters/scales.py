"""Training the scales of fixed codes: PEQA and EfficientQAT's E2E-QP, alone or together with QA-LoRA's adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.nn.adapters.base import ADAPTERS, Begins, LowRank, Param, Params, Source, check_offsets, xavier
from quadapt.nn.adapters.grid import GridAdapter, base_layout, grown
from quadapt.quant.fake_quant import FakeQuant, snap
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight


@ADAPTERS.register("scales")
@dataclass(frozen=True, kw_only=True)
class Scales(LowRank, GridAdapter):
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
        if self.pooled:
            check_offsets(self.kind, layout)

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        factors = self.low_rank(layout, layout.groups, rank, xavier) if self.pooled else {}
        return {**factors, **self.grid_params(layout)}

    def inside(self, params: Params) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    def layout_of(self, source: Source) -> Layout:
        base = base_layout(source)
        free = self.pooled or base.storage.of_offsets.free
        format = replace(base.format, zero="float") if free else base.format
        base_like, zero = self.scales == "base", format.zero
        storage = base.storage.trained(zero) if base_like else Storage.floating(self.scales, zero)
        return replace(base, format=format, storage=storage)

    def how(self, layout: Layout) -> FakeQuant:
        return FakeQuant(format=layout.format, columns=layout.columns, domain="codes", order="round-clamp")

    def grid(self, source: Source, params: Params, scaling: float) -> tuple[Tensor, Tensor | None]:
        assert isinstance(source, QuantWeight)
        storage, growth, base = self.layout_of(source).storage, grown(params["rho"]), source.offsets
        scales = snap(source.scales * growth, storage.scales)
        if storage.of_offsets.implied:
            return scales, None
        if not storage.of_offsets.free:
            assert base is not None
            return scales, (-base / source.scales).round()
        offsets = torch.zeros_like(scales) if base is None else base * growth
        if self.pooled:  # in float64, as for the pooled adapter alone: it must round alike wherever it is merged
            offsets = offsets + scaling * (params["B"].double() @ params["A"].double()).float()
        return scales, snap(offsets, storage.offsets)
