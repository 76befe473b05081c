"""Checkpoints of torchao, as transformers writes them to safetensors: integers of 2 to 8 bits, weights alone.

    W[o, i] = (code[o, i] - zero[o, g]) * scales[o, g],    g = i // group_size

Codes and zero-points are signed, one in a byte, and centred about zero: those of four bits are -8 to 7. With scales of
float16 or bfloat16 every product is exact, so the numbers are torchao's, bit for bit. With float32 scales the stored
form rounds `scale * (code + 2**(bits - 1))` before it subtracts, and weights differ from torchao's by under 2**-14 of a
step (of four bits, under 2**-18). Zero-points of floats, which `quadapt export` writes, become offsets again.

Source: `IntxUnpackedToInt8Tensor` and `Int8Tensor` in torchao's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from quadapt.errors import CheckpointError
from quadapt.importers.base import (
    FLOATS,
    IMPORTERS,
    Importer,
    Parts,
    by_group,
    expect,
    grid,
    offsets_of,
    packed_rows,
    width_of,
)
from quadapt.quant.weight import Layout, QuantWeight


def _bits(about: object) -> object:
    """The width of codes that `quant_type` says.

    Raises:
        ValueError: It is of another kind than is read.
    """
    schemes = about if isinstance(about, Mapping) else {}
    scheme = schemes.get("default") if len(schemes) == 1 else None
    if not isinstance(scheme, Mapping):
        raise ValueError("settings of one kind for all layers, written as safetensors, are read")
    settings = scheme.get("_data")
    if scheme.get("_type") == "Int8WeightOnlyConfig":
        return 8
    if scheme.get("_type") != "IntxWeightOnlyConfig" or not isinstance(settings, Mapping):
        raise ValueError(f"{scheme.get('_type')} is not read: IntxWeightOnlyConfig and Int8WeightOnlyConfig are")
    kind, packing = (_word(settings, name) for name in ("weight_dtype", "intx_packing_format"))
    if packing != "UNPACKED_TO_INT8":
        raise ValueError(f"codes that are packed as {packing} are for one kind of CPU. UNPACKED_TO_INT8 is read")
    width = kind.removeprefix("int")
    return int(width) if width.isdecimal() else kind


def _word(settings: Mapping[str, object], name: str) -> str:
    held = settings.get(name)
    return str(held.get("_data")) if isinstance(held, Mapping) else ""


@IMPORTERS.register("torchao")
class TorchAO(Importer):
    """Integers of torchao whose activations are not quantized."""

    summary: ClassVar[str] = "IntxWeightOnly of 2, 3, 4, 5, 6 and 8 bits, Int8WeightOnly; of transformers"
    parts: ClassVar[tuple[str, ...]] = ("_weight_qdata", "_weight_scale")
    optional: ClassVar[tuple[str, ...]] = ("_weight_zero_point", "_weight_act_pre_scale")

    bits: Annotated[Literal[2, 3, 4, 5, 6, 8], BeforeValidator(_bits)] = Field(validation_alias="quant_type")
    """The width of a code in bits, as the settings of the folder say."""

    @property
    def _middle(self) -> int:
        return 2 ** (self.bits - 1)

    def layout(self, parts: Parts, out: int, columns: int) -> Layout:
        if "_weight_act_pre_scale" in parts:
            raise CheckpointError("_weight_act_pre_scale: scales inputs, which cannot be held. Give the dense model")
        expect(parts, "_weight_qdata", (torch.int8,), (out, columns))
        scales = expect(parts, "_weight_scale", FLOATS, (out, None))
        zero, offsets = self._zero(parts)
        return grid(
            out=out,
            columns=columns,
            bits=self.bits,
            width=width_of(columns, scales.shape[1], None),
            zero=zero,
            scales=scales.dtype,
            offsets=offsets,
        )

    def weight(self, parts: Parts, layout: Layout) -> QuantWeight:
        codes = parts["_weight_qdata"].view(torch.uint8) + self._middle  # bytes go round, as signed ones do
        if int(codes.max()) >= 2**self.bits:
            raise CheckpointError(f"_weight_qdata: has codes of more than {self.bits} bits. The file is damaged")
        scales, zeros = parts["_weight_scale"], None if layout.format.zero == "none" else self._zeros(parts)
        if zeros is not None and zeros.is_floating_point():
            zeros = offsets_of(zeros, scales, self._middle)[0]
        width = width_of(layout.columns, scales.shape[1], None)
        zeros = None if zeros is None else by_group(zeros, layout, width)
        return QuantWeight.build(layout, packed_rows(codes, self.bits), by_group(scales, layout, width), zeros)

    def _zero(self, parts: Parts) -> tuple[str, torch.dtype | None]:
        """What the offsets of a layer are, and the dtype that holds them if they are floats."""
        zeros = self._zeros(parts)
        if zeros is not None and zeros.is_floating_point():
            return "float", offsets_of(zeros, parts["_weight_scale"], self._middle)[1]
        if zeros is None or bool((zeros == self._middle).all()):
            return "none", None
        if not 0 <= int(zeros.min()) <= int(zeros.max()) < 2**self.bits:
            raise CheckpointError(f"_weight_zero_point: lies outside of {self.bits} bits. The file is damaged")
        return "integer", None

    def _zeros(self, parts: Parts) -> Tensor | None:
        """Zero-points `[out, groups]`: int32 from the lowest code, or floats from the middle; None without them."""
        if "_weight_zero_point" not in parts:
            return None
        zeros = expect(parts, "_weight_zero_point", (torch.int8, *FLOATS), tuple(parts["_weight_scale"].shape))
        return zeros if zeros.is_floating_point() else zeros.int() + self._middle
