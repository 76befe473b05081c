"""Checkpoints of bitsandbytes, as transformers writes them: NF4 and FP4 (`load_in_4bit`), and int8 (`load_in_8bit`).

Of four bits, a weight is `quant_map[code] * absmax[block]`, in float32, where blocks of (as a rule) 64 run over the
flattened matrix. A byte holds two codes, the first in its high nibble. Nested `absmax` are themselves codes,
`nested_quant_map[absmax] * nested_absmax + nested_offset` with a `nested_absmax` for every 256: double quantization,
which is carried over as it is. Everything is computed in the order of the stored form, and gives the same bits.

Of eight bits, a weight is `code * SCB / 127`, a scale for each row. The stored form counts levels from zero, so it
rounds `scale * (code + 128)` before it subtracts `scale * 128`, and no float32 scale gives the very bits of
bitsandbytes: weights differ from its own by under 2**-14 of a step (in float16 one of some hundreds, by its last bit).

Source: QLoRA (arXiv 2305.14314), LLM.int8() (arXiv 2208.07339), and `QuantState` in bitsandbytes' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from quadapt import kernels
from quadapt.errors import CheckpointError, ShapeError
from quadapt.importers.base import IMPORTERS, Importer, Parts, by_group, expect, grid, packed_rows
from quadapt.quant.format import Format, Levels
from quadapt.quant.storage import Storage, dynamic_map
from quadapt.quant.storage.base import as_bytes
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.quant.words import FP4_CODES, swapped

_STATE = "weight.quant_state.bitsandbytes__"
_LEVELS: Mapping[str, Levels] = {"nf4": "nf-qlora", "fp4": "fp4"}

_PER_STEP = 7.874015718698502e-3
"""1 / 127, as bitsandbytes has it."""


@IMPORTERS.register("bitsandbytes")
class BitsAndBytes(Importer):
    """What bitsandbytes has quantized; :meth:`of` gives what reads four bits, or eight, as the folder says."""

    summary: ClassVar[str] = "NF4 and FP4, double quantization as it is; int8 to 2**-14 of a step; of transformers"
    parts: ClassVar[tuple[str, ...]] = ("weight",)

    load_in_4bit: bool = False
    """Whether weights have four bits: NF4 or FP4, as each layer says of itself."""

    load_in_8bit: bool = False
    """Whether weights have eight bits."""

    @classmethod
    def found(cls, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        about = config.get("quantization_config")
        if isinstance(about, Mapping) and "quant_method" not in about and about.keys() & cls.model_fields.keys():
            return about  # as transformers wrote it at first
        return super().found(config)

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Importer:
        if cls is not BitsAndBytes:
            return super().of(about)
        return (_EightBits if about.get("load_in_8bit") else _FourBits).of(about)


class _State(BaseModel):
    """What a layer of four bits says of itself."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: Literal[256] | None = None
    nested_offset: float | None = None

    @property
    def levels(self) -> Levels:
        return _LEVELS[self.quant_type]


