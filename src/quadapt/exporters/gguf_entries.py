"""Tensors that are going to be written to a GGUF file: what is known of each, and its bytes when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quadapt.errors import ExportError
from quadapt.exporters.ggml import BY_NAME, Change, Choice, Held, bytes_of, ways, why_not
from quadapt.exporters.report import TensorRow
from quadapt.exporters.tensors import DTYPES, TYPES, Source, as_numpy, shape_of
from quadapt.model.embeddings import recognized
from quadapt.model.quantize import Progress
from quadapt.quant.weight import QuantWeight

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written to the file."""

    row: TensorRow
    """The name, the type and the shape of the tensor in the file."""

    source: Source
    """Where the numbers of the tensor come from."""

    order: np.ndarray | None = None
    """The rows of the matrix in the order in which they are written, int64 `[rows]`; None if that is their own."""

    choice: Choice = "auto"
    """How the type of a quantized matrix is chosen."""

    types: tuple[str, ...] = ()
    """All types that can hold a quantized matrix, the best first."""

    change: Change | None = None
    """What its type does to the numbers of a quantized matrix; None if they stay as they are."""

    aside: bool = False
    """Whether its type lacks the offsets of a quantized matrix, which go into another file."""

    def held(self) -> Held | None:
        """A quantized matrix as blocks of the type in `row` hold it; None if it is going to be dense."""
        assert isinstance(self.source, QuantWeight)
        return next((each for each in ways(self.source, self.choice) if each.block.name == self.row.type), None)

    def data(self) -> np.ndarray:
        """What is written: a row of numbers, or of bytes of blocks, for each row of the matrix."""
        rows = self._blocks() if self.row.type in BY_NAME else self._dense()
        return rows if self.order is None else rows[self.order]  # groups run along a row, so they move with it

    def _blocks(self) -> np.ndarray:
        if isinstance(self.source, QuantWeight):
            held = self.held()
            source = None if held is None else held.weight
        else:
            source = recognized(self.source, self.row.type.lower())
        assert source is not None
        return bytes_of(source)

    def _dense(self) -> np.ndarray:
        dtype = DTYPES[self.row.type]
        dense = self.source.dequantize(dtype) if isinstance(self.source, QuantWeight) else self.source.to(dtype)
        if not bool(torch.isfinite(dense).all()):
            raise ExportError(
                f"{self.row.name}: has values that are infinite or NaN in {self.row.type}. "
                "Use dense='f32', or repair the model"
            )
        return as_numpy(dense)


@dataclass(frozen=True)
class Stack:
    """Matrices (or vectors) of one shape that a file holds as one tensor: those of all experts of a layer, say."""

    row: TensorRow
    """The name, the type and the shape of the tensor in the file."""

    pieces: Sequence[Entry]
    """What is stacked, in order."""

    def data(self) -> np.ndarray:
        """What is written: the rows of each piece."""
        return np.stack([piece.data() for piece in self.pieces])


def pieces_of(entry: Entry | Stack) -> Sequence[Entry]:
    """The matrices (or vectors) of which a tensor of the file consists: itself alone, if it is no stack."""
    return entry.pieces if isinstance(entry, Stack) else [entry]


def stacked(entries: Sequence[Entry], dense: str) -> list[Entry | Stack]:
    """Entries with those of one name made into one: of a type of blocks if each can have that type, else dense.

    Raises:
        ExportError: They have more than one shape.
    """
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.row.name, []).append(entry)
    return [pieces[0] if len(pieces) == 1 else _stack(pieces, dense) for pieces in found.values()]


def _stack(pieces: list[Entry], dense: str) -> Stack:
    row = pieces[0].row
    if any(piece.row.shape != row.shape for piece in pieces):
        raise ExportError(f"{row.name}: what is stacked in it has more than one shape. Use another format")
    if len({piece.row.type for piece in pieces}) > 1:
        common = [name for name in pieces[0].types if all(name in piece.types for piece in pieces)]
        pieces = [_of_type(piece, common[0]) for piece in pieces] if common else _dense(pieces, dense)
        row = pieces[0].row
    return Stack(replace(row, shape=(len(pieces), *row.shape), nbytes=len(pieces) * row.nbytes), pieces)


def _of_type(entry: Entry, name: str) -> Entry:
    entry = replace(entry, row=replace(entry.row, type=name))
    held = entry.held()
    assert held is not None
    return _as_held(entry, held)


def _dense(pieces: list[Entry], dense: str) -> list[Entry]:
    why = next((piece.row.note for piece in pieces if piece.row.note), "its matrices are of several types")
    size = prod(pieces[0].row.shape) * DTYPES[dense].itemsize
    return [
        replace(each, row=replace(each.row, type=dense, nbytes=size, note=why), change=None, aside=False)
        for each in pieces
    ]


def _as_held(entry: Entry, held: Held) -> Entry:
    """An entry with all that is known of the way in which it is held."""
    nbytes = prod(entry.row.shape) // held.block.weights * held.block.nbytes
    note = "" if held.change is None else str(held.change)
    row = replace(entry.row, type=held.block.name, nbytes=nbytes, note=note)
    return replace(entry, row=row, change=held.change, aside=held.aside is not None)


def entry_of(name: str, source: Source, dense: str, order: np.ndarray | None = None, choice: Choice = "auto") -> Entry:
    """What is known of a tensor: quantized ones get the best type that holds them, or `dense`, with the reason."""
    if isinstance(source, Tensor):
        return Entry(row_of(name, source), source, order)
    shape, found = shape_of(source), ways(source, choice)
    nbytes, why = prod(shape) * DTYPES[dense].itemsize, "" if found else _why_dense(source, choice)
    row = TensorRow(name=name, type=dense, shape=shape, nbytes=nbytes, linear=True, note=why)
    entry = Entry(row, source, order, choice, tuple(dict.fromkeys(each.block.name for each in found)))
    return _as_held(entry, found[0]) if found else entry


def _why_dense(source: QuantWeight, choice: Choice) -> str:
    rounded = ways(source, "fast") if choice == "auto" else []
    return why_not(source) + (f" (rounded, {rounded[0].block.name} holds it: --gguf-type fast)" if rounded else "")


def row_of(name: str, source: Tensor) -> TensorRow:
    """The row of a tensor that is not quantized."""
    shape = tuple(source.shape)
    if source.dtype not in TYPES:
        raise ExportError(
            f"{name}: its dtype {source.dtype} is not one of {', '.join(map(str, TYPES))}. Cast the model"
        )
    type_name = TYPES[source.dtype] if len(shape) > 1 else "F32"  # llama.cpp wants norms and biases in F32
    return TensorRow(name=name, type=type_name, shape=shape, nbytes=prod(shape) * DTYPES[type_name].itemsize)


def write_tensors(writer: GGUFWriter, entries: Sequence[Entry | Stack], progress: Progress = iter) -> None:
    """Write all of the file: what is known beforehand, then one tensor after the other."""
    import gguf

    for row in (entry.row for entry in entries):
        ggml_type = gguf.GGMLQuantizationType[row.type]
        # The type overrides float32.
        writer.add_tensor_info(row.name, row.shape, np.dtype(np.float32), row.nbytes, ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    by_name = {entry.row.name: entry for entry in entries}
    for name in progress(list(by_name)):
        writer.write_tensor_data(by_name[name].data())
