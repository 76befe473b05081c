r"""Adapters that train the grid: forward fake-quantizes, and what it multiplies with is what a merge stores.

    W' = scales * u + offsets,    scales = stored(s0 * exp(rho)),    u = round(clamp(..)) in 0 .. 2**bits - 1

`rho` starts at zero: scales stay positive, and a step of the optimizer is relative to them. Scales and offsets are
rounded to their stored dtype in the forward (straight through), in the stored form's own order of operations, so that
the merged model is the trained one bit for bit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.kernels import pack
from quadapt.nn.adapters.base import Adapter, Exactness
from quadapt.quant.fake_quant import FakeQuant, fake_quant_codes, fake_quant_matmul
from quadapt.quant.grids import check_choice, implied_offsets
from quadapt.quant.storage import FLOATS
from quadapt.quant.weight import Layout, QuantWeight

Source = QuantWeight | Tensor
"""What an adapter trains over: a quantized weight, or the dense one `[out, in]`."""

Trained = Mapping[str, Tensor]
"""Trained tensors by name: `rho` and `shift` `[out, groups]`, `A` and `B`, as far as an adapter has them."""

Held = Literal["fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class GridAdapter(Adapter):
    """An adapter whose forward quantizes: scales, and offsets or codes, are part of the training step."""

    scales: Held | Literal["base"] = "base"
    """How scales (and float offsets) are stored in the end; base: as those of the quantized base, fp16 where there is
    none."""

    def __post_init__(self) -> None:
        check_choice("scales", self.scales, ("base", *FLOATS))

    @property
    def names(self) -> tuple[str, ...]:
        """Trained tensors `[out, groups]`; each starts at zero."""
        return ("rho",)

    @property
    def exactness(self) -> Exactness:
        return "exact"

    @property
    def merged_form(self) -> bool:
        return True

    def check(self, layout: Layout, rank: int, dropout: float) -> None:
        if dropout:
            raise ConfigError(f"dropout={dropout}: {self.kind} adapters train without it. Use dropout=0")

    def reset(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        nn.init.zeros_(lora_B)

    @abstractmethod
    def product(self, source: Source) -> Layout:
        """Layout of the quantized matrix that a merge gives."""

    @abstractmethod
    def how(self, layout: Layout) -> FakeQuant:
        """How forward quantizes to `layout`."""

    def start(self, source: Source) -> Tensor:
        """What scales and shifts start from over a dense base, float32 `[2, out, groups]`; a quantized base says it."""
        raise AssertionError(f"{self.kind} starts from its base")

    @abstractmethod
    def grid(
        self, source: Source, start: Tensor | None, trained: Trained, scaling: float
    ) -> tuple[Tensor, Tensor | None]:
        """Scales, and what is stored for offsets (offsets, zero-points, or nothing), differentiable, as stored."""

    def inside(self, trained: Trained) -> tuple[Tensor | None, Tensor | None]:
        """`A` and `B` that the quantizer sees."""
        return trained.get("A"), trained.get("B")

    def forward(self, x: Tensor, source: Source, start: Tensor | None, trained: Trained, scaling: float) -> Tensor:
        """The layer's product for `x [.., in]`, without its bias."""
        layout = self.product(source)
        scales, held = self.grid(source, start, trained, scaling)
        A, B = self.inside(trained)
        return fake_quant_matmul(
            source.stored_order(x) if isinstance(source, QuantWeight) else x,
            source.packed if isinstance(source, QuantWeight) else source,
            scales,
            _shift(layout, scales, held),
            how=self.how(layout),
            A=A,
            B=B,
            scaling=scaling,
        )

    @torch.no_grad()
    def quantized(self, source: Source, start: Tensor | None, trained: Trained, scaling: float) -> QuantWeight:
        """What the quantizer gives: codes, scales and offsets, those that forward computes with."""
        layout = self.product(source)
        scales, held = self.grid(source, start, trained, scaling)
        A, B = self.inside(trained)
        base = source.packed if isinstance(source, QuantWeight) else source
        shift = _shift(layout, scales, held)
        codes = fake_quant_codes(base, scales, shift, how=self.how(layout), A=A, B=B, scaling=scaling)
        perm = source.tensors["perm"] if isinstance(source, QuantWeight) and layout.permuted else None
        return QuantWeight.build(layout, pack(codes, layout.format.bits), scales, held, perm)

    def merge(self, source: Source, start: Tensor | None, trained: Trained, scaling: float) -> QuantWeight:
        """The trained matrix, quantized, with nothing else left.

        Raises:
            MergeError: The adapter has a part beside the quantized matrix.
        """
        return self.quantized(source, start, trained, scaling)

    def untrained(self, source: Source, start: Tensor | None, trained: Trained, scaling: float) -> QuantWeight:
        """What the quantizer gave before the first step."""
        begun = {name: tensor if name == "A" else torch.zeros_like(tensor) for name, tensor in trained.items()}
        return self.quantized(source, start, begun, scaling)

    @torch.no_grad()
    def dense(self, source: Source, start: Tensor | None, trained: Trained, scaling: float) -> Tensor:
        """The matrix that forward computes with, float32 `[out, in]`."""
        return self.quantized(source, start, trained, scaling).dequantize()


def grown(rho: Tensor) -> Tensor:
    """`exp(rho)` in float32. By way of float64: each processor has an exponential of its own, and scales are stored."""
    return rho.double().exp().float()


def _shift(layout: Layout, scales: Tensor, held: Tensor | None) -> Tensor:
    """Offsets in units of weights; zeros where the form has none."""
    offsets = implied_offsets(layout, scales, held)
    return torch.zeros_like(scales) if offsets is None else offsets


def base_layout(source: Source) -> Layout:
    """Layout of a quantized source."""
    assert isinstance(source, QuantWeight)
    return source.layout
