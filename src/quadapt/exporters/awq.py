"""AWQ folders of version gemm, as vLLM and GPTQModel read them: codes as they are, whole zero-points, scales.

    W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]),    g = i // group_size

Codes and zero-points have four bits, and lie along the outputs, eight in an int32 word, in AWQ's order of nibbles.

Source: AWQ (arXiv 2306.00978), and `WQLinear_GEMM` of AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from quadapt.exporters import integers
from quadapt.exporters.codes import Writer
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.quant.words import awq_words


def why_not_layout(layout: Layout) -> str:
    """Why the format cannot hold weights of a layout, whatever their numbers; an empty string if it can."""
    why, bits = integers.why_not_layout(layout, "awq"), layout.format.bits
    if why:
        return why
    if bits != 4:
        return f"{layout.format.name} has codes of {bits} bits, and awq knows 4. Use --format compressed-tensors"
    if layout.out % 8:
        return (
            f"{layout.out} outputs fill no whole words of eight, as awq has it. Skip the layer (--skip) when you "
            "quantize, or use --format compressed-tensors"
        )
    return ""


class AWQWriter(Writer):
    """Writes for AWQ's kernels, and so for vLLM and GPTQModel."""

    name: ClassVar[str] = "awq"

    def why_not(self, weight: QuantWeight) -> str:
        return why_not_layout(weight.layout) or integers.why_not(weight, self.floats)

    def why_not_together(self, layouts: Mapping[str, Layout]) -> str:
        first: dict[int, str] = {}
        for name, layout in layouts.items():
            first.setdefault(layout.format.group_size, name)
        if len(first) < 2:
            return ""
        (size, one), (another, other), *_ = first.items()
        return (
            f"{other}: has groups of {_words(another)}, and {one} of {_words(size)}: a folder of awq has one group "
            "size. Use --format gptq or compressed-tensors"
        )

    def parts(self, weight: QuantWeight) -> dict[str, Tensor]:
        return {
            "qweight": awq_words(weight.codes().T.contiguous()),
            "qzeros": awq_words(integers.zero_points(weight).T.contiguous()),
            "scales": weight.scales.T.to(self.floats).contiguous(),
        }

    def about(self, layers: Mapping[str, QuantWeight], plain: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": next(iter(layers.values())).format.group_size,
            "zero_point": True,
            "modules_to_not_convert": list(plain),
        }


def _words(size: int) -> str:
    """A group size in words."""
    return f"{size} inputs" if size > 0 else "whole rows"
