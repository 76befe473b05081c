"""What formats have in common that are a folder of codes in the layout of other software."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quadapt.errors import ExportError
from quadapt.exporters.formats.base import Exporter, Origin, Progress

if TYPE_CHECKING:
    from quadapt.exporters.codes import Writer
    from quadapt.exporters.report import ExportReport
    from quadapt.quant.weight import Layout


@dataclass(frozen=True, kw_only=True)
class Codes(Exporter):
    """A folder of codes and scales as they are."""

    form: ClassVar[str] = "codes as they are"

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """The dtype of all that is not quantized (and of scales, for integers): float16, bfloat16 or float32."""

    @abstractmethod
    def writer(self) -> Writer:
        """The writer that turns quantized layers into the tensors of this format."""

    @abstractmethod
    def never(self, layout: Layout) -> str | None:
        """Why the model is refused for a matrix of this layout, whatever its numbers; None if it is not."""

    def check_model(self, model: Any, tokenizer: Any) -> None:
        from quadapt.exporters.tensors import as_stored, base_of, tensors_of
        from quadapt.model.quantize import quantized_layers

        writer = self.writer()
        writer.check_model(base_of(model))
        if base_of(model) is model:  # names of layers that carry adapters are others than they will be
            as_stored(model, dict(tensors_of(model)), dense=False)
        layouts = {name: layer.layout for name, layer in quantized_layers(base_of(model)).items()}
        why = writer.why_not_together(layouts)
        if why:
            raise ExportError(why)

    def write(
        self, model: Any, tokenizer: Any, path: Path, *, origin: Origin | None = None, progress: Progress = iter
    ) -> ExportReport:
        return self.writer().export(model, tokenizer, path, progress)
