"""compressed-tensors' `pack-quantized` folder, as vLLM serves it: codes as they are, whole zero-points, scales.

Its rows of int32 words are our rows of bytes, a little-endian stream of bits; its codes and zero-points are signed,
which it undoes in packing. Offsets must be whole zero-points (or implied, for symmetric integers). Those of QA-LoRA's
merge and of textbook asymmetric rounding are floats, which this format cannot hold: train with `zero="integer"` for it.
transformers 5.23 with compressed-tensors 0.20 keeps symmetric folders alone as codes. For its empty layers it lets the
library compress tensors on the meta device, which leaves zero-points there unpacked, int8 `[out, groups]`; the library
then writes and unpacks words. So no file fits both, and one with zero-points says `dequantize` in its configuration:
transformers then makes dense weights of it as it loads, and servers, which read the words, do not know that key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadapt.exporters import integers
from quadapt.exporters.codes import Writer
from quadapt.model.quantize import quantized_layers
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.quant.words import stream, words

_EVERYWHERE = (4, 8)
"""The widths that all servers of this format know, with zero-points and without."""


def why_not_layout(layout: Layout) -> str:
    """Why the format cannot hold weights of a layout, whatever their numbers; an empty string if it can."""
    return integers.why_not_layout(layout, "compressed-tensors")


class CompressedTensorsWriter(Writer):
    """Writes for compressed-tensors, and so for vLLM and transformers with that package."""

    name: ClassVar[str] = "compressed-tensors"

    def why_not(self, weight: QuantWeight) -> str:
        return why_not_layout(weight.layout) or integers.why_not(weight, self.floats)

    def parts(self, weight: QuantWeight) -> dict[str, Tensor]:
        """`packed`, `scale`, `shape`, and `zero_point` if it is asymmetric."""
        layout, bits = weight.layout, weight.format.bits
        found = {
            "weight_packed": words(weight.packed),
            "weight_scale": weight.scales.to(self.floats),
            "weight_shape": torch.tensor([layout.out, layout.columns]),
        }
        if layout.format.zero == "integer":
            zeros = integers.zero_points(weight)
            found["weight_zero_point"] = stream(zeros.T, bits).T.contiguous()
        return found

    def notes(self, model: nn.Module) -> list[str]:
        formats = [layer.quant_weight.format for layer in quantized_layers(model).values()]
        odd = sorted({each.bits for each in formats if each.bits not in _EVERYWHERE})
        if not odd:
            return []
        with_zeros = any(each.zero == "integer" for each in formats if each.bits in odd)
        zeros = "; vLLM takes such widths with zero-points since 0.32, on GPUs alone" if with_zeros else ""
        return [f"SGLang and older vLLM refuse codes of {' or '.join(map(str, odd))} bits: they know 4 and 8{zeros}"]

    def about(self, layers: Mapping[str, QuantWeight], plain: Sequence[str]) -> dict[str, Any]:
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
        zeros = any(format.zero == "integer" for format in by_format)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(plain),
            **({"dequantize": True} if zeros else {}),
        }
