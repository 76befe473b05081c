"""GGUF, the file of llama.cpp and of what is built on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quadapt.exporters.formats.base import EXPORTERS, Exporter, Origin, Progress

if TYPE_CHECKING:
    from quadapt.exporters.report import ExportReport
    from quadapt.quant.weight import Layout, QuantWeight


@EXPORTERS.register("gguf")
@dataclass(frozen=True, kw_only=True)
class GGUF(Exporter):
    """One file with the model, its tokenizer and all that llama.cpp must know; codes go out in block formats."""

    summary: ClassVar[str] = (
        "for llama.cpp, codes as they are (an adapter that cannot merge becomes a LoRA file beside it)"
    )
    form: ClassVar[str] = "codes as they are"
    served_by: ClassVar[str] = "llama.cpp, Ollama, LM Studio"
    suffix: ClassVar[str] = ".gguf"
    place: ClassVar[str] = "model.gguf"
    unmerged: ClassVar[Literal["beside"]] = "beside"

    dense: Literal["f32", "f16"] = "f32"
    """Type of the layers that a block format cannot hold: f32, or f16, which rounds them."""

    def instead(self, layout: Layout) -> tuple[str, bool]:
        return f"dense {self.dense.upper()}", self.dense == "f32"

    def accepts(self, layout: Layout) -> str | None:
        from quadapt.exporters.ggml import why_not_layout

        return why_not_layout(layout) or None

    def holds(self, weight: QuantWeight) -> str | None:
        from quadapt.exporters.ggml import why_not

        return why_not(weight) or None

    def check_model(self, model: Any, tokenizer: Any) -> None:
        from quadapt.exporters.gguf_lora import alpha_of
        from quadapt.exporters.gguf_metadata import family_of
        from quadapt.exporters.gguf_tokenizer import write_tokenizer
        from quadapt.exporters.lora import merges
        from quadapt.exporters.tensors import base_of

        base = base_of(model)
        family_of(base)
        write_tokenizer(_Nowhere(), tokenizer, base)  # type: ignore[arg-type]
        if not merges(model):
            alpha_of(model)

    def write(
        self, model: Any, tokenizer: Any, path: Path, *, origin: Origin | None = None, progress: Progress = iter
    ) -> ExportReport:
        from quadapt.exporters.gguf import export_gguf

        return export_gguf(model, tokenizer, path, dense=self.dense, progress=progress)

    def beside(self, path: Path) -> Path:
        return path.with_name(f"{path.stem}-lora.gguf")

    def write_beside(self, model: Any, path: Path) -> ExportReport:
        from quadapt.exporters.gguf_lora import export_gguf_lora

        return export_gguf_lora(model, path)


class _Nowhere:
    """In the place of a writer: takes everything and writes nothing, to see whether it can be said at all."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None