class _FourBits(BitsAndBytes):
    """NF4 and FP4."""

    parts: ClassVar[tuple[str, ...]] = ("weight.absmax", "weight", "weight.quant_map")
    optional: ClassVar[tuple[str, ...]] = (
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *(_STATE + kind for kind in _LEVELS),
    )

    def layout(self, parts: Parts, out: int, columns: int) -> Layout:
        state = _state(parts)
        if state.shape != (out, columns):
            raise CheckpointError(
                f"weight: is {state.shape[0]} x {state.shape[1]} by its quant_state, and the model has {out} x "
                f"{columns}. config.json belongs to another model"
            )
        size = state.blocksize
        if size < 1 or columns % size:
            raise ShapeError(
                f"has rows of {columns} inputs and blocks of {size}, so that blocks cross rows, and a group belongs to "
                "one row. Give the dense model"
            )
        layout = grid(
            out=out,
            columns=columns,
            bits=4,
            width=size,
            zero="none",
            scales=torch.float32,
            levels=state.levels,
        )
        blocks = out * columns // size
        if state.nested_offset is None:
            expect(parts, "weight.absmax", (torch.float32,), (blocks,))
        else:
            expect(parts, "weight.absmax", (torch.uint8,), (blocks,))
            expect(parts, "weight.nested_absmax", (torch.float32,), (-(-blocks // 256),))
            _check_map(parts, "weight.nested_quant_map", dynamic_map(device=torch.device("cpu")))
            if layout.groups == columns // size:  # else groups are halves of blocks, and have plain scales
                layout = replace(layout, storage=Storage(scales="double", offsets="absent"))
        _check_map(parts, "weight.quant_map", _levels_in_their_order(layout.format))
        return layout

    def weight(self, parts: Parts, layout: Layout) -> QuantWeight:
        packed, absmax = _packed(parts["weight"], layout), parts["weight.absmax"].view(layout.out, -1)
        nested, width = absmax.dtype == torch.uint8, layout.columns // absmax.shape[1]
        if not nested:
            return QuantWeight.build(layout, packed, by_group(absmax, layout, width), None)
        constants = parts["weight.nested_absmax"].view(-1, 1)
        mean = torch.tensor([[_state(parts).nested_offset]], dtype=torch.float32)
        if layout.storage.of_scales.is_float:
            unit = dynamic_map(device=absmax.device)
            scales = kernels.widen(absmax.contiguous(), as_bytes(constants), as_bytes(mean), unit)
            return QuantWeight.build(layout, packed, by_group(scales, layout, width), None)
        tensors = {
            "weight": packed,
            "scales": absmax.contiguous(),
            "scales_absmax": as_bytes(constants),
            "scales_mean": as_bytes(mean),
        }
        return QuantWeight(layout, tensors)


class _EightBits(BitsAndBytes):
    """LLM.int8()."""

    parts: ClassVar[tuple[str, ...]] = ("SCB", "weight")
    optional: ClassVar[tuple[str, ...]] = ("weight_format",)

    def layout(self, parts: Parts, out: int, columns: int) -> Layout:
        expect(parts, "weight", (torch.int8,), (out, columns))
        expect(parts, "SCB", (torch.float32,), (out,))
        if "weight_format" in parts and int(parts["weight_format"]) != 0:
            raise CheckpointError(
                "weight_format: is that of one kind of GPU, where rows belong. Load the model by an earlier "
                "bitsandbytes and save it again, or give the dense model"
            )
        return grid(out=out, columns=columns, bits=8, width=columns, zero="none", scales=torch.float32)

    def weight(self, parts: Parts, layout: Layout) -> QuantWeight:
        codes = parts["weight"].view(torch.uint8) ^ 128  # from zero
        return QuantWeight.build(layout, packed_rows(codes, 8), parts["SCB"].view(-1, 1) * _PER_STEP, None)


def _state(parts: Parts) -> _State:
    """What a layer says of itself.

    Raises:
        CheckpointError: Nothing, or something that is not understood.
    """
    state_name = next((_STATE + levels for levels in _LEVELS if _STATE + levels in parts), None)
    if state_name is None:
        raise CheckpointError(f"{_STATE}nf4 (or fp4): is not in the files. The copy is incomplete")
    try:
        state = _State.model_validate_json(bytes(expect(parts, state_name, (torch.uint8,), (None,)).tolist()))
    except ValidationError as error:
        wrong = error.errors()[0]
        field = ".".join(map(str, wrong["loc"])) or "its text"
        raise CheckpointError(
            f"{state_name}: {field}={wrong['input']!r:.60} is not understood ({wrong['msg']}). Give the dense model"
        ) from error
    if (state.nested_offset is None) != ("weight.nested_absmax" not in parts):
        raise CheckpointError(
            f"{state_name}: contradicts weight.nested_absmax, which is there if nested_offset is. It is damaged"
        )
    return state


def _levels_in_their_order(format: Format) -> Tensor:
    """The levels by the codes that bitsandbytes gives them, float32 `[16]`."""
    table = format.table(torch.empty(0))
    assert table is not None
    return table[torch.tensor(FP4_CODES)] if format.levels == "fp4" else table


def _check_map(parts: Parts, name: str, known: Tensor) -> None:
    """Raise CheckpointError if a table of levels is not the one that is held here."""
    if not torch.equal(expect(parts, name, (torch.float32,), tuple(known.shape)), known):
        raise CheckpointError(f"{name}: has other levels than bitsandbytes writes today. Give the dense model")


def _packed(weight: Tensor, layout: Layout) -> Tensor:
    """Packed codes, uint8 `[out, in / 2]`: the first of two in the low nibble.

    Raises:
        CheckpointError: There are more bytes than codes, or fewer.
    """
    data = weight.contiguous().view(torch.uint8).flatten()  # `bnb_4bit_quant_storage` may call the bytes floats
    if data.numel() != layout.out * layout.columns // 2:
        raise CheckpointError(
            f"weight: has {data.numel()} bytes, where {layout.out} x {layout.columns} codes take "
            f"{layout.out * layout.columns // 2}. The file is damaged"
        )
    data = swapped(data).view(layout.out, -1)
    if layout.format.levels != "fp4":
        return data
    place = torch.tensor(FP4_CODES, dtype=torch.uint8)
    return packed_rows(place[kernels.unpack(data, 4, layout.columns).int()], 4)
