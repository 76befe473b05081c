"""Whole models for OpenVINO: the graph of ONNX, as OpenVINO reads it, in its own form (IR).

    W[o, i] = (code[o, i] - zero[o, g]) * scales[o, g],    g = i // block_size

OpenVINO turns each `MatMulNBits` of the graph (`exporters/onnx.py`) into constants of u2, u4 or u8, from which
zero-points are subtracted and which are multiplied by scales; its plug-in for CPUs multiplies with the codes as they
are. The file is written in float32, nothing is compressed.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from quadapt.errors import ExportError
from quadapt.exporters import onnx
from quadapt.exporters.onnx import ONNXWriter

FILE = "openvino_model.xml"
"""The name of the graph; weights lie beside it."""


class OpenVINOWriter(ONNXWriter):
    """Writes whole models that OpenVINO runs."""

    name: ClassVar[str] = "openvino"

    def check_model(self, model: Any) -> None:
        if find_spec("openvino") is None:
            raise ExportError("graphs become OpenVINO's by its own reader. pip install 'quadapt[openvino]'")
        super().check_model(model)

    def notes(self, model: Any) -> list[str]:
        return [
            "OpenVINO may round as it computes. INFERENCE_PRECISION_HINT=f32 and KV_CACHE_PRECISION=f32 keep float32"
        ]

    def write_graph(self, graph: Any, folder: Path) -> None:
        import openvino

        with tempfile.TemporaryDirectory(dir=folder) as place:
            super().write_graph(graph, Path(place))
            found = openvino.Core().read_model(Path(place) / onnx.FILE)
            openvino.save_model(found, folder / FILE, compress_to_fp16=False)
            del found  # which maps the files in that place
