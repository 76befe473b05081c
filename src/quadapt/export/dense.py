"""An ordinary transformers folder: weights dequantized, for any server, and without any need of quadapt to load it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ExportError
from quadapt.export.files import new_folder
from quadapt.export.report import ExportReport, TensorRow, bits_per_weight, size_of
from quadapt.export.tensors import tensors_of
from quadapt.kernels import expand
from quadapt.kernels.reference import rows_per_chunk
from quadapt.model.quantize import Progress
from quadapt.quant.weight import QuantWeight

_DTYPES = {"bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16), "float32": ("F32", torch.float32)}

SHARD = 2 << 30
"""Bytes of a file of weights, and so about what memory must hold."""


def export_hf(model: nn.Module, tokenizer: Any, folder: str | Path, *,
              dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16", shard_bytes: int = SHARD,
              progress: Progress = iter) -> ExportReport:
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
    if dtype not in _DTYPES:
        raise ExportError(f"dtype={dtype!r} is unknown. Use {', '.join(_DTYPES)}")
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    sources, kind, path = dict(tensors_of(model)), _DTYPES[dtype][1], Path(folder)
    shapes = {name: torch.empty(_shape(source), dtype=_dtype(source, kind), device="meta") for name, source in sources.items()}
    _check_names(model, shapes)
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    rows: list[TensorRow] = []
    with new_folder(path) as partial:
        for file in progress(list(shards.filename_to_tensors)):
            tensors = {}
            for name in shards.filename_to_tensors[file]:
                tensors[name], row = _densify(name, sources[name], kind)
                rows.append(row)
            save_file(tensors, partial / file, metadata={"format": "pt"})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        _save_config(model, dtype, partial)
        tokenizer.save_pretrained(partial)
    return ExportReport(format="hf", path=str(path), bytes=size_of(path), tensors=tuple(rows),
                        bits_per_weight=bits_per_weight(rows), notes=_notes(rows, sources, dtype))


def _shape(source: QuantWeight | Tensor) -> tuple[int, ...]:
    return (source.layout.out, source.layout.columns) if isinstance(source, QuantWeight) else tuple(source.shape)


def _dtype(source: QuantWeight | Tensor, kind: torch.dtype) -> torch.dtype:
    return kind if isinstance(source, QuantWeight) or source.is_floating_point() else source.dtype


def _densify(name: str, source: QuantWeight | Tensor, kind: torch.dtype) -> tuple[Tensor, TensorRow]:
    linear = isinstance(source, QuantWeight)
    exact = source.dequantize() if isinstance(source, QuantWeight) else source
    dense = exact.to(device="cpu", dtype=_dtype(source, kind)).contiguous()
    if not bool(torch.isfinite(dense).all()):
        raise ExportError(f"{name}: has values that are infinite or NaN in {kind}. Use dtype='bfloat16', or repair the model")
    note = ""
    if isinstance(source, QuantWeight) and kind != torch.float32:
        note = f"moved by up to {largest_move(source, exact, dense):.4f} of a quantization step"
    name_of = next((short for short, dtype in _DTYPES.values() if dtype == dense.dtype), str(dense.dtype).removeprefix("torch."))
    return dense, TensorRow(name=name, type=name_of, shape=tuple(dense.shape), nbytes=dense.nbytes, linear=linear, note=note)


def largest_move(weight: QuantWeight, exact: Tensor, dense: Tensor) -> float:
    """How far a cast from `exact` to `dense` moved a weight, at most, in quantization steps.

    A step is the distance of neighbouring levels times the scale; for NormalFloat that of the two closest levels.
    """
    table = weight.format.table(exact)
    gap = 1.0 if table is None else float(table.diff().min())
    step, worst = rows_per_chunk(weight.layout.columns), 0.0
    for scales, before, after in zip(weight.scales.split(step), exact.split(step), dense.split(step), strict=True):
        steps = expand(gap * scales.abs(), weight.format.width(weight.layout.columns), weight.layout.columns)
        moved = (after.to(before.device).float() - before).abs() / weight.layer_order(steps)
        worst = max(worst, float(torch.where(steps > 0, moved, 0).max()))  # a group of equal weights has no step
    return worst


def _check_names(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Refuse models that transformers stores under other names or in other pieces than it computes with."""
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, dict(tensors))
    other = sorted(set(stored) ^ set(tensors))
    if other:
        raise ExportError(f"{other[0]}: {type(model).__name__} is stored under other names than it computes with, which this export "
                          "does not know. Use model.dequantize() and save_pretrained, if memory allows")


def _save_config(model: Any, dtype: str, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _notes(rows: list[TensorRow], sources: dict[str, QuantWeight | Tensor], dtype: str) -> tuple[str, ...]:
    kind, notes = _DTYPES[dtype][1], []
    moved = [row for row in rows if row.linear and row.note]
    if moved:
        worst = max(moved, key=lambda row: float(row.note.split()[3]))
        notes.append(f"{dtype} does not hold the weights exactly: {worst.name} is {worst.note}, the others less")
    rounded = [name for name, source in sources.items() if isinstance(source, Tensor) and source.is_floating_point()
               and source.dtype != kind and torch.finfo(source.dtype).bits >= torch.finfo(kind).bits]
    if rounded:
        notes.append(f"{len(rounded)} tensors that are not quantized are rounded to {dtype}: {', '.join(rounded)}")
    return tuple(notes)
