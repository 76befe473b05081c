"""Training the scales of fixed codes: PEQA and EfficientQAT's E2E-QP, alone or together with QA-LoRA's adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from quadapt.nn.adapters.base import Begins
from quadapt.nn.adapters.grid import GridAdapter, Held, Source, Trained, base_layout, grown
from quadapt.quant.fake_quant import FakeQuant, snap
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True, kw_only=True)
class Scales(GridAdapter):
    """Scales train, codes do not: PEQA (Kim et al. 2023, arXiv:2305.14152), EfficientQAT's E2E-QP (arXiv:2407.11062).

    Zero-points stay, in steps: `offsets = -s * z` move with their scale. For NormalFloat a float offset moves with its
    scale likewise. With `pooled`, QA-LoRA's adapter trains together with the scales, and merges as exactly.
    """

    kind: ClassVar[str] = "scales"

    pooled: bool = False
    """Also train QA-LoRA's low-rank shift of the offsets."""

    @property
    def begins(self) -> Begins:
        return "offsets" if self.pooled else "zero"

    def inputs(self, layout: Layout) -> int:
        return layout.groups if self.pooled else 0

    def reset(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.xavier_uniform_(lora_A)
        nn.init.zeros_(lora_B)

    def inside(self, trained: Trained) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    def product(self, source: Source) -> Layout:
        base = base_layout(source)
        kind = self._kind(base.storage)
        if self.pooled or base.storage.offsets in ("fp16", "fp32", "double"):
            return replace(base, format=replace(base.format, zero="float"), storage=Storage(scales=kind, offsets=kind))
        return replace(base, storage=replace(base.storage, scales=kind))

    def _kind(self, storage: Storage) -> Held:
        if self.scales != "base":
            return self.scales
        return storage.floats

    def how(self, layout: Layout) -> FakeQuant:
        return FakeQuant(format=layout.format, columns=layout.columns, domain="codes", order="round-clamp")

    def grid(
        self, source: Source, start: Tensor | None, trained: Trained, scaling: float
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(source, QuantWeight)
        storage, growth, base = self.product(source).storage, grown(trained["rho"]), source.offsets
        scales = snap(source.scales * growth, storage.scales)
        if storage.offsets == "absent":
            return scales, None
        if storage.offsets == "integer":
            assert base is not None
            return scales, (-base / source.scales).round()
        offsets = torch.zeros_like(scales) if base is None else base * growth
        if self.pooled:  # in float64, as for the pooled adapter alone: it must round alike wherever it is merged
            offsets = offsets + scaling * (trained["B"].double() @ trained["A"].double()).float()
        return scales, snap(offsets, storage.offsets)
