"""GGUF, the file of llama.cpp and of what is built on it.

Integers go out in blocks that hold their codes bit for bit: plain ones (`blocks.py`) those of 2 to 5 bits, and
symmetric ones of 6 and 8; super-blocks (`super_blocks.py`) those whose scales are held as theirs. What no block holds
goes out dense and is listed. The file is written tensor by tensor, so that memory holds about one layer.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ExportError
from quadapt.exporters.files import new_file
from quadapt.exporters.ggml import BY_NAME, Choice
from quadapt.exporters.gguf_entries import Entry, Stack, entry_of, row_of, stacked, write_tensors
from quadapt.exporters.gguf_metadata import family_of, namer, text_config, write_metadata
from quadapt.exporters.gguf_notes import gguf_notes
from quadapt.exporters.gguf_offsets import lacks_offsets, offsets_file, write_offsets
from quadapt.exporters.gguf_rope import rope_factors
from quadapt.exporters.gguf_tokenizer import bytes_to_add, write_tokenizer
from quadapt.exporters.report import ExportReport, TensorRow, bits_per_weight, size_of
from quadapt.exporters.tensors import refuse_adapters, shape_of, tensors_of
from quadapt.importers.gguf_family import Family
from quadapt.model.embeddings import TYPES as EMBEDDINGS
from quadapt.model.embeddings import nearest, recognized
from quadapt.model.linear_form import linear_form
from quadapt.model.quantize import Progress

Ends = Literal["float", "q8_0", "q6_k"]
"""What embedding and head are held in: floats, or a type of blocks."""


def export_gguf(  # noqa: PLR0913 - each option of the format is one
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    *,
    dense: Literal["f32", "f16"] = "f32",
    gguf_type: Choice = "auto",
    embeddings: Ends = "float",
    unknown: Literal["fail", "bytes"] = "fail",
    name: str = "",
    progress: Progress = iter,
) -> ExportReport:
    """Write a quantized model as one GGUF file.

    Args:
        model: Of one of the families in `gguf_families.py`; quantized layers as codes, without adapters.
        tokenizer: Its (fast) tokenizer.
        path: The file; one that is there is replaced when the new one is whole.
        dense: How weights that a block cannot hold go out: f32 keeps them as they are, f16 rounds them.
        gguf_type: How the type of a quantized layer is chosen: auto takes the smallest that holds the same numbers,
            fast one whose products are fast, which keeps codes and may round scales and offsets.
        embeddings: The type of embedding and head where they are not on the values of one already: float leaves them
            as they are, q8_0 and q6_k round them, and the report says how far.
        unknown: What llama.cpp makes of characters that a tokenizer without bytes does not know: fail, or tokens for
            bytes that are added to the file, and stand for the unknown one.
        name: The model's name in the file; by default that of the file.
        progress: Wraps the names of the tensors to write, to show how far the work is.

    Raises:
        ExportError: The model, its rotary embedding or its tokenizer is one that llama.cpp would not compute alike.
    """
    import gguf

    if dense not in ("f32", "f16"):
        raise ExportError(f"dense={dense!r} is unknown. Use f32 or f16")
    refuse_adapters(model)
    path, family = Path(path), family_of(linear_form(model))
    added, stand_in = (bytes_to_add(tokenizer) if unknown == "bytes" else None) or ([], 0)
    more_rows = functools.partial(_repeated, row=stand_in, count=len(added))
    entries, beside = _entries(model, dense.upper(), gguf_type, embeddings, more_rows), list[TensorRow]()
    with new_file(path) as partial:
        writer = gguf.GGUFWriter(partial, family.arch)
        try:
            notes = write_metadata(writer, model, name or path.stem, added=len(added))
            notes += write_tokenizer(writer, tokenizer, model, added)
            writer.add_file_type(_file_type(entries))
            write_tensors(writer, entries, progress)
        finally:
            writer.close()
        if any(map(lacks_offsets, entries)):
            beside = write_offsets(offsets_file(path), family.arch, entries)
    rows = tuple(entry.row for entry in entries)
    more = size_of(offsets_file(path)) if beside else 0
    weights = sum(prod(row.shape) for row in rows if row.linear)
    return ExportReport(
        format="gguf",
        path=str(path),
        bytes=size_of(path) + more,
        tensors=rows,
        bits_per_weight=bits_per_weight(rows) + (8 * sum(row.nbytes for row in beside) / weights if beside else 0),
        notes=(*gguf_notes(entries, offsets_file(path) if beside else None), *notes),
    )


def _repeated(source: Tensor, *, row: int, count: int) -> Tensor:
    """An embedding or a head with one of its rows several times more at the end."""
    return torch.cat((source, source[row].expand(count, -1))) if count else source


def _entries(
    model: nn.Module, dense: str, choice: Choice, embeddings: Ends, more_rows: Callable[[Tensor], Tensor]
) -> list[Entry | Stack]:
    config = text_config(model)
    family = family_of(model)
    name_of = namer(family, config.num_hidden_layers)
    ends = {id(each.weight) for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each}  # type: ignore[operator]
    of_ends = {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in ends}
    wished = _rounded_to(model.config)
    entries = []
    for name, source in tensors_of(model):
        if name.startswith(family.besides):
            continue
        if isinstance(source, Tensor) and family.shifts(name):
            source = source.float() + 1
        if isinstance(source, Tensor) and source.ndim == 2 and len(source) == 1:
            source = source[0]  # the gate of a shared expert is a vector in a file
        if name in of_ends and isinstance(source, Tensor):
            source = more_rows(source)
        order = family.order(name, config, shape_of(source)[0])
        entry = entry_of(name_of(name), source, dense, order, choice)
        if name in of_ends and isinstance(source, Tensor):
            entry = replace(entry, row=_embedding_row(entry.row, source, wished.get(name.rpartition(".")[0], "")))
            entry = _rounded_end(entry, source, embeddings)
        entries.append(entry)
    entries += [Entry(row_of(name, factors), factors) for name, factors in rope_factors(config).items()]
    return stacked(entries + _head_again(entries, family), dense)


def _head_again(entries: Sequence[Entry], family: Family) -> list[Entry]:
    """The embedding once more as the output head, if the model has them in one, and llama.cpp wants both."""
    by_name = {entry.row.name: entry for entry in entries}
    if not family.own_head or "output.weight" in by_name:
        return []
    table = by_name["token_embd.weight"]
    return [replace(table, row=replace(table.row, name="output.weight"))]


def _rounded_to(config: Any) -> dict[str, str]:
    """The type that embeddings were rounded to before the model was quantized, by layer, as its config notes it."""
    about = getattr(getattr(config, "quantization_config", None), "made", None) or {}
    noted = about.get("embeddings") or {}
    return dict.fromkeys(noted.get("layers", ()), noted.get("kind", ""))


def _embedding_row(row: TensorRow, source: Tensor, wished: str) -> TensorRow:
    """The row of an embedding or a head: of a type of blocks if one holds its very values."""
    for type_name in EMBEDDINGS:
        stored = recognized(source, type_name)
        if stored is not None:
            return replace(row, type=type_name.upper(), nbytes=stored.layout.bits // 8)
    if not wished:
        return row
    return replace(row, note=f"was rounded to {wished} once, and no longer has such values: left as {row.type}")


def _rounded_end(entry: Entry, source: Tensor, type_name: Ends) -> Entry:
    """An embedding or a head rounded to a type of blocks, if one is wished and its values are not such already."""
    if type_name == "float" or entry.row.type in BY_NAME:
        return entry
    columns = source.shape[1]
    if columns % EMBEDDINGS[type_name].columns:
        why = f"{columns} numbers a row are no multiple of {EMBEDDINGS[type_name].columns}: left as {entry.row.type}"
        return replace(entry, row=replace(entry.row, note=why))
    if not bool(torch.isfinite(source).all()):
        raise ExportError(f"{entry.row.name}: has NaN or infinite values. Repair the model before rounding it")
    stored = nearest(source, type_name)
    moved = float((stored.dequantize() - source.float()).norm() / source.float().norm())
    note = f"rounded to {type_name.upper()}, which moves it by {100 * moved:.2f} % of its norm"
    row = replace(entry.row, type=type_name.upper(), nbytes=stored.layout.bits // 8, note=note)
    return replace(entry, row=row, source=stored)


def _file_type(entries: Sequence[Entry | Stack]) -> int:
    """What most weights are held in, for people: llama.cpp shows it and reads each tensor's own type."""
    import gguf

    weights = Counter[str]()
    for row in (entry.row for entry in entries):
        weights[row.type] += prod(row.shape)
    layers = {entry.row.type for entry in entries if entry.row.linear}
    blocks = Counter({name: count for name, count in weights.items() if name in BY_NAME and name in layers})
    (most, _), *_ = (blocks or weights).most_common(1)
    name = (BY_NAME[most].file_type if most in BY_NAME else "") or most
    return gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{name}"]
