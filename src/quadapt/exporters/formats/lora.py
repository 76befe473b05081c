"""A stock PEFT adapter, for servers that hold the dense base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quadapt.exporters.formats.base import EXPORTERS, Exporter, Origin, Progress

if TYPE_CHECKING:
    from quadapt.exporters.report import ExportReport
    from quadapt.nn.adapters import Adapter
    from quadapt.quant.weight import Layout


@EXPORTERS.register("lora")
@dataclass(frozen=True, kw_only=True)
class StockLoRA(Exporter):
    """The adapter alone, as the LoRA that PEFT and servers know; its base is exported by itself (hf, gguf)."""

    summary: ClassVar[str] = "a standard PEFT adapter"
    form: ClassVar[str] = "LoRA factors in float32"
    served_by: ClassVar[str] = "PEFT, vLLM, SGLang over the dense base"
    place: ClassVar[str] = "lora"
    takes: ClassVar[Literal["adapter"]] = "adapter"

    def accepts(self, layout: Layout) -> str | None:
        return None  # the adapter lies over the base, whatever its layout

    def check_model(self, model: Any, tokenizer: Any) -> None:
        from quadapt.exporters.lora import check_lora

        check_lora(model)

    def changes(self, adapter: Adapter) -> str:
        if adapter.merged_form:
            return "the adapter was trained in the merged form, with rounded offsets; beside the base it is not rounded"
        return ""

    def write(
        self, model: Any, tokenizer: Any, path: Path, *, origin: Origin | None = None, progress: Progress = iter
    ) -> ExportReport:
        from quadapt.exporters.lora import export_lora

        return export_lora(model, path)
