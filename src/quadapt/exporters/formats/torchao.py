"""torchao's folder, as transformers loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quadapt.exporters.formats.base import EXPORTERS
from quadapt.exporters.formats.zeros import Zeros

if TYPE_CHECKING:
    from quadapt.exporters.codes import Writer
    from quadapt.quant.weight import Layout


@EXPORTERS.register("torchao")
@dataclass(frozen=True, kw_only=True)
class TorchAO(Zeros):
    """A folder of codes, scales and zero-points, whole ones or floats, as torchao's tensors of integers have them."""

    summary: ClassVar[str] = "for transformers with torchao, codes as they are, of 2, 3, 4, 5, 6 and 8 bits"
    served_by: ClassVar[str] = "transformers with torchao"

    def writer(self) -> Writer:
        from quadapt.exporters.torchao import TorchAOWriter

        return TorchAOWriter(self.dtype)

    def never(self, layout: Layout) -> str | None:
        from quadapt.exporters.torchao import why_not_layout

        return why_not_layout(layout) or None
