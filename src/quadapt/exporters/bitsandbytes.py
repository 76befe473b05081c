"""Folders of bitsandbytes, as transformers reads them: NF4 and FP4, double quantization as it is.

A weight is `quant_map[code] * absmax[block]`, in float32, and blocks run over the flattened matrix. A byte holds two
codes, the first in its high nibble. Nested `absmax` are themselves codes, which are carried over.

Source: QLoRA (arXiv 2305.14314), and `QuantState` in bitsandbytes' code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from quadapt.exporters.codes import Writer
from quadapt.kernels import pack, unpack
from quadapt.quant.format import Format
from quadapt.quant.storage import DOUBLE, dynamic_map
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.quant.words import FP4_CODES, swapped

_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The sizes of blocks that bitsandbytes has kernels for."""

OTHER_LEVELS = (
    "levels nf are those of NF4's rule in float64, and bitsandbytes has them in float32: some differ in the seventh "
    "digit. Quantize with --quant-type nf-qlora for its very numbers"
)


def why_not_layout(layout: Layout) -> str:
    """Why the format cannot hold weights of a layout, whatever their numbers; an empty string if it can."""
    format, width = layout.format, layout.format.width(layout.columns)
    if format.levels not in ("nf", "nf-qlora", "fp4") or format.bits != 4:
        return (
            f"{format.name} has levels that bitsandbytes cannot hold, which knows NF4 and FP4. Use --format gguf for "
            "integers, or --format hf"
        )
    if format.zero != "none":
        return (
            f"{format.name} has offsets, which bitsandbytes does not know. Use --format hf, or --format lora for the "
            "adapter by itself"
        )
    if layout.permuted:
        return "its inputs are permuted, which bitsandbytes does not know. Use --format hf"
    if width not in _SIZES or layout.columns % width:
        return (
            f"has groups of {width} in rows of {layout.columns} inputs, and bitsandbytes has blocks of "
            f"{', '.join(map(str, _SIZES))} that fill rows. Use another --group-size, or --format hf"
        )
    return ""


class BitsAndBytesWriter(Writer):
    """Writes for bitsandbytes, and so for transformers and PEFT with it."""

    name: ClassVar[str] = "bitsandbytes"

    def why_not(self, weight: QuantWeight) -> str:
        return why_not_layout(weight.layout)

    def why_not_together(self, layouts: Mapping[str, Layout]) -> str:
        first: dict[str, str] = {}
        for name, layout in layouts.items():
            first.setdefault(_kind(layout.format), name)
        if len(first) < 2:
            return ""
        (kind, one), (another, other), *_ = first.items()
        return f"{other}: is {another}, and {one} {kind}: a folder of bitsandbytes has one of them. Use --format hf"

    def parts(self, weight: QuantWeight) -> dict[str, Tensor]:
        layout, kind = weight.layout, _kind(weight.format)
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": layout.format.width(layout.columns),
            "dtype": self.dtype,
            "shape": [layout.out, layout.columns],
        }
        found = {"weight": _bytes(weight).view(-1, 1), "weight.quant_map": _levels(weight.format)}
        if layout.storage.of_scales is DOUBLE:
            codes, absmax, mean = (weight.tensors[f"scales{suffix}"] for suffix in ("", "_absmax", "_mean"))
            found["weight.absmax"] = codes.flatten()
            found["weight.nested_absmax"] = absmax.contiguous().view(torch.float32).flatten()
            found["weight.nested_quant_map"] = dynamic_map(device=torch.device("cpu")).clone()
            offset = float(mean.contiguous().view(torch.float32))
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            found["weight.absmax"] = weight.scales.flatten()
        text = json.dumps(state).encode()
        found[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        return found

    def about(self, layers: Mapping[str, QuantWeight], plain: Sequence[str]) -> dict[str, Any]:
        weights = list(layers.values())
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": _kind(weights[0].format),
            "bnb_4bit_use_double_quant": any(weight.layout.storage.of_scales is DOUBLE for weight in weights),
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(plain),
        }


def _kind(format: Format) -> str:
    """What bitsandbytes calls the levels."""
    return "fp4" if format.levels == "fp4" else "nf4"


def _levels(format: Format) -> Tensor:
    """The levels as bitsandbytes has them, by its codes; float32 `[16]`."""
    fp4 = format.levels == "fp4"
    table = Format(levels="fp4" if fp4 else "nf-qlora", bits=4).table(torch.empty(0))
    assert table is not None
    return table[torch.tensor(FP4_CODES)] if fp4 else table.clone()


def _bytes(weight: QuantWeight) -> Tensor:
    """Packed codes as bitsandbytes has them, uint8 `[out * in / 2]`."""
    packed = weight.packed
    if weight.format.levels == "fp4":
        of_place = torch.argsort(torch.tensor(FP4_CODES, device=packed.device)).to(torch.uint8)
        packed = pack(of_place[unpack(packed, 4, weight.layout.columns).int()], 4)
    return swapped(packed).flatten()
