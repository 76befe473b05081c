"""A frozen base of eight bits for codes that are to move: those of fewer bits, with what they were rounded from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.kernels import pack, unpack
from quadapt.quant.rounding import Nearest, Rounding, Statistics, row_chunks
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

BITS = 8
"""The width of a code of the base."""


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Rounding):
    """Any rounding, of which the base keeps what was rounded: real-valued codes, in fixed point of eight bits.

    A code of the base is the real-valued code times `2**(8 - bits)`, so that it rounds to the code that the rounding
    chose: training that moves real-valued codes (LR-QAT) begins with exactly the model that the rounding gives, GPTQ or
    Block-AP as well as the nearest.

    Source: LR-QAT (arXiv:2406.06385), whose base is Q n.(8-n) of the dense weights.
    Differs: the fixed point reaches just below `2**(bits - 1)`, where the authors clip to the last code; and a number
        that eight bits would put on the middle between two codes stays on the side of its own.
    """

    name: ClassVar[str] = "fixed-point"

    bits: int = 4
    """The width of a code of the product: 2, 3, 4, 5 or 6."""

    storage: Storage = field(default_factory=lambda: Storage(offsets="absent"))
    """How scales and offsets of the product are held."""

    rounding: Rounding = field(default_factory=lambda: Nearest(range="mse"))
    """How codes, scales and offsets of the product are chosen at first."""

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # of the rounding that is inside
        """The names of the statistics that the rounding inside reads."""
        return self.rounding.needs

    @property
    def scope(self) -> Any:
        """What is quantized at once, as the rounding inside does."""
        return self.rounding.scope

    @property
    def true_sequential(self) -> bool:
        """Whether layers are calibrated behind the quantized ones of their block, as the rounding inside is."""
        return getattr(self.rounding, "true_sequential", True)

    @property
    def least_sequences(self) -> int:
        return self.rounding.least_sequences

    @property
    def batch_size(self) -> int:
        """How many sequences a rounding of block scope takes at once."""
        return int(self.rounding.batch_size)  # type: ignore[attr-defined]

    def without_data(self) -> Rounding:
        return replace(self, rounding=self.rounding.without_data())

    def coarse(self, layout: Layout) -> Layout:
        """The layout of the product, given that of the base."""
        return replace(layout, format=replace(layout.format, bits=self.bits), storage=self.storage)

    def check(self, layout: Layout) -> None:
        super().check(layout)
        if layout.format.levels != "int" or layout.format.bits != BITS or self.bits >= BITS:
            raise ConfigError(f"{layout.format.name}: a fixed-point base is made of 8-bit integers, for fewer bits")
        coarse = self.coarse(layout)
        if coarse.storage.fitting(coarse.format, coarse.columns)[0] != coarse.format:
            raise ConfigError(
                f"{coarse.columns} inputs are no whole super-blocks, and a fixed-point base has one width for all "
                "layers. Use --scales fp16, another method (l4q, peqa), or leave the layer out (--skip)"
            )
        self.rounding.check(coarse)

    def __call__(self, weight: Tensor, layout: Layout, statistics: Statistics = {}) -> QuantWeight:  # noqa: B006
        self.check(layout)
        return self._fine(*self.rounding.with_real_codes(weight, self.coarse(layout), statistics), layout)

    def product(self, weight: QuantWeight) -> QuantWeight:
        step, layout = 2 ** (BITS - self.bits), self.coarse(weight.layout)
        codes = unpack(weight.packed, BITS, layout.columns)
        coarse = (codes.float() / step).round().clamp_max(2**self.bits - 1).to(torch.uint8)
        scales, held = weight.scales * step, _held(weight, weight.scales * step)
        perm = weight.tensors["perm"] if layout.permuted else None
        return QuantWeight.build(layout, pack(coarse, self.bits), scales, held, perm)

    def layer(self, linear: nn.Linear, layout: Layout) -> nn.Module:
        """For a rounding of block scope: the layer that is trained in the place of `linear`."""
        return self.rounding.layer(linear, self.coarse(layout))

    def fit(self, block: nn.Module, layers: Any, examples: Any) -> tuple[float, float]:
        """For a rounding of block scope: train `layers` in place, see :class:`quadapt.nn.block_ap.BlockAP`."""
        return self.rounding.fit(block, layers, examples)

    def of_layer(self, layer: Any, layout: Layout) -> QuantWeight:
        """For a rounding of block scope: the base, of a trained layer."""
        coarse = self.coarse(layout)
        return self._fine(self.rounding.of_layer(layer, coarse), layer.real_codes(), layout)

    def _fine(self, coarse: QuantWeight, real: Tensor, layout: Layout) -> QuantWeight:
        """The base: real-valued codes `[out, in]` in stored order, each kept within the cell of its code."""
        step, bits, columns = 2 ** (BITS - self.bits), self.bits, layout.columns
        packed = []
        for rows in row_chunks(real):
            codes = step * unpack(coarse.packed[rows], bits, columns).to(real.dtype)
            fine = (real[rows] * step).round()
            fine = torch.maximum(torch.minimum(fine, codes + (step // 2 - 1)), codes - (step // 2 - 1))
            packed.append(pack(fine.clamp(0, 2**BITS - 1).to(torch.uint8), BITS))
        permuted, scales = coarse.layout.permuted, coarse.scales / step
        held = _held(coarse, scales)
        perm = coarse.tensors["perm"] if permuted else None
        return QuantWeight.build(replace(layout, permuted=permuted), torch.cat(packed), scales, held, perm)


def _held(weight: QuantWeight, scales: Tensor) -> Tensor | None:
    """What is stored for the offsets of a weight, in steps of other scales where these are zero-points."""
    if weight.format.zero == "none":
        return None
    assert weight.offsets is not None
    return (-weight.offsets / scales).round() if weight.format.zero == "integer" else weight.offsets
