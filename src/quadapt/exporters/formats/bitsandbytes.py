"""bitsandbytes' folder of four bits, as transformers and PEFT load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quadapt.exporters.formats.base import EXPORTERS
from quadapt.exporters.formats.codes import Codes

if TYPE_CHECKING:
    from quadapt.exporters.codes import Writer
    from quadapt.quant.weight import Layout, QuantWeight


@EXPORTERS.register("bitsandbytes")
@dataclass(frozen=True, kw_only=True)
class BitsAndBytes(Codes):
    """A folder of codes and scales in the form of bitsandbytes' NF4 and FP4."""

    summary: ClassVar[str] = "for transformers and PEFT with bitsandbytes, codes as they are, of NF4 and FP4"
    served_by: ClassVar[str] = "transformers, PEFT and TGI, each with bitsandbytes"

    def writer(self) -> Writer:
        from quadapt.exporters.bitsandbytes import BitsAndBytesWriter

        return BitsAndBytesWriter(self.dtype)

    def never(self, layout: Layout) -> str | None:
        from quadapt.exporters.bitsandbytes import why_not_layout

        return why_not_layout(layout) or None

    def instead(self, layout: Layout) -> tuple[str, bool] | None:
        other = self.never(layout) is None and layout.format.levels == "nf"
        return ("codes as they are, of other levels", False) if other else None

    def accepts(self, layout: Layout) -> str | None:
        from quadapt.exporters.bitsandbytes import OTHER_LEVELS

        return self.never(layout) or (OTHER_LEVELS if layout.format.levels == "nf" else None)

    def holds(self, weight: QuantWeight) -> str | None:
        return self.accepts(weight.layout)
