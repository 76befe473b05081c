"""A real-valued low-rank term among the codes of any integer base: LR-QAT's idea over codes that are there already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.nn.adapters.base import ADAPTERS, Param, Params, Source
from quadapt.nn.adapters.codes_grid import CodesGrid, check_integers
from quadapt.nn.adapters.grid import LowRankGrid, grid_param, grown
from quadapt.quant.weight import Layout
from quadapt.setting import setting


@ADAPTERS.register("code-lora")
@dataclass(frozen=True, kw_only=True)
class CodeLoRA(LowRankGrid, CodesGrid):
    """`W' = s * clamp(round(q + scaling * B A)) + offsets` over whole codes `q` of any rounding, whoever made them.

    Straight through the rounding; a code that is clamped passes no gradient on. Scales and offsets stay as they are
    stored, or train with the factors, relative to the first scale. The product has the format of its base: zero-points
    that are whole stay whole. No paper has it; LR-QAT (arXiv:2406.06385) does it over fixed point, which keeps
    fractions of a code. Here no code moves until `|scaling * B A|` passes 1/2.
    """

    extra: ClassVar[tuple[str, ...]] = ("rho", "shift")

    train_scales: bool = setting(panel="Adapter", default=False)
    """Whether the scales train beside codes that move, each by its logarithm."""

    train_offsets: bool = setting(panel="Adapter", default=False)
    """Whether the offsets train beside codes that move, in steps; whole zero-points stay whole."""

    @property
    def moves_scales(self) -> bool:
        return self.train_scales

    @property
    def moves_offsets(self) -> bool:
        return self.train_scales or self.train_offsets

    def check(self, layout: Layout, rank: int, dropout: float) -> None:
        super().check(layout, rank, dropout)
        check_integers(self.kind, layout)
        if self.train_offsets and layout.storage.of_offsets.implied:
            raise ConfigError(
                f"train_offsets: {layout.format.name} has none. Use zero='integer' or 'float', or train_offsets=False"
            )

    def grid_params(self, layout: Layout) -> dict[str, Param]:
        trained = {"rho": self.train_scales, "shift": self.train_offsets}
        return {name: grid_param(layout) for name, trains in trained.items() if trains}

    def grid(self, source: Source, params: Params, scaling: float) -> tuple[Tensor, Tensor | None]:
        growth = grown(params["rho"]) if self.train_scales else None
        return self.moved(source, growth=growth, steps=params["shift"].float() if self.train_offsets else None)
