"""MLX folders, as mlx-lm writes them for Apple's computers.

    W[o, i] = scales[o, g] * code[o, i] + biases[o, g],    g = i // group_size

Codes are a dense stream of bits along the inputs of one output, the least significant first, in uint32 words: our own
rows of bytes. That is our stored form, too, in which the sum is computed in float32; MLX computes it in the dtype of
the scales, and rounds the product to it. Scales and biases of bfloat16 are held as float32, which is the same number in
more bits.

MLX quantizes embeddings as well, which are held here as dense numbers: those that MLX itself looks up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quadapt import kernels
from quadapt.errors import CheckpointError
from quadapt.importers.base import FLOATS, IMPORTERS, Importer, Parts, by_group, expect, grid, width_of
from quadapt.quant.weight import Layout, QuantWeight

_WIDTHS = (2, 3, 4, 5, 6, 8)


@IMPORTERS.register("mlx")
class MLX(Importer):
    """MLX of 2, 3, 4, 5, 6 and 8 bits, each layer with its own settings if it has any."""

    summary: ClassVar[str] = "2, 3, 4, 5, 6 and 8 bits (mode affine), embeddings too; of mlx-lm"
    parts: ClassVar[tuple[str, ...]] = ("scales", "biases", "weight")
    config_fields: ClassVar[tuple[str, ...]] = ("quantization", "quantization_config")

    group_size: int | None = None
    """Inputs of a group, as the folder says."""

    bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    """Width of a code, as the folder says; the shape of the codes decides."""

    mode: Literal["affine"] = "affine"
    """Which levels there are: evenly spaced ones. mxfp4, nvfp4 and the like are others."""

    layers: dict[str, Any] = Field(default_factory=dict)
    """Settings of single layers, by their names; each layer's shapes tell its own."""

    @classmethod
    def found(cls, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        for field in cls.config_fields:
            about = config.get(field)
            if isinstance(about, Mapping) and "group_size" in about and "quant_method" not in about:
                return about
        return None

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Importer:
        single = {name: value for name, value in about.items() if isinstance(value, Mapping | bool)}
        return super().of({**{name: value for name, value in about.items() if name not in single}, "layers": single})

    def layout(self, parts: Parts, out: int, columns: int) -> Layout:
        words = expect(parts, "weight", (torch.uint32,), (out, None)).shape[1]
        bits, rest = divmod(words * 32, columns)
        if rest or bits not in _WIDTHS:
            raise CheckpointError(
                f"weight: has {words} words for {columns} inputs, which is no width of 2, 3, 4, 5, 6 or 8 bits. The "
                "file is damaged, or belongs to another model"
            )
        scales = expect(parts, "scales", FLOATS, (out, None))
        biases = expect(parts, "biases", FLOATS, tuple(scales.shape))
        if self.bits not in (None, bits) and not self.layers:
            raise CheckpointError(
                f"weight: holds codes of {bits} bits, and config.json says bits={self.bits} (quantization). Correct it"
            )
        return grid(
            out=out,
            columns=columns,
            bits=bits,
            width=self._width(parts, columns),
            zero="float",
            scales=scales.dtype,
            offsets=biases.dtype,
        )

    def weight(self, parts: Parts, layout: Layout) -> QuantWeight:
        packed = parts["weight"].contiguous().view(torch.uint8)
        width = self._width(parts, layout.columns)
        held = (by_group(parts[name], layout, width) for name in ("scales", "biases"))
        return QuantWeight.build(layout, packed, *held)

    def dense(self, parts: Parts, out: int, columns: int) -> Tensor:
        """An embedding as MLX dequantizes it: in the dtype of its scales, to which product and sum are both rounded."""
        layout, width = self.layout(parts, out, columns), self._width(parts, columns)
        packed, dtype = parts["weight"].contiguous().view(torch.uint8), parts["scales"].dtype
        codes = kernels.unpack(packed, layout.format.bits, columns).to(dtype)
        scales, biases = (parts[name].repeat_interleave(width, 1)[:, :columns] for name in ("scales", "biases"))
        return codes.mul_(scales).add_(biases)

    def _width(self, parts: Parts, columns: int) -> int:
        """Inputs of a full group of a layer."""
        return width_of(columns, parts["scales"].shape[1], None if self.layers else self.group_size)
