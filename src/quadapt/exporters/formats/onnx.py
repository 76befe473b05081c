"""ONNX Runtime's folder: a whole model as one graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quadapt.exporters.formats.base import EXPORTERS
from quadapt.exporters.formats.zeros import Zeros

if TYPE_CHECKING:
    from quadapt.exporters.codes import Writer
    from quadapt.quant.weight import Layout


@EXPORTERS.register("onnx")
@dataclass(frozen=True, kw_only=True)
class ONNX(Zeros):
    """A whole model as a graph of ONNX in float32, with codes, scales and zero-points in the operator MatMulNBits."""

    summary: ClassVar[str] = (
        "for ONNX Runtime, codes as they are, of 2, 3 and 4 bits, of 5, 6 and 8 without float offsets"
    )
    served_by: ClassVar[str] = "ONNX Runtime"

    dtype: Literal["float32"] = "float32"
    """The dtype of all that is not quantized, and of scales: float32."""

    def writer(self) -> Writer:
        from quadapt.exporters.onnx import ONNXWriter

        return ONNXWriter(self.dtype)

    def never(self, layout: Layout) -> str | None:
        from quadapt.exporters.onnx import why_not_layout

        return why_not_layout(layout) or None
