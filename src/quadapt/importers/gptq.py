"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and transformers write them.

    W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]),    g = g_idx[i]

Codes and zero-points are dense streams of bits in int32 words, the least significant first: codes run down the inputs
of one output, zero-points along the outputs of one group. Zero-points are stored less one in files of version 1 (also
where no version is named), as they are in version 2.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quadapt import kernels
from quadapt.errors import CheckpointError
from quadapt.importers.base import (
    FLOATS,
    IMPORTERS,
    Importer,
    Parts,
    by_group,
    expect,
    grid,
    packed_rows,
    permutation,
    width_of,
)
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.quant.words import of_stream


@IMPORTERS.register("gptq")
class GPTQ(Importer):
    """GPTQ of 2, 3, 4 and 8 bits, versions 1 and 2, with and without act-order."""

    summary: ClassVar[str] = "2, 3, 4 and 8 bits, versions 1 and 2, act-order; of GPTQModel, AutoGPTQ, transformers"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    optional: ClassVar[tuple[str, ...]] = ("g_idx",)
    settings_file: ClassVar[str] = "quantize_config.json"

    bits: Literal[2, 3, 4, 8] | None = None
    """Width of a code, as the folder says; the shape of the codes decides."""

    group_size: int | None = None
    """Inputs of a group, as the folder says; -1 for whole rows."""

    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    """gptq: zero-points are stored less one. gptq_v2: as they are."""

    dynamic: dict[str, Any] | None = None
    """Settings of single layers, by patterns of their names; each layer's shapes then tell its own."""

    def layout(self, parts: Parts, out: int, columns: int) -> Layout:
        words = expect(parts, "qweight", (torch.int32,), (None, out))
        bits, rest = divmod(words.shape[0] * 32, columns)
        if rest or bits not in (2, 3, 4, 8):
            raise CheckpointError(
                f"qweight: has {words.shape[0]} words for {columns} inputs, which is no width of 2, 3, 4 or 8 bits. "
                "The file is damaged, or belongs to another model"
            )
        if self.bits not in (None, bits) and not self.dynamic:
            raise CheckpointError(
                f"qweight: holds codes of {bits} bits, and quantization_config says bits={self.bits}. Correct it in "
                "config.json"
            )
        scales = expect(parts, "scales", FLOATS, (None, out))
        zeros = self._zeros(parts, bits, out)
        if int(zeros.max()) > 255:
            raise CheckpointError("qzeros: has a zero-point of 256, which no byte holds. Give the dense model")
        width = width_of(columns, scales.shape[0], None if self.dynamic else self.group_size)
        return grid(
            out=out,
            columns=columns,
            bits=bits,
            width=width,
            zero="none" if bool((zeros == 2 ** (bits - 1)).all()) else "integer",
            scales=scales.dtype,
            permuted="g_idx" in parts and self._positions(parts, columns, width) is not None,
        )

    def weight(self, parts: Parts, layout: Layout) -> QuantWeight:
        bits, scales = layout.format.bits, parts["scales"].T
        width = width_of(layout.columns, scales.shape[1], None if self.dynamic else self.group_size)
        position = self._positions(parts, layout.columns, width) if layout.permuted else None
        packed = parts["qweight"].T.contiguous().view(torch.uint8)  # a stream along the inputs is our packed row
        if position is not None:
            packed = packed_rows(kernels.unpack(packed, bits, layout.columns), bits, position)
        zeros = None
        if layout.format.zero == "integer":
            zeros = by_group(self._zeros(parts, bits, layout.out).T, layout, width)
        return QuantWeight.build(layout, packed, by_group(scales, layout, width), zeros, position)

    def _zeros(self, parts: Parts, bits: int, out: int) -> Tensor:
        """Zero-points, int32 `[groups, out]`."""
        words = expect(parts, "qzeros", (torch.int32,), (parts["scales"].shape[0], -(-out * bits // 32)))
        zeros = of_stream(words, bits, out).int()
        return zeros + 1 if self.checkpoint_format == "gptq" else zeros

    @staticmethod
    def _positions(parts: Parts, columns: int, width: int) -> Tensor | None:
        return permutation(expect(parts, "g_idx", (torch.int32, torch.int64), (columns,)), width)
