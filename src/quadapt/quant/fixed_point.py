"""A frozen base of eight bits for codes that are to move: those of fewer bits, with what they were rounded from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.kernels import pack, unpack
from quadapt.quant.rounding import BlockRounding, Nearest, Rounding, Statistics, row_chunks
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

BITS = 8
"""The width of a code of the base."""


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Rounding):
    """Any rounding, of which the base keeps what was rounded: real-valued codes, in fixed point of eight bits.

    A code of the base is the real-valued code times `2**(8 - bits)`, where `bits` is the width of the product's. It
    rounds to the code that the rounding chose: training that moves real-valued codes (LR-QAT) begins with exactly the
    model that the rounding gives, GPTQ or Block-AP as well as the nearest.

    Source: LR-QAT (arXiv:2406.06385), whose base is Q n.(8-n) of the dense weights.
    Differs: the fixed point reaches just below `2**(bits - 1)`, where the authors clip to the last code; and a number
        that eight bits would put on the middle between two codes stays on the side of its own.
    """

    name: ClassVar[str] = "fixed-point"

    rounding: Rounding = field(default_factory=lambda: Nearest(range="mse"))
    """How codes, scales and offsets of the product are chosen at first."""

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # of the rounding that is inside
        """The names of the statistics that the rounding inside reads."""
        return self.rounding.needs

    @property
    def true_sequential(self) -> bool:
        return self.rounding.true_sequential

    @property
    def least_sequences(self) -> int:
        return self.rounding.least_sequences

    def without_data(self) -> Rounding:  # type: ignore[override]  # plans, which want Nearest, are made of codes alone
        return FixedPoint(rounding=self.rounding.without_data())

    def check(self, layout: Layout) -> None:
        super().check(layout)
        if layout.format.levels != "int":
            raise ConfigError(f"{layout.name}: a fixed-point base is made of integers. Use levels='int'")
        self.rounding.check(layout)

    def stored(self, layout: Layout) -> Layout:
        """The layout of the base, given that of the product: finer codes, and floats that lose nothing."""
        format = replace(layout.format, bits=BITS)
        return replace(layout, format=format, storage=Storage.floating("fp32", format.zero))

    def __call__(self, weight: Tensor, layout: Layout, statistics: Statistics = {}) -> QuantWeight:  # noqa: B006
        self.check(layout)
        return self._fine(*self.rounding.with_real_codes(weight, layout, statistics))

    def product(self, weight: QuantWeight, layout: Layout) -> QuantWeight:
        bits, step = layout.format.bits, _step(layout.format.bits)
        codes = unpack(weight.packed, BITS, layout.columns)
        coarse = (codes.float() / step).round().clamp_max(2**bits - 1).to(torch.uint8)
        scales, offsets = weight.scales * step, _offsets(weight, weight.scales * step)
        permuted = weight.layout.permuted
        perm = weight.tensors["perm"] if permuted else None
        return QuantWeight.build(replace(layout, permuted=permuted), pack(coarse, bits), scales, offsets, perm)

    def _fine(self, coarse: QuantWeight, real: Tensor) -> QuantWeight:
        """The base: real-valued codes `[out, in]` in stored order, each kept within the cell of its code."""
        bits, columns = coarse.format.bits, coarse.layout.columns
        step, packed = _step(bits), []
        for rows in row_chunks(real):
            codes = step * unpack(coarse.packed[rows], bits, columns).to(real.dtype)
            inside = max(0, step // 2 - 1)
            fine = torch.clamp((real[rows] * step).round(), codes - inside, codes + inside)
            packed.append(pack(fine.clamp(0, 2**BITS - 1).to(torch.uint8), BITS))
        scales, perm = coarse.scales / step, coarse.tensors.get("perm")
        return QuantWeight.build(self.stored(coarse.layout), torch.cat(packed), scales, _offsets(coarse, scales), perm)


@dataclass(frozen=True, kw_only=True)
class FixedPointBlocks(FixedPoint, BlockRounding):
    """The fixed-point base of a rounding that trains whole blocks together (Block-AP)."""

    rounding: BlockRounding
    """How codes, scales and offsets of the product are chosen at first."""

    def layer(self, linear: nn.Linear, layout: Layout) -> Any:
        return self.rounding.layer(linear, layout)

    def fit(self, block: nn.Module, layers: Any, examples: Any) -> tuple[float, float]:
        return self.rounding.fit(block, layers, examples)

    def of_layer(self, layer: Any) -> QuantWeight:
        return self._fine(self.rounding.of_layer(layer), layer.real_codes())


def fixed_point(rounding: Rounding) -> FixedPoint:
    """The fixed-point base of a rounding, whatever it rounds at once."""
    if isinstance(rounding, BlockRounding):
        return FixedPointBlocks(rounding=rounding, batch_size=rounding.batch_size)
    return FixedPoint(rounding=rounding)


def _step(bits: int) -> int:
    """How many codes of the base lie between two neighbouring ones of so many bits."""
    return int(2 ** (BITS - bits))


def _offsets(weight: QuantWeight, scales: Tensor) -> Tensor | None:
    """What is stored for the offsets of a weight, in steps of other scales where these are zero-points."""
    if weight.format.zero == "none":
        return None
    assert weight.offsets is not None
    return (-weight.offsets / scales).round() if weight.format.zero == "integer" else weight.offsets
