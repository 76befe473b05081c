"""Training a low-rank term among the codes of a fixed-point base: LR-QAT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.nn.adapters.base import ADAPTERS, Base, Param, Params, Source
from quadapt.nn.adapters.grid import LowRankGrid, base_layout, grid_param, grown
from quadapt.quant.fake_quant import FakeQuant
from quadapt.quant.fixed_point import BITS
from quadapt.quant.format import Format, Zero
from quadapt.quant.grids import check_choice
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight


@ADAPTERS.register("lr-qat")
@dataclass(frozen=True, kw_only=True)
class LRQAT(LowRankGrid):
    """LR-QAT (Bondarenko et al. 2024, arXiv:2406.06385): `W' = s * clip(round(W_fixed + scaling * B A))`.

    The low-rank term lives among the codes; the frozen base is 8-bit fixed point, so that training memory is that of a
    quantized model. Any rounding may have chosen the first codes, scales and offsets (`quant/fixed_point.py`).

    Differs: the grid may have offsets too, whole zero-points that stay, or floats that train, in units of the first
        scale.
    """

    base: ClassVar[Base] = "fixed-point"
    extra: ClassVar[tuple[str, ...]] = ("rho", "shift")

    bits: int = 4
    """The width of a code of the product."""

    group_size: int | None = None
    """How many inputs share a scale; None for as many as in the base."""

    offsets: Zero = "none"
    """none: symmetric, only scales train. integer: whole zero-points, which stay. float: offsets train too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("offsets", self.offsets, ("none", "integer", "float"))

    def with_grid(self, format: Format, storage: Storage) -> LRQAT:
        if format.levels != "int" or format.bits == BITS:
            raise ConfigError(
                f"{format.name}: {self.kind} trains evenly spaced codes of 2 to 6 bits. Use levels='int' and fewer bits"
            )
        assert format.zero != "default"  # a format resolves it
        scales = storage.of_scales.trained
        return replace(self, bits=format.bits, group_size=format.group_size, offsets=format.zero, scales=scales)

    def layout_of(self, source: Source) -> Layout:
        base = base_layout(source)
        group_size = base.format.group_size if self.group_size is None else self.group_size
        format = Format(bits=self.bits, group_size=group_size, zero=self.offsets)
        product = Layout.fitting(format, Storage.floating(self.floats, self.offsets), base.out, base.columns)
        if base.format != replace(product.format, bits=BITS):
            raise ConfigError(
                f"{self.kind} trains over 8-bit fixed point of {product.name}, not over {base.name}. Give the dense "
                "model"
            )
        return replace(product, permuted=base.permuted)

    def grid_params(self, layout: Layout) -> dict[str, Param]:
        """`rho`, and `shift` where offsets train."""
        names = ("rho", "shift") if layout.format.zero == "float" else ("rho",)
        return {name: grid_param(layout) for name in names}

    def how(self, layout: Layout) -> FakeQuant:
        return FakeQuant(
            format=layout.format, columns=layout.columns, domain="codes", order="round-clamp", base_bits=BITS
        )

    def grid(self, source: Source, params: Params, scaling: float) -> tuple[Tensor, Tensor | None]:
        assert isinstance(source, QuantWeight)
        layout = self.layout_of(source)
        bits, zero, storage = layout.format.bits, layout.format.zero, layout.storage
        first = source.scales * 2 ** (BITS - bits)
        scales = storage.of_scales.snap(first * grown(params["rho"]))
        if zero == "none":
            return scales, None
        assert source.offsets is not None
        if zero == "integer":
            return scales, (-source.offsets / first).round()
        # A scale that grows does so about the middle of its levels, as if it were symmetric.
        middle = 2 ** (bits - 1) * (first - scales)
        return scales, storage.of_offsets.snap(source.offsets + first * params["shift"].float() + middle)
