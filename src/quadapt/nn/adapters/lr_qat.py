"""Training a low-rank term among the codes of a fixed-point base: LR-QAT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.nn.adapters.base import ADAPTERS, Base, Params, Source
from quadapt.nn.adapters.grid import LowRankGrid, base_layout, grown
from quadapt.quant.fake_quant import FakeQuant, snap
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight


@ADAPTERS.register("lr-qat")
@dataclass(frozen=True, kw_only=True)
class LRQAT(LowRankGrid):
    """LR-QAT (Bondarenko et al. 2024, arXiv:2406.06385): `W' = s * clip(round(W_fixed + scaling * B A))`.

    The low-rank term lives among the codes; the frozen base is 8-bit fixed point, so that training memory is that of a
    quantized model.

    Differs: the fixed point reaches just below `2**(bits - 1)`, where the authors clip to the last code.
    """

    base: ClassVar[Base] = "fixed-point"

    bits: int = 4
    """Width of a code of the product."""

    def with_grid(self, format: Format, storage: Storage) -> LRQAT:
        if format.levels != "int" or format.zero != "none" or format.bits == 8:
            raise ConfigError(
                f"{format.name}: lr-qat trains symmetric integers of 2 to 6 bits. Use --levels int --zero none"
            )
        return replace(self, bits=format.bits, scales=storage.of_scales.trained)

    def layout_of(self, source: Source) -> Layout:
        base = base_layout(source)
        if base.format.bits != 8 or base.format.levels != "int" or base.format.zero != "none":
            raise ConfigError(
                f"lr-qat trains over 8-bit fixed point, not over {base.format.name}. Give the dense model"
            )
        return replace(
            base, format=replace(base.format, bits=self.bits), storage=Storage.floating(self.floats, base.format.zero)
        )

    def how(self, layout: Layout) -> FakeQuant:
        return FakeQuant(format=layout.format, columns=layout.columns, domain="codes", order="round-clamp", base_bits=8)

    def grid(self, source: Source, params: Params, scaling: float) -> tuple[Tensor, Tensor | None]:
        assert isinstance(source, QuantWeight)
        first = source.scales * 2 ** (8 - self.bits)
        return snap(first * grown(params["rho"]), self.layout_of(source).storage.scales), None
