"""compressed-tensors' `pack-quantized` folder, as vLLM serves it: codes as they are, whole zero-points, scales.

Its rows of int32 words are our rows of bytes, a little-endian stream of bits; its codes and zero-points are signed,
which it undoes in packing. Offsets must be whole zero-points (or implied, for symmetric integers). Those of QA-LoRA's
merge and of textbook asymmetric rounding are floats, which this format cannot hold: train with `zero="integer"` for it.
transformers 5.23 loads symmetric folders alone: it expects zero-points unpacked, which that library never writes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ExportError
from quadapt.exporters.files import new_folder
from quadapt.exporters.report import ExportReport, TensorRow, size_of
from quadapt.exporters.tensors import TYPES, as_stored, refuse_adapters, rounded_besides, tensors_of
from quadapt.hf.ending import set_ends
from quadapt.kernels import pack
from quadapt.quant.weight import Layout, QuantWeight

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_compressed_tensors(
    model: nn.Module,
    tokenizer: Any,
    folder: str | Path,
    *,
    dtype: Literal["bfloat16", "float16", "float32"] = "float16",
) -> ExportReport:
    """Write a quantized model for compressed-tensors, and so for vLLM and transformers with that package.

    Args:
        model: Quantized layers as codes, without adapters.
        tokenizer: Saved beside it.
        folder: Must not exist, or be empty.
        dtype: Of scales and of all that is not quantized: what servers compute in.

    Raises:
        ExportError: The folder is taken, the model carries adapters, or the format cannot hold a layer; it is named.
    """
    from safetensors.torch import save_file

    refuse_adapters(model)
    if dtype not in _DTYPES:
        raise ExportError(f"dtype={dtype!r} is unknown. Use {', '.join(_DTYPES)}")
    torch_dtype, path = _DTYPES[dtype], Path(folder)
    found = dict(tensors_of(model))
    sources = as_stored(model, found)
    layers = {n.removesuffix(".weight"): s for n, s in found.items() if isinstance(s, QuantWeight)}
    for name, weight in layers.items():
        why = cannot_hold(weight, torch_dtype)
        if why:
            raise ExportError(f"{name}: {why}")
    tensors: dict[str, Tensor] = {}
    for name, source in sources.items():
        if isinstance(source, QuantWeight):
            tensors |= {f"{name}_{part}": tensor for part, tensor in packed(source, torch_dtype).items()}
        else:
            tensors[name] = source.to(torch_dtype if source.is_floating_point() else source.dtype).contiguous()
    tensors = {name: tensor.detach().cpu() for name, tensor in sorted(tensors.items())}
    with new_folder(path) as partial:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        set_ends(model, tokenizer)
        _save_config(model, layers, dtype, partial)
        tokenizer.save_pretrained(partial)
    rows = tuple(
        TensorRow(
            name=name,
            type=TYPES.get(tensor.dtype, str(tensor.dtype)),
            shape=tuple(tensor.shape),
            nbytes=tensor.nbytes,
            linear=isinstance(sources.get(f"{name.rpartition('.weight_')[0]}.weight"), QuantWeight),
        )
        for name, tensor in tensors.items()
    )
    weights = sum(weight.layout.out * weight.layout.columns for weight in layers.values())
    bits = 8 * sum(row.nbytes for row in rows if row.linear) / weights
    return ExportReport(
        format="compressed-tensors",
        path=str(path),
        bytes=size_of(path),
        tensors=rows,
        bits_per_weight=bits,
        notes=tuple(rounded_besides(sources, torch_dtype)),
    )


def cannot_hold_layout(layout: Layout) -> str:
    """Why the format cannot hold weights of a layout, whatever their numbers; an empty string if it can."""
    width = layout.format.width(layout.columns)
    if layout.format.levels != "int" or layout.format.zero == "float":
        return (
            f"{layout.format.name} has {'levels' if layout.format.levels != 'int' else 'offsets'} that "
            "compressed-tensors cannot hold. Use --format gguf, or quantize with --levels int --zero integer and tune "
            "with peqa, e2e-qp or l4q"
        )
    if layout.columns % width:
        return (
            f"{layout.columns} inputs end in a short group, which compressed-tensors does not know. Use a "
            "--group-size that divides them, or --format gguf"
        )
    return "its inputs are permuted. Use --format hf" if layout.permuted else ""


def cannot_hold(weight: QuantWeight, dtype: torch.dtype) -> str:
    """Why the format cannot hold a weight bit for bit with scales in `dtype`; an empty string if it can."""
    why = cannot_hold_layout(weight.layout)
    if not why and not torch.equal(weight.scales.to(dtype).float(), weight.scales):
        why = f"its scales are not exact in {dtype}. Use --dtype float32"
    return why


def packed(weight: QuantWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """A weight as that package stores it: `packed`, `scale`, `shape`, and `zero_point` if it is asymmetric."""
    layout, bits = weight.layout, weight.format.bits
    found = {
        "packed": _words(weight.packed),
        "scale": weight.scales.to(dtype),
        "shape": torch.tensor([layout.out, layout.columns]),
    }
    if layout.format.zero == "integer":
        zeros = weight.tensors["offsets"]
        found["zero_point"] = _words(pack(zeros.T.contiguous(), bits)).T.contiguous()
    return found


def _words(rows: Tensor) -> Tensor:
    """Rows of bytes as rows of int32, filled up with zeros."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4)).contiguous().view(torch.int32)


def _save_config(model: Any, layers: Mapping[str, QuantWeight], dtype: str, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    by_format: dict[Any, list[str]] = {}
    for name, weight in layers.items():
        by_format.setdefault(weight.format, []).append(name)
    groups = {
        f"group_{at}": {
            "targets": ["Linear"] if len(by_format) == 1 else names,
            "weights": {
                "num_bits": format.bits,
                "type": "int",
                "symmetric": format.zero == "none",
                "strategy": "channel" if format.group_size == -1 else "group",
                "group_size": None if format.group_size == -1 else format.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for at, (format, names) in enumerate(by_format.items())
    }
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
    }
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
