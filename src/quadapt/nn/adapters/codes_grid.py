"""Adapters over codes whose forward quantizes: scales, offsets or codes move, within the grid of the base."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.nn.adapters.base import Params, Source, check_offsets
from quadapt.nn.adapters.grid import GridAdapter, base_layout
from quadapt.quant.fake_quant import FakeQuant
from quadapt.quant.storage import Storage
from quadapt.quant.weight import SCALES_AND_OFFSETS, Layout, QuantWeight


@dataclass(frozen=True, kw_only=True)
class CodesGrid(GridAdapter):
    """An adapter that begins with the grid of a quantized base; what it does not move stays as it is stored, in bytes.

    Deriving classes say what moves (:attr:`moves_scales`, :attr:`moves_offsets`, :attr:`frees_offsets`), and their
    `grid` says by how much, by :meth:`moved`.
    """

    @property
    def moves_scales(self) -> bool:
        """Whether the scales of the base train, or stay."""
        return True

    @property
    def moves_offsets(self) -> bool:
        """Whether what is stored for the offsets changes. A free offset moves with its scale; a zero-point does not."""
        return self.moves_scales or self.frees_offsets

    @property
    def frees_offsets(self) -> bool:
        """Whether offsets become free floats, whatever those of the base are."""
        return False

    def check(self, layout: Layout, rank: int, dropout: float) -> None:
        super().check(layout, rank, dropout)
        if self.frees_offsets:
            check_offsets(self.kind, layout)

    def layout_of(self, source: Source) -> Layout:
        base = base_layout(source)
        format = replace(base.format, zero="float") if self.frees_offsets else base.format
        assert format.zero != "default"
        anew, storage = self.scales != "base", base.storage
        trained = Storage.floating(self.scales, format.zero) if anew else storage.trained(format.zero)
        if self.moves_scales or anew:
            storage = replace(storage, scales=trained.scales)
        if self.frees_offsets or (storage.of_offsets.free and (self.moves_offsets or anew)):
            storage = replace(storage, offsets=trained.offsets)
        return replace(base, format=format, storage=storage)

    def how(self, layout: Layout) -> FakeQuant:
        return FakeQuant(format=layout.format, columns=layout.columns, domain="codes", order="round-clamp")

    def moved(
        self,
        source: Source,
        *,
        growth: Tensor | None = None,
        steps: Tensor | None = None,
        change: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Scales, and what is stored for offsets, as stored; differentiable in all that moves them.

        Args:
            source: The quantized base.
            growth: What scales and free offsets are multiplied by, `[out, groups]`; None for 1.
            steps: How far offsets are moved, in units of the first scales, `[out, groups]`. Zero-points of a base that
                has whole ones stay whole, straight through that rounding, and within the codes.
            change: How far free offsets are moved besides, in units of weights.
        """
        assert isinstance(source, QuantWeight)
        storage, first, base = self.layout_of(source).storage, source.scales, source.offsets
        scales = storage.of_scales.snap(first if growth is None else first * growth)
        if storage.of_offsets.implied:
            return scales, None
        if not storage.of_offsets.free:
            zero = source.held("offsets")[0].float()  # not from the offsets: a scale may be zero
            top = zero.clamp(min=2**source.format.bits - 1)  # imported zero-points may lie beyond the codes
            return scales, zero if steps is None else _whole(zero - steps, top)
        offsets = torch.zeros_like(first) if base is None else base if growth is None else base * growth
        for more in (None if steps is None else first * steps, change):
            offsets = offsets if more is None else offsets + more
        return scales, storage.of_offsets.snap(offsets)

    @torch.no_grad()
    def quantized(self, source: Source, params: Params, scaling: float) -> QuantWeight:
        """What the quantizer gives; what does not move keeps its bytes, which few storages would find again."""
        assert isinstance(source, QuantWeight)
        found = super().quantized(source, params, scaling)
        stays = {"scales": not self.moves_scales, "offsets": not self.moves_offsets}
        kept = {
            name + suffix: source.tensors[name + suffix]
            for name in SCALES_AND_OFFSETS
            if stays[name] and found.layout.storage.of(name) == source.layout.storage.of(name)
            for suffix in source.layout.storage.of(name).suffixes
        }
        return replace(found, tensors={**found.tensors, **kept})


def check_integers(kind: str, layout: Layout) -> None:
    """Raise ConfigError unless codes are integers, between which a code can move."""
    if layout.format.levels != "int":
        raise ConfigError(
            f"levels={layout.format.levels!r} have no codes between them to train, and a {kind} adapter moves codes. "
            "Use levels='int'"
        )


def _whole(zero: Tensor, top: Tensor) -> Tensor:
    """Zero-points rounded to whole numbers from 0 to `top`, with the gradient of no rounding."""
    return zero + (zero.round().clamp(min=0).minimum(top) - zero).detach()
