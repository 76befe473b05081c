"""An ordinary transformers folder: weights dequantized, for any server, loaded without quadapt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ExportError
from quadapt.exporters.files import new_folder, write_index
from quadapt.exporters.report import ExportReport, TensorRow, bits_per_weight, size_of
from quadapt.exporters.tensors import (
    TYPES,
    Assembled,
    Source,
    Stored,
    as_stored,
    dense_of,
    quantized_parts,
    refuse_adapters,
    rounded_besides,
    shape_of,
    tensors_of,
)
from quadapt.hf.ending import set_ends
from quadapt.hf.saving import copy_processor
from quadapt.model.quantize import Progress
from quadapt.quant.weight import QuantWeight, largest_move

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

SHARD = 2 << 30
"""Bytes of a file of weights, and so about what memory must hold."""


def export_hf(
    model: nn.Module,
    tokenizer: Any,
    folder: str | Path,
    *,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    shard_bytes: int = SHARD,
    progress: Progress = iter,
) -> ExportReport:
    """Write a quantized model as a dense one.

    Args:
        model: Quantized layers as codes, without adapters.
        tokenizer: Saved beside it.
        folder: Must not exist, or be empty.
        dtype: Of all floats in it. float32 holds the weights exactly; the report says how far the others move them.
        shard_bytes: Largest file of weights.
        progress: Wraps the names of the files to write, to show how far the work is.

    Raises:
        ExportError: The folder is taken, the model carries adapters, or the dtype cannot hold its weights.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    if dtype not in _DTYPES:
        raise ExportError(f"dtype={dtype!r} is unknown. Use {', '.join(_DTYPES)}")
    refuse_adapters(model)
    torch_dtype, path = _DTYPES[dtype], Path(folder)
    sources = as_stored(model, dict(tensors_of(model)))
    meta = {
        name: torch.empty(shape_of(source), dtype=_target(source, torch_dtype), device="meta")
        for name, source in sources.items()
    }
    shards = split_torch_state_dict_into_shards(meta, max_shard_size=shard_bytes)
    moves: dict[str, float] = {}
    with new_folder(path) as partial:
        for file in progress(list(shards.filename_to_tensors)):
            tensors = {}
            for name in shards.filename_to_tensors[file]:
                tensors[name], moves[name] = _densify(name, sources[name], torch_dtype)
            save_file(tensors, partial / file, metadata={"format": "pt"})
        write_index(shards, partial)
        set_ends(model, tokenizer)
        _save_config(model, dtype, partial)
        tokenizer.save_pretrained(partial)
        copy_processor(model, partial)
    rows = tuple(_row(name, tensor, sources[name], moves[name]) for name, tensor in meta.items())
    return ExportReport(
        format="hf",
        path=str(path),
        bytes=size_of(path),
        tensors=rows,
        bits_per_weight=bits_per_weight(rows),
        notes=_notes(sources, moves, dtype),
    )


def _target(source: Stored, dtype: torch.dtype) -> torch.dtype:
    if isinstance(source, Assembled):
        return _target(source.pieces[0], dtype)
    return dtype if isinstance(source, QuantWeight) or source.is_floating_point() else source.dtype


def _densify(name: str, source: Stored, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A tensor as it is saved, and how far the cast moved a weight at most, in quantization steps."""
    moves = [0.0]

    def cast(piece: Source) -> Tensor:
        exact = piece.dequantize() if isinstance(piece, QuantWeight) else piece
        dense = exact.to(device="cpu", dtype=_target(piece, dtype)).contiguous()
        if not bool(torch.isfinite(dense).all()):
            raise ExportError(
                f"{name}: has values that are infinite or NaN in {dtype}. Use dtype='bfloat16', or repair the model"
            )
        if isinstance(piece, QuantWeight):
            moves.append(largest_move(piece, exact, dense))
        return dense

    return dense_of(source, cast), max(moves)


def _save_config(model: Any, dtype: str, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _row(name: str, tensor: Tensor, source: Stored, move: float) -> TensorRow:
    return TensorRow(
        name=name,
        type=TYPES.get(tensor.dtype, str(tensor.dtype)),
        shape=tuple(tensor.shape),
        nbytes=tensor.nbytes,
        linear=bool(quantized_parts(source)),
        note=f"the cast moved a weight by up to {move:.4f} of a quantization step" if move else "",
    )


def _notes(sources: dict[str, Stored], moves: dict[str, float], dtype: str) -> tuple[str, ...]:
    torch_dtype, notes = _DTYPES[dtype], []
    worst = max(moves, key=lambda name: moves[name])
    if moves[worst]:
        notes.append(
            f"{dtype} does not hold the quantized weights exactly: it moves them by up to {moves[worst]:.4f} "
            f"of a quantization step ({worst}). float32 and GGUF hold them exactly"
        )
    notes += rounded_besides(sources, torch_dtype)
    return tuple(notes)
