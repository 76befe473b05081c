"""Whole models for ONNX Runtime: transformers' own graph, with an operator for codes in place of each quantized layer.

    Y[.., o] = sum_i X[.., i] * scales[o, g] * (code[o, i] - zero[o, g]),    g = i // block_size

torch writes the graph (`torch.onnx.export`), in float32; each quantized layer is `com.microsoft.MatMulNBits` in it.
That has codes of 2, 4 and 8 bits in blocks of 16, 32, .. 256 inputs, packed with the least significant bits first, and
zero-points that are whole numbers or, at 2 and 4 bits, floats. Codes of 3 bits lie in 4, those of 5 and 6 in 8. Offsets
of floats become zero-points, `-offset / scale`, each rounded once.

Inputs and outputs have the names that Optimum's models have: past keys and values go in, and come out longer.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadapt import kernels
from quadapt.errors import ExportError
from quadapt.exporters import affine, integers
from quadapt.exporters.codes import Writer
from quadapt.exporters.files import new_folder
from quadapt.exporters.report import ExportReport, TensorRow, size_of
from quadapt.exporters.tensors import refuse_adapters, rounded_besides, tensors_of
from quadapt.hf.ending import set_ends
from quadapt.model.quantize import Progress, quantized_layers
from quadapt.quant.weight import Layout, QuantWeight

_HELD = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
"""How many bits codes of each width take."""

_SIZES = (16, 32, 64, 128, 256)

FILE = "model.onnx"
"""The name of the file; weights lie beside it."""


def why_not_layout(layout: Layout) -> str:
    """Why the format cannot hold weights of a layout, whatever their numbers; an empty string if it can."""
    why, bits = affine.why_not_layout(layout, "onnx", bits=tuple(_HELD), sizes=_SIZES), layout.format.bits
    if not why and layout.format.zero == "float" and _HELD[bits] == 8:
        return (
            f"{layout.format.name} has offsets of floats, which ONNX Runtime knows for codes of 2, 3 and 4 bits alone. "
            "Use --format mlx, torchao or hf"
        )
    return why


class ONNXWriter(Writer):
    """Writes whole models that ONNX Runtime runs."""

    name: ClassVar[str] = "onnx"

    def why_not(self, weight: QuantWeight) -> str:
        why = why_not_layout(weight.layout)
        if why or weight.format.zero != "float":
            return why or integers.why_not(weight, self.floats)
        return affine.why_not_zeros(weight)

    def parts(self, weight: QuantWeight) -> dict[str, Tensor]:
        layout, bits = weight.layout, _HELD[weight.format.bits]
        size = affine.size_of(layout, _SIZES)
        scales, zeros = (affine.by_size(each, layout, size) for each in (weight.scales, affine.zero_points(weight)))
        packed = kernels.pack(weight.codes(), bits).view(layout.out, -1, size * bits // 8)
        if weight.format.zero == "float":
            zeros = zeros.float().flatten()
        else:
            zeros = kernels.pack(zeros.to(torch.uint8), bits).flatten()
        return {"codes": packed.contiguous(), "scales": scales.flatten().contiguous(), "zeros": zeros.contiguous()}

    def about(self, layers: Mapping[str, QuantWeight], plain: Sequence[str]) -> dict[str, Any]:
        return {}  # the graph says it all

    def check_model(self, model: Any) -> None:
        _library()
        if model.get_output_embeddings() is None:
            raise ExportError(
                f"{type(model).__name__}: is no language model, and others are not known. Use --format hf"
            )

    def export(self, model: Any, tokenizer: Any, folder: str | Path, progress: Progress = iter) -> ExportReport:
        refuse_adapters(model)
        self.check_model(model)
        weights = {name: layer.quant_weight for name, layer in quantized_layers(model).items()}
        self._check(weights)
        graph, rows = nn.Module.float(copy.deepcopy(model)).eval(), []  # transformers refuses to cast quantized models
        for name in progress(list(weights)):
            parts = self.parts(weights[name])
            rows += [_row(f"{name}.{part}", each) for part, each in parts.items()]
            layer = graph.get_submodule(name)
            graph.set_submodule(name, _Product(weights[name].layout, parts, getattr(layer, "bias", None)))
        path = Path(folder)
        with new_folder(path) as partial:
            self.write_graph(graph, partial)
            set_ends(model, tokenizer)
            _save_config(model, partial)
            tokenizer.save_pretrained(partial)
        count = sum(each.layout.out * each.layout.columns for each in weights.values())
        return ExportReport(
            format=self.name,
            path=str(path),
            bytes=size_of(path),
            tensors=tuple(rows),
            bits_per_weight=8 * sum(row.nbytes for row in rows) / max(count, 1),
            notes=(*rounded_besides(dict(tensors_of(model)), torch.float32), *self.notes(model)),
        )

    def write_graph(self, graph: Any, folder: Path) -> None:
        """Write the files of a model whose quantized layers are operators already."""
        _write(graph, folder / FILE)


class _Product(nn.Module):
    """A quantized layer as the operator of ONNX Runtime; it only stands in the graph, and computes nothing here."""

    def __init__(self, layout: Layout, parts: Mapping[str, Tensor], bias: Tensor | None) -> None:
        super().__init__()
        for name, each in parts.items():
            self.register_buffer(name, each)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        bits, size = _HELD[layout.format.bits], affine.size_of(layout, _SIZES)
        self.out_features, self.in_features = layout.out, layout.columns
        self.attributes: dict[str, Any] = {"K": layout.columns, "N": layout.out, "bits": bits, "block_size": size}

    def forward(self, x: Tensor) -> Tensor:
        held: Any = (self.codes, self.scales, self.zeros)
        found = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, *held),
            self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return found if self.bias is None else found + self.bias


class _Step(nn.Module):
    """A model with its past keys and values as plain tensors: a flat list, in and out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.placed = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache: Any = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        places = {"position_ids": position_ids} if self.placed else {}
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **places
        )
        return (found.logits, *(each for layer in cache.layers for each in (layer.keys, layer.values)))


