"""What formats of integers with whole zero-points can hold: compressed-tensors, GPTQ and AWQ.

All of them mean `scale * (code - zero-point)`, and one that computes this in float32 gets the very bits of the stored
form, `scale * code + offset`, if scales have few enough digits that no product is rounded: those of float16 and
bfloat16 are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quadapt.quant.weight import Layout, QuantWeight

ORDER = (
    "its scales ({name}) have more digits than float16: readers compute scale * (code - zero-point), which may round "
    "otherwise in the last bit of float32 than scale * code + offset"
)

_KEEPS = (
    "Use --format gguf, or --format lora for an adapter by itself; or quantize with --levels int --zero integer and "
    "tune by what keeps zero-points whole: code-lora, peqa, e2e-qp, l4q, lota-qaf --no-shift-offsets"
)


def why_not_layout(layout: Layout, format: str, *, permuted: bool = False) -> str:
    """Why a format cannot hold weights of a layout, whatever their numbers; an empty string if it can.

    Args:
        layout: The layout.
        format: The name of the format.
        permuted: Whether the format knows an order of the inputs.
    """
    if layout.format.levels != "int":
        return f"{layout.format.name} has levels that {format} cannot hold. {_KEEPS}"
    if layout.format.zero == "float":
        return f"{layout.format.name} has offsets that {format} cannot hold, which knows whole zero-points. {_KEEPS}"
    if layout.columns % layout.format.width(layout.columns):
        return (
            f"{layout.columns} inputs end in a short group, which {format} does not know. Use a --group-size that "
            "divides them, or --format gguf"
        )
    if layout.permuted and not permuted:
        return f"its inputs are permuted, which {format} does not know. Use --format gptq or hf"
    return ""


def why_not_scales(layout: Layout, dtype: torch.dtype) -> str:
    """Why scales of a layout may not be held in a dtype; an empty string if it holds them all."""
    scales = layout.storage.of_scales
    if scales.exact_in(dtype):
        return ""
    return f"its scales ({scales.name}) may not be exact in {str(dtype).removeprefix('torch.')}. Use --dtype float32"


def why_not_order(layout: Layout) -> str:
    """Why a product may round otherwise than in the stored form, by the layout; an empty string if it does not."""
    scales = layout.storage.of_scales
    return "" if scales.exact_in(torch.float16) else ORDER.format(name=scales.name)


def why_not(weight: QuantWeight, dtype: torch.dtype, *, least: int = 0) -> str:
    """Why a weight of a layout that can be held has numbers that cannot; an empty string if it has none.

    Args:
        weight: The weight.
        dtype: The dtype that its scales are to have.
        least: What zero-points are stored less, so that the largest one is that much larger.
    """
    if not torch.equal(weight.scales.to(dtype).float(), weight.scales):
        return f"its scales are not exact in {dtype}. Use --dtype float32"
    top = int(zero_points(weight).max())
    if top >= 2**weight.format.bits + least:
        return f"it has a zero-point of {top}, which {weight.format.bits} bits do not hold. Use --format hf"
    return ""


def rounds_otherwise(weight: QuantWeight) -> str:
    """Why a product may round otherwise than in the stored form, by the numbers; an empty string if it does not."""
    scales = weight.scales
    short = (scales.half().float() == scales) | (scales.bfloat16().float() == scales)
    return "" if bool(short.all()) else ORDER.format(name=weight.layout.storage.scales)


def zero_points(weight: QuantWeight) -> Tensor:
    """The zero-point of each group, uint8 `[out, groups]`; the middle of the codes, if the weight is symmetric."""
    if weight.format.zero == "integer":
        return weight.tensors["offsets"]
    layout, middle = weight.layout, 2 ** (weight.format.bits - 1)
    return torch.full((layout.out, layout.groups), middle, dtype=torch.uint8, device=weight.packed.device)
