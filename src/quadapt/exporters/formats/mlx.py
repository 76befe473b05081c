"""MLX's folder, as mlx-lm runs it on Apple's computers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quadapt.exporters.formats.affine import Affine
from quadapt.exporters.formats.base import EXPORTERS

if TYPE_CHECKING:
    from quadapt.exporters.codes import Writer
    from quadapt.quant.weight import Layout


@EXPORTERS.register("mlx")
@dataclass(frozen=True, kw_only=True)
class MLX(Affine):
    """A folder of codes, scales and offsets as MLX's mode affine has them."""

    summary: ClassVar[str] = "for Apple's computers, codes as they are, of 2, 3, 4, 5, 6 and 8 bits with any offsets"
    served_by: ClassVar[str] = "mlx-lm, LM Studio on Macs"

    def writer(self) -> Writer:
        from quadapt.exporters.mlx import MLXWriter

        return MLXWriter(self.dtype)

    def never(self, layout: Layout) -> str | None:
        from quadapt.exporters.mlx import why_not_layout

        return why_not_layout(layout) or None