def _write(model: Any, file: Path) -> None:
    """Let torch write the graph of a model, for any numbers of rows, tokens and past tokens."""
    with torch.no_grad():
        held = model(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=True).past_key_values.layers
    shapes = [tuple(each.shape) for layer in held for each in (layer.keys, layer.values)]
    rows, now, before = 2, 4, 3
    ids = torch.ones(rows, now, dtype=torch.long)
    mask, places = torch.ones(rows, before + now, dtype=torch.long), before + torch.arange(now).expand(rows, now)
    past = [torch.zeros(rows, shape[1], before, shape[3]) for shape in shapes]
    names = [f"{layer}.{kind}" for layer in range(len(held)) for kind in ("key", "value")]
    with torch.no_grad(), _refused(type(model).__name__):
        program = torch.onnx.export(
            _Step(model),
            (ids, mask, places.contiguous(), past),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{each}" for each in names)],
            output_names=["logits", *(f"present.{each}" for each in names)],
            dynamic_shapes={
                "input_ids": {0: "batch_size", 1: "sequence_length"},
                "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
                "position_ids": {0: "batch_size", 1: "sequence_length"},
                "past": [{0: "batch_size", 2: "past_sequence_length"} for _ in past],
            },
        )
    assert program is not None
    program.save(str(file), external_data=True)


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """Turn what torch says of a model that it cannot write a graph of into an error that says what to do."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        why = " ".join(str(error.__cause__ or error).split())[:300]
        raise ExportError(
            f"{name}: torch {torch.__version__} cannot write its graph ({why}). Use --format hf"
        ) from error


def _save_config(model: Any, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype, config.architectures = "float32", [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _row(name: str, tensor: Tensor) -> TensorRow:
    return TensorRow(name=name, type=str(tensor.dtype), shape=tuple(tensor.shape), nbytes=tensor.nbytes, linear=True)


def _library() -> None:
    """Raise ExportError if what torch writes graphs with is not installed."""
    if any(find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise ExportError("torch writes graphs with onnx and onnxscript. pip install 'quadapt[onnx]'")
