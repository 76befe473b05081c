"""HQQ's folder, as hqq loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quadapt.exporters.formats.base import EXPORTERS
from quadapt.exporters.formats.zeros import Zeros

if TYPE_CHECKING:
    from quadapt.exporters.codes import Writer
    from quadapt.quant.weight import Layout


@EXPORTERS.register("hqq")
@dataclass(frozen=True, kw_only=True)
class HQQ(Zeros):
    """A folder of codes, scales and zero-points as HQQ's layers have them."""

    summary: ClassVar[str] = "for hqq, codes as they are, of 2, 3, 4 and 8 bits"
    served_by: ClassVar[str] = "hqq"

    weights: Literal["qmodel", "safetensors"] = "qmodel"
    """qmodel: the file that hqq loads, qmodel.pt. safetensors: the form that transformers and quadapt read."""

    def writer(self) -> Writer:
        from quadapt.exporters.hqq import HQQWriter

        return HQQWriter(self.dtype, self.weights)

    def never(self, layout: Layout) -> str | None:
        from quadapt.exporters.hqq import why_not_layout

        return why_not_layout(layout) or None
