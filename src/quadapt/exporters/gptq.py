"""GPTQ folders, as GPTQModel, vLLM and transformers read them: codes as they are, whole zero-points, scales.

    W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]),    g = g_idx[i]

Codes and zero-points are dense streams of bits in int32 words, the least significant first: codes run down the inputs
of one output, in the layer's own order, zero-points along the outputs of one group. Version 1 stores zero-points less
one, version 2 as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quadapt.exporters import integers
from quadapt.exporters.codes import DType, Writer
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.quant.words import stream, words

_WIDTHS = (2, 3, 4, 8)

NO_ZERO = (
    "which checkpoint_format=gptq does not hold: it stores them less one, and readers take what that wraps to for "
    "another. Use --checkpoint-format gptq_v2"
)


def why_not_layout(layout: Layout) -> str:
    """Why the format cannot hold weights of a layout, whatever their numbers; an empty string if it can."""
    why, bits = integers.why_not_layout(layout, "gptq", permuted=True), layout.format.bits
    if why:
        return why
    if bits not in _WIDTHS:
        return f"{layout.format.name} has codes of {bits} bits, and gptq knows 2, 3, 4 and 8. Use --format gguf"
    for size, are in ((layout.columns, "inputs"), (layout.out, "outputs")):
        if size * bits % 32:
            return (
                f"{size} {are} of {bits} bits fill no whole words of 32 bits, as gptq has it. Skip the layer (--skip) "
                "when you quantize, or use --format gguf"
            )
    return ""


class GPTQWriter(Writer):
    """Writes for GPTQModel, and so for vLLM and transformers.

    Args:
        dtype: Of scales and of all that is not quantized.
        version: gptq_v2: zero-points as they are. gptq: less one, as it was at first.
    """

    name: ClassVar[str] = "gptq"

    def __init__(self, dtype: DType = "float16", version: Literal["gptq_v2", "gptq"] = "gptq_v2") -> None:
        super().__init__(dtype)
        self.version = version

    @property
    def _less(self) -> int:
        """What zero-points are stored less."""
        return int(self.version == "gptq")

    def why_not(self, weight: QuantWeight) -> str:
        why = why_not_layout(weight.layout)
        if why:
            return why
        if self._less and int(integers.zero_points(weight).min()) == 0:
            return f"it has a zero-point of 0, {NO_ZERO}"
        return integers.why_not(weight, self.floats, least=self._less)

    def parts(self, weight: QuantWeight) -> dict[str, Tensor]:
        layout, bits = weight.layout, weight.format.bits
        at = torch.arange(layout.columns)
        if layout.permuted:
            rows, at = stream(weight.codes(), bits), weight.tensors["perm"].cpu()
        else:
            rows = words(weight.packed)
        return {
            "qweight": rows.T.contiguous(),
            "qzeros": stream(integers.zero_points(weight).T - self._less, bits),
            "scales": weight.scales.T.to(self.floats).contiguous(),
            "g_idx": (at // weight.format.width(layout.columns)).to(torch.int32),
        }

    def about(self, layers: Mapping[str, QuantWeight], plain: Sequence[str]) -> dict[str, Any]:
        grids = {name: (weight.format.bits, weight.format.group_size) for name, weight in layers.items()}
        common = Counter(grids.values()).most_common(1)[0][0]
        others = {name: grid for name, grid in grids.items() if grid != common}
        dynamic: dict[str, dict[str, int]] = {f"-:{_alone(name)}": {} for name in plain if name != "lm_head"}
        dynamic |= {f"+:{_alone(name)}": {"bits": grid[0], "group_size": grid[1]} for name, grid in others.items()}
        found: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": self.version,
            "bits": common[0],
            "group_size": common[1],
            "sym": all(weight.format.zero == "none" for weight in layers.values()),
            "desc_act": any(weight.layout.permuted for weight in layers.values()),
            "lm_head": "lm_head" in layers,
        }
        return found | ({"dynamic": dynamic} if dynamic else {})


def _alone(name: str) -> str:
    """A pattern that matches the name of one layer and nothing else."""
    return f"^{re.escape(name)}$"
