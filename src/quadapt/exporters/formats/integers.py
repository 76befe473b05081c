"""What formats of integers with whole zero-points, or none, have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quadapt.exporters.formats.codes import Codes

if TYPE_CHECKING:
    from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True, kw_only=True)
class Integers(Codes):
    """A folder of codes, scales and whole zero-points."""

    def instead(self, layout: Layout) -> tuple[str, bool] | None:
        from quadapt.exporters.integers import why_not_order, why_not_scales

        kept = not self.never(layout) and not why_not_scales(layout, self.writer().floats)
        return ("codes as they are, multiplied in another order", False) if kept and why_not_order(layout) else None

    def replaced(self, weight: QuantWeight) -> tuple[str, bool] | None:
        return None if self.writer().why_not(weight) else ("codes as they are, multiplied in another order", False)

    def accepts(self, layout: Layout) -> str | None:
        from quadapt.exporters.integers import why_not_order, why_not_scales

        why = self.never(layout) or why_not_scales(layout, self.writer().floats) or why_not_order(layout)
        return why or None

    def holds(self, weight: QuantWeight) -> str | None:
        from quadapt.exporters.integers import rounds_otherwise

        return self.writer().why_not(weight) or rounds_otherwise(weight) or None
