"""Folders of torchao, as transformers loads them: codes and scales as they are, offsets as zero-points.

    W[o, i] = (code[o, i] - zero[o, g]) * scales[o, g],    g = i // group_size

Codes are signed bytes about zero: those of four bits are -8 to 7. Whole zero-points are bytes, too, and exact. Offsets
of floats become zero-points of float32, `-offset / scale`, each rounded once; torchao then subtracts and multiplies in
float32, so that weights of `b` bits differ by under `2**(b - 22)` of a step.

The tensors are torchao's own (`IntxUnpackedToInt8Tensor`), and its own code flattens them for the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from quadapt.errors import ExportError
from quadapt.exporters import affine
from quadapt.exporters.codes import Writer
from quadapt.exporters.tensors import Stored
from quadapt.model.quantize import quantized_layers
from quadapt.quant.weight import Layout, QuantWeight

_BITS = (2, 3, 4, 5, 6, 8)


def why_not_layout(layout: Layout) -> str:
    """Why the format cannot hold weights of a layout, whatever their numbers; an empty string if it can."""
    return affine.why_not_layout(layout, "torchao", bits=_BITS, sizes=None)


class TorchAOWriter(Writer):
    """Writes for torchao, and so for transformers with it."""

    name: ClassVar[str] = "torchao"

    def why_not(self, weight: QuantWeight) -> str:
        return why_not_layout(weight.layout) or affine.why_not_in_steps(weight, self.floats)

    def why_not_together(self, layouts: Mapping[str, Layout]) -> str:
        first: dict[int, str] = {}
        for name, layout in layouts.items():
            first.setdefault(layout.format.bits, name)
        if len(first) < 2:
            return ""
        (bits, one), (more, other), *_ = first.items()
        return (
            f"{other}: has {more} bits, and {one} {bits}: a folder of torchao has one width. Use --format gguf or mlx"
        )

    def check_model(self, model: Any) -> None:
        _library()
        affine.refuse_linear_form(model, "transformers with torchao")

    def parts(self, weight: QuantWeight) -> dict[str, Tensor]:
        support = _library()
        flat, _ = support.flatten_tensor_state_dict({"layer.weight": self._tensor(weight)})
        return {name.removeprefix("layer."): each for name, each in flat.items()}

    def header(self, sources: Mapping[str, Stored]) -> dict[str, str]:
        support, mark = _library(), torch.empty(0)
        marks = {name: self._tensor(each) if isinstance(each, QuantWeight) else mark for name, each in sources.items()}
        return {"format": "pt", **support.flatten_tensor_state_dict(marks)[1]}

    def about(self, layers: Mapping[str, QuantWeight], plain: Sequence[str]) -> dict[str, Any]:
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup
        from torchao.quantization.quant_primitives import MappingType
        from transformers import TorchAoConfig

        weights = list(layers.values())
        sizes = Counter(each.format.group_size for each in weights)
        size = sizes.most_common(1)[0][0]
        symmetric = all(weight.format.zero == "none" for weight in weights)
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{weights[0].format.bits}"),
            granularity=PerGroup(size) if size > 0 else PerAxis(0),
            mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        )
        said: dict[str, Any] = TorchAoConfig(config, modules_to_not_convert=list(plain)).to_dict()
        return said

    def notes(self, model: Any) -> list[str]:
        if all(layer.layout.format.zero != "float" for layer in quantized_layers(model).values()):
            return []
        return ["vLLM rounds zero-points of such folders to whole numbers, and would serve another model"]

    def _tensor(self, weight: QuantWeight) -> Any:
        """A weight as torchao's tensor."""
        from torchao.quantization import IntxUnpackedToInt8Tensor

        layout, middle = weight.layout, 2 ** (weight.format.bits - 1)
        size = affine.size_of(layout, None)
        zeros = affine.zero_points(weight) - middle
        scales, zeros = (affine.by_size(each, layout, size) for each in (weight.scales, zeros))
        return IntxUnpackedToInt8Tensor(
            qdata=(weight.codes() - middle).view(torch.int8),  # bytes go round, as signed ones do
            scale=scales.to(self.floats).contiguous(),
            zero_point=zeros.to(torch.float32 if weight.format.zero == "float" else torch.int8).contiguous(),
            target_dtype=getattr(torch, f"int{weight.format.bits}"),
            block_size=(1, size),
            dtype=self.floats,
            activation_quantization=None,
        )


def _library() -> Any:
    """The module of torchao that flattens its tensors for files.

    Raises:
        ExportError: torchao is not installed.
    """
    try:
        from torchao.prototype.safetensors import safetensors_support
    except ImportError as error:
        raise ExportError(
            "torchao writes its own tensors, and is not installed. pip install 'quadapt[torchao]'"
        ) from error
    return safetensors_support
