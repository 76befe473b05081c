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
    paired: ClassVar[bool] = True

    dense: Literal["f32", "f16"] = "f32"
    """Type of the layers that a block format cannot hold: f32, or f16, which rounds them."""

    gguf_type: Literal["auto", "fast"] = "auto"
    """Type of the blocks that hold a layer. auto: the smallest that holds the same numbers. fast: one whose products
    llama.cpp computes fastest; codes are kept, scales and offsets may be rounded, and the report says how far weights
    move."""

    embeddings: Literal["float", "q8_0", "q6_k"] = "float"
    """Type of embedding and head. float: as they are, in blocks if they were rounded to such values before training.
    q8_0 and q6_k: rounded now, and the report says how far."""

    unknown: Literal["fail", "bytes"] = "fail"
    """What llama.cpp makes of characters that a tokenizer without bytes does not know. fail: an error. bytes: tokens
    for bytes, which are added to the file and stand for the unknown one."""

    def instead(self, layout: Layout) -> tuple[str, bool]:
        return f"dense {self.dense.upper()}", self.dense == "f32"

    def replaced(self, weight: QuantWeight) -> tuple[str, bool]:
        from quadapt.exporters.ggml import ways

        held = next(iter(ways(weight, self.gguf_type)), None)
        return self.instead(weight.layout) if held is None else (f"{held.block.name}, {held.change}", False)

    def accepts(self, layout: Layout) -> str | None:
        from quadapt.exporters.ggml import why_not_layout

        return why_not_layout(layout) or None

    def holds(self, weight: QuantWeight) -> str | None:
        from quadapt.exporters.ggml import ways, why_not

        held = next(iter(ways(weight, self.gguf_type)), None)
        if held is None:
            return why_not(weight)
        return None if held.change is None else why_not(weight) or f"{self.gguf_type} prefers {held.block.name}"

    def pairs(self, layout: Layout) -> bool:
        from quadapt.exporters.ggml_forms import fits_with_offsets_aside

        return fits_with_offsets_aside(layout)

    def second(self, path: Path) -> Path:
        from quadapt.exporters.gguf_offsets import offsets_file

        return offsets_file(path)

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

        return export_gguf(
            model,
            tokenizer,
            path,
            dense=self.dense,
            gguf_type=self.gguf_type,
            embeddings=self.embeddings,
            unknown=self.unknown,
            progress=progress,
        )

    def beside(self, path: Path) -> Path:
        return path.with_name(f"{path.stem}-lora.gguf")

    def besides(self, path: Path) -> list[Path]:
        return [file for file in (self.beside(path), self.second(path)) if file.exists()]

    def write_beside(self, model: Any, path: Path) -> ExportReport:
        from quadapt.exporters.gguf_lora import export_gguf_lora

        return export_gguf_lora(model, path)


class _Nowhere:
    """In the place of a writer: takes everything and writes nothing, to see whether it can be said at all."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None
