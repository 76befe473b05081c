"""GPTQ's folder, as GPTQModel and vLLM serve it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quadapt.exporters.formats.base import EXPORTERS
from quadapt.exporters.formats.integers import Integers

if TYPE_CHECKING:
    from quadapt.exporters.codes import Writer
    from quadapt.quant.weight import Layout


@EXPORTERS.register("gptq")
@dataclass(frozen=True, kw_only=True)
class GPTQ(Integers):
    """A folder of codes, scales and whole zero-points in the layout of GPTQ."""

    summary: ClassVar[str] = "for GPTQModel, codes as they are, of 2, 3, 4 or 8 bits with whole zero-points or none"
    served_by: ClassVar[str] = "GPTQModel, transformers with it; vLLM (symmetric, of 4 and 8 bits)"

    checkpoint_format: Literal["gptq_v2", "gptq"] = "gptq_v2"
    """gptq_v2: zero-points as they are. gptq: less one, for older software; there is none of 0 then."""

    def writer(self) -> Writer:
        from quadapt.exporters.gptq import GPTQWriter

        return GPTQWriter(self.dtype, self.checkpoint_format)

    def never(self, layout: Layout) -> str | None:
        from quadapt.exporters.gptq import why_not_layout

        return why_not_layout(layout) or None

    def accepts(self, layout: Layout) -> str | None:
        from quadapt.exporters.gptq import NO_ZERO

        why = super().accepts(layout)
        if why is None and self.checkpoint_format == "gptq" and layout.format.zero == "integer":
            why = f"it may have a zero-point of 0, {NO_ZERO}"
        return why
