"""compressed-tensors' `pack-quantized` folder, as vLLM serves it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quadapt.exporters.formats.base import EXPORTERS, Exporter, Origin, Progress

if TYPE_CHECKING:
    from quadapt.exporters.report import ExportReport
    from quadapt.quant.weight import Layout, QuantWeight

_ORDER = (
    "its scales ({name}) have more digits than float16: readers compute scale * (code - zero-point), which may round "
    "otherwise in the last bit of float32 than scale * code + offset"
)


@EXPORTERS.register("compressed-tensors")
@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Exporter):
    """A folder of codes, scales and whole zero-points in the form of the compressed-tensors package."""

    summary: ClassVar[str] = "for vLLM, codes as they are, of integers with whole zero-points or none"
    form: ClassVar[str] = "codes as they are"
    served_by: ClassVar[str] = "vLLM (older ones and SGLang: 4 and 8 bits)"

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """The dtype of scales and of all that is not quantized: float16, bfloat16 or float32."""

    def instead(self, layout: Layout) -> tuple[str, bool] | None:
        import torch

        from quadapt.exporters.compressed_tensors import cannot_hold_layout

        kept = not cannot_hold_layout(layout) and layout.storage.of_scales.exact_in(getattr(torch, self.dtype))
        return ("codes as they are, multiplied in another order", False) if kept else None

    def accepts(self, layout: Layout) -> str | None:
        import torch

        from quadapt.exporters.compressed_tensors import cannot_hold_layout

        why, scales = cannot_hold_layout(layout), layout.storage.of_scales
        if not why and not scales.exact_in(getattr(torch, self.dtype)):
            why = f"its scales ({scales.name}) may not be exact in {self.dtype}. Use --dtype float32"
        return why or (None if scales.exact_in(torch.float16) else _ORDER.format(name=scales.name))

    def holds(self, weight: QuantWeight) -> str | None:
        import torch

        from quadapt.exporters.compressed_tensors import cannot_hold

        why, scales = cannot_hold(weight, getattr(torch, self.dtype)), weight.scales
        exact = torch.equal(scales.half().float(), scales)
        return why or (None if exact else _ORDER.format(name=weight.layout.storage.scales))

    def never(self, layout: Layout) -> str | None:
        from quadapt.exporters.compressed_tensors import cannot_hold_layout

        return cannot_hold_layout(layout) or None

    def check_model(self, model: Any, tokenizer: Any) -> None:
        from quadapt.exporters.tensors import as_stored, base_of, tensors_of

        if base_of(model) is model:  # names of layers that carry adapters are others than they will be
            as_stored(model, dict(tensors_of(model)))

    def write(
        self, model: Any, tokenizer: Any, path: Path, *, origin: Origin | None = None, progress: Progress = iter
    ) -> ExportReport:
        from quadapt.exporters.compressed_tensors import export_compressed_tensors

        return export_compressed_tensors(model, tokenizer, path, dtype=self.dtype)
