"""AWQ checkpoints of version gemm, as AutoAWQ and transformers write them.

    W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]),    g = i // group_size

Codes and zero-points have four bits, and lie along the outputs, eight in an int32 word: nibble `p` of word `w`, counted
from the least significant, is that of output `8 w + (0, 2, 4, 6, 1, 3, 5, 7)[p]`.

Source: AWQ (arXiv 2306.00978), and `WQLinear_GEMM` of AutoAWQ.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import AliasChoices, Field, field_validator
from torch import Tensor

from quadapt.errors import CheckpointError
from quadapt.importers.base import FLOATS, IMPORTERS, Importer, Parts, by_group, expect, grid, packed_rows, width_of
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.quant.words import of_awq_words


@IMPORTERS.register("awq")
class AWQ(Importer):
    """AWQ of 4 bits in the layout of its GEMM kernels."""

    summary: ClassVar[str] = "4 bits, version gemm; of AutoAWQ and transformers"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    settings_file: ClassVar[str] = "quant_config.json"

    bits: Literal[4] = Field(default=4, validation_alias=AliasChoices("bits", "w_bit"))
    """Width of a code; there is only one."""

    group_size: int | None = Field(default=None, validation_alias=AliasChoices("group_size", "q_group_size"))
    """Inputs of a group, as the folder says; -1 for whole rows."""

    version: Literal["gemm"] = Field(default="gemm", validation_alias=AliasChoices("version", "format"))
    """The kernels for which codes are laid out. What is for gemv, gemv_fast, marlin or llm-awq is not read."""

    backend: str = "auto"
    """What shall compute with the weights. `llm-awq` has a layout of its own, which is not read."""

    @field_validator("version", mode="before")
    @classmethod
    def _lower(cls, version: object) -> object:
        return version.lower() if isinstance(version, str) else version

    @field_validator("backend")
    @classmethod
    def _not_another(cls, backend: str) -> str:
        if backend == "llm-awq":
            raise ValueError("its layout is not that of version gemm")
        return backend

    def layout(self, parts: Parts, out: int, columns: int) -> Layout:
        if out % 8:
            raise CheckpointError(f"has {out} outputs, and AWQ packs eight in a word. config.json is of another model")
        expect(parts, "qweight", (torch.int32,), (columns, out // 8))
        scales = expect(parts, "scales", FLOATS, (None, out))
        return grid(
            out=out,
            columns=columns,
            bits=self.bits,
            width=width_of(columns, scales.shape[0], self.group_size),
            zero="none" if bool((_zeros(parts, out) == 8).all()) else "integer",
            scales=scales.dtype,
        )

    def weight(self, parts: Parts, layout: Layout) -> QuantWeight:
        packed = packed_rows(of_awq_words(parts["qweight"]).T, self.bits)
        scales, zeros = parts["scales"].T, None
        width = width_of(layout.columns, scales.shape[1], self.group_size)
        if layout.format.zero == "integer":
            zeros = by_group(_zeros(parts, layout.out).T, layout, width)
        return QuantWeight.build(layout, packed, by_group(scales, layout, width), zeros)


def _zeros(parts: Parts, out: int) -> Tensor:
    """Zero-points, uint8 `[groups, out]`."""
    return of_awq_words(expect(parts, "qzeros", (torch.int32,), (parts["scales"].shape[0], out // 8)))
