"""AWQ's folder of version gemm, as vLLM serves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quadapt.exporters.formats.base import EXPORTERS
from quadapt.exporters.formats.integers import Integers

if TYPE_CHECKING:
    from quadapt.exporters.codes import Writer
    from quadapt.quant.weight import Layout


@EXPORTERS.register("awq")
@dataclass(frozen=True, kw_only=True)
class AWQ(Integers):
    """A folder of codes, scales and whole zero-points in the layout of AWQ's GEMM kernels."""

    summary: ClassVar[str] = "for vLLM, codes as they are, of 4 bits with whole zero-points or none"
    served_by: ClassVar[str] = "vLLM, GPTQModel, transformers with it"

    def writer(self) -> Writer:
        from quadapt.exporters.awq import AWQWriter

        return AWQWriter(self.dtype)

    def never(self, layout: Layout) -> str | None:
        from quadapt.exporters.awq import why_not_layout

        return why_not_layout(layout) or None
