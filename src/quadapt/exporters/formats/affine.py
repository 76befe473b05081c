"""What formats of integers with offsets of floats have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quadapt.exporters.formats.codes import Codes

if TYPE_CHECKING:
    from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True, kw_only=True)
class Affine(Codes):
    """A folder of codes, scales and offsets."""

    def accepts(self, layout: Layout) -> str | None:
        from quadapt.exporters.affine import why_not_floats

        return self.never(layout) or why_not_floats(layout, self.writer().floats) or None

    def holds(self, weight: QuantWeight) -> str | None:
        return self.writer().why_not(weight) or None
