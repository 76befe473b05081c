r"""Adapters that train the grid: forward fake-quantizes, and what it multiplies with is what a merge stores.

    W' = scales * u + offsets,    scales = stored(s0 * exp(rho)),    u = round(clamp(..)) in 0 .. 2**bits - 1

`rho` starts at zero: scales stay positive, and a step of the optimizer is relative to them. Scales and offsets are
rounded to their stored dtype in the forward (straight through), in the stored form's own order of operations, so that
the merged model is the trained one bit for bit.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels import pack
from quadapt.nn.adapters.base import (
    Adapter,
    Dropout,
    Exactness,
    LowRank,
    Param,
    Params,
    Source,
    same,
    zeros,
)
from quadapt.quant.fake_quant import FakeQuant, fake_quant_codes, fake_quant_matmul
from quadapt.quant.grids import check_choice, implied_offsets
from quadapt.quant.storage import STORAGES
from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True, kw_only=True)
class GridAdapter(Adapter):
    """An adapter whose forward quantizes: scales, and offsets or codes, are part of the training step."""

    extra: ClassVar[tuple[str, ...]] = ("rho",)

    scales: str = "base"
    """How scales (and float offsets) are stored in the end: fp16, fp32, or in the super-blocks of K-quants (q4_k, ..);
    base: as those of the quantized base, fp16 where there is none."""

    def __post_init__(self) -> None:
        trained = (name for name, each in STORAGES.items() if each.for_scales and each.trained == name)
        check_choice("scales", self.scales, ("base", *trained))

    @property
    def floats(self) -> str:
        """How scales are stored where there is no quantized base to follow."""
        return "fp16" if self.scales == "base" else self.scales

    @property
    def exactness(self) -> Exactness:
        return "exact"

    @property
    def merged_form(self) -> bool:
        return True

    def check(self, layout: Layout, rank: int, dropout: float) -> None:
        if dropout:
            raise ConfigError(f"dropout={dropout}: {self.kind} adapters train without it. Use dropout=0")

    @abstractmethod
    def layout_of(self, source: Source) -> Layout:
        """Layout of the quantized matrix that forward computes with, and that a merge gives."""

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        return self.grid_params(layout)

    def grid_params(self, layout: Layout) -> dict[str, Param]:
        """The parameters from which scales and offsets are made."""
        return {"rho": grid_param(layout)}

    @abstractmethod
    def how(self, layout: Layout) -> FakeQuant:
        """How forward quantizes a weight to `layout`."""

    @abstractmethod
    def grid(self, source: Source, params: Params, scaling: float) -> tuple[Tensor, Tensor | None]:
        """Scales, and what is stored for offsets (offsets, zero-points, or nothing), differentiable, as stored."""

    def inside(self, params: Params) -> tuple[Tensor | None, Tensor | None]:
        """`A` and `B` that the quantizer sees."""
        return params.get("A"), params.get("B")

    def forward(self, x: Tensor, source: Source, params: Params, scaling: float, dropout: Dropout = same) -> Tensor:
        layout = self.layout_of(source)
        scales, offsets = self.grid(source, params, scaling)
        A, B = self.inside(params)
        return fake_quant_matmul(
            source.stored_order(x) if isinstance(source, QuantWeight) else x,
            source.packed if isinstance(source, QuantWeight) else source,
            scales,
            _shift(layout, scales, offsets),
            how=self.how(layout),
            A=A,
            B=B,
            scaling=scaling,
        )

    @torch.no_grad()
    def quantized(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        """What the quantizer gives: codes, scales and offsets, those that forward computes with."""
        layout = self.layout_of(source)
        scales, offsets = self.grid(source, params, scaling)
        A, B = self.inside(params)
        base = source.packed if isinstance(source, QuantWeight) else source
        shift = _shift(layout, scales, offsets)
        codes = fake_quant_codes(base, scales, shift, how=self.how(layout), A=A, B=B, scaling=scaling)
        perm = source.tensors["perm"] if isinstance(source, QuantWeight) and layout.permuted else None
        return QuantWeight.build(layout, pack(codes, layout.format.bits), scales, offsets, perm)

    def merge(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        return self.quantized(source, params, scaling)

    def as_lora(self, source: Source, params: Params) -> tuple[Tensor, Tensor] | None:
        return None

    def untrained(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        """What the quantizer gave before the first step."""
        declared = self.params(self.layout_of(source), 1)
        begun = {
            name: torch.zeros_like(each) if declared[name].init is zeros else each for name, each in params.items()
        }
        return self.quantized(source, begun, scaling)

    @torch.no_grad()
    def dense(self, source: Source, params: Params, scaling: float) -> Tensor:
        return self.quantized(source, params, scaling).dequantize()


@dataclass(frozen=True, kw_only=True)
class LowRankGrid(LowRank, GridAdapter):
    """An adapter whose forward quantizes what low-rank factors over all inputs have changed."""

    def params(self, layout: Layout, rank: int, *, started: bool = False) -> dict[str, Param]:
        return {**self.low_rank(layout, layout.columns, rank), **self.grid_params(layout)}


def grid_param(layout: Layout) -> Param:
    """A parameter `[out, groups]` that is zero at first, of the grid's own learning rate."""
    return Param(shape=(layout.out, layout.groups), init=zeros, dtype=torch.float32, group="grid")


def grown(rho: Tensor) -> Tensor:
    """`exp(rho)` in float32. By way of float64: each processor has an exponential of its own, and scales are stored."""
    return rho.double().exp().float()


def _shift(layout: Layout, scales: Tensor, stored: Tensor | None) -> Tensor:
    """Offsets in units of weights; zeros where the form has none."""
    offsets = implied_offsets(layout, scales, stored)
    return torch.zeros_like(scales) if offsets is None else offsets


def base_layout(source: Source) -> Layout:
    """The layout of the quantized matrix that is trained over."""
    assert isinstance(source, QuantWeight)
    return source.layout
