"""OpenVINO's folder: a whole model in its own form (IR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quadapt.exporters.formats.base import EXPORTERS
from quadapt.exporters.formats.onnx import ONNX

if TYPE_CHECKING:
    from quadapt.exporters.codes import Writer


@EXPORTERS.register("openvino")
@dataclass(frozen=True, kw_only=True)
class OpenVINO(ONNX):
    """A whole model as OpenVINO's IR in float32, with codes of u2, u4 and u8, zero-points and scales."""

    summary: ClassVar[str] = "for OpenVINO, codes as they are, of the widths that onnx has"
    served_by: ClassVar[str] = "OpenVINO"

    def writer(self) -> Writer:
        from quadapt.exporters.openvino import OpenVINOWriter

        return OpenVINOWriter(self.dtype)
