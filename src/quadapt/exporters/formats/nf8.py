"""An adapter with its factors in 8 bits, for quadapt alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quadapt.errors import ConfigError
from quadapt.exporters.formats.base import EXPORTERS, Exporter, Origin, Progress

if TYPE_CHECKING:
    from quadapt.exporters.report import ExportReport
    from quadapt.nn.adapters import Adapter
    from quadapt.quant.weight import Layout


@EXPORTERS.register("nf8")
@dataclass(frozen=True, kw_only=True)
class NF8(Exporter):
    """The adapter alone, factors as NF8 with linear scales: what LQ-LoRA (arXiv 2311.12023) calls model compression."""

    summary: ClassVar[str] = "the adapter in 8 bits, for quadapt alone"
    form: ClassVar[str] = "LoRA factors in 8 bits"
    served_by: ClassVar[str] = "quadapt"
    takes: ClassVar[Literal["adapter"]] = "adapter"

    def accepts(self, layout: Layout) -> str | None:
        return None  # the adapter lies over the base, whatever its layout

    def check_adapter(self, adapter: Adapter) -> None:
        if adapter.exactness != "none":
            raise ConfigError(
                "the adapter merges into the codes, and then takes no bits at all. Merge it (quadapt merge), or use "
                "--format gguf"
            )

    def check_model(self, model: Any, tokenizer: Any) -> None:
        from quadapt.exporters.nf8 import check_nf8

        check_nf8(model)

    def changes(self, adapter: Adapter) -> str:
        return "its factors are rounded to 8 bits"

    def write(
        self, model: Any, tokenizer: Any, path: Path, *, origin: Origin | None = None, progress: Progress = iter
    ) -> ExportReport:
        from quadapt.exporters.nf8 import base_note, export_nf8
        from quadapt.hf.saving import write_note

        report = export_nf8(model, path)
        tokenizer.save_pretrained(path)
        if origin is not None:
            write_note(path, base_note(origin.note, origin.base, origin.output))
        return report
