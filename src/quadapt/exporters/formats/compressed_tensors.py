"""compressed-tensors' `pack-quantized` folder, as vLLM serves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quadapt.exporters.formats.base import EXPORTERS
from quadapt.exporters.formats.integers import Integers

if TYPE_CHECKING:
    from quadapt.exporters.codes import Writer
    from quadapt.quant.weight import Layout


@EXPORTERS.register("compressed-tensors")
@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Integers):
    """A folder of codes, scales and whole zero-points in the form of the compressed-tensors package."""

    summary: ClassVar[str] = "for vLLM, codes as they are, of integers with whole zero-points or none"
    served_by: ClassVar[str] = "vLLM (before 0.32 zero-points of 4 and 8 bits alone), SGLang (4 and 8 bits)"

    def writer(self) -> Writer:
        from quadapt.exporters.compressed_tensors import CompressedTensorsWriter

        return CompressedTensorsWriter(self.dtype)

    def never(self, layout: Layout) -> str | None:
        from quadapt.exporters.compressed_tensors import why_not_layout

        return why_not_layout(layout) or None
