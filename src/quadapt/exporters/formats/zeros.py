"""What formats of integers have in common whose zero-points are whole numbers or floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quadapt.exporters.formats.integers import Integers

if TYPE_CHECKING:
    from quadapt.quant.weight import Layout, QuantWeight

_ROUNDED = ("codes and scales as they are, offsets as zero-points of floats", False)


@dataclass(frozen=True, kw_only=True)
class Zeros(Integers):
    """A folder of codes, scales and zero-points; offsets of floats become zero-points that are rounded to float32."""

    def instead(self, layout: Layout) -> tuple[str, bool] | None:
        from quadapt.exporters.integers import why_not_scales

        if layout.format.zero != "float":
            return super().instead(layout)
        return None if self.never(layout) or why_not_scales(layout, self.writer().floats) else _ROUNDED

    def replaced(self, weight: QuantWeight) -> tuple[str, bool] | None:
        if weight.format.zero != "float":
            return super().replaced(weight)
        return None if self.writer().why_not(weight) else _ROUNDED

    def accepts(self, layout: Layout) -> str | None:
        from quadapt.exporters.integers import why_not_scales

        if layout.format.zero != "float":
            return super().accepts(layout)
        return self.never(layout) or why_not_scales(layout, self.writer().floats) or self._rounds()

    def holds(self, weight: QuantWeight) -> str | None:
        if weight.format.zero != "float":
            return super().holds(weight)
        return self.writer().why_not(weight) or self._rounds()

    def _rounds(self) -> str:
        """Why offsets of floats are not held exactly."""
        return (
            f"its offsets are floats, and {self.name} has zero-points, in steps: each is rounded once, so that weights "
            "differ by rounding errors of float32"
        )
