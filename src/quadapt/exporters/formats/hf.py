"""An ordinary transformers folder: weights dequantized, for any server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quadapt.exporters.formats.base import EXPORTERS, Exporter, Origin, Progress

if TYPE_CHECKING:
    from quadapt.exporters.report import ExportReport
    from quadapt.quant.weight import Layout


@EXPORTERS.register("hf")
@dataclass(frozen=True, kw_only=True)
class HF(Exporter):
    """A folder of dense weights, which loads without quadapt, and is as large as the model was before quantization."""

    summary: ClassVar[str] = "dense weights, for any server"
    form: ClassVar[str] = "dense weights"
    served_by: ClassVar[str] = "transformers, vLLM, SGLang, TGI"
    place: ClassVar[str] = "dense"
    unmerged: ClassVar[Literal["added"]] = "added"

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype of all weights: bfloat16, float16, or float32, which alone holds quantized weights exactly."""

    def instead(self, layout: Layout) -> tuple[str, bool]:
        return f"dense weights rounded to {self.dtype}", False

    def accepts(self, layout: Layout) -> str | None:
        if self.dtype == "float32":
            return None
        return f"{self.dtype} cannot hold every scale times its level exactly. Use --dtype float32"

    def write(
        self, model: Any, tokenizer: Any, path: Path, *, origin: Origin | None = None, progress: Progress = iter
    ) -> ExportReport:
        from quadapt.exporters.dense import export_hf

        return export_hf(model, tokenizer, path, dtype=self.dtype, progress=progress)
