"""What formats have in common whose groups have an offset of floats, stored as it is or as a zero-point of floats.

Engines know some sizes of groups alone. A group of another size is written as several of one that they know, each with
the scale and the offset of the whole: the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from quadapt.errors import ExportError
from quadapt.exporters import integers
from quadapt.hf.stored_form import stacks_of
from quadapt.model.linear_form import turned
from quadapt.quant.weight import Layout, QuantWeight


def why_not_layout(layout: Layout, format: str, *, bits: Sequence[int], sizes: Sequence[int] | None) -> str:
    """Why a format cannot hold weights of a layout, whatever their numbers; an empty string if it can.

    Args:
        layout: The layout.
        format: The name of the format.
        bits: The widths of codes that it knows.
        sizes: The sizes of groups that it knows; None if it knows all.
    """
    grid, width = layout.format, layout.format.width(layout.columns)
    if grid.levels != "int":
        return f"{grid.name} has levels that {format} cannot hold, which knows integers. Use --format gguf or hf"
    if grid.bits not in bits:
        return f"{grid.name} has codes of {grid.bits} bits, and {format} knows {_or(bits)}. Use --format gguf or mlx"
    if layout.permuted:
        return f"its inputs are permuted, which {format} does not know. Use --format gptq or hf"
    if size_of(layout, sizes):
        return ""
    known = f"groups of {_or(sizes)}" if sizes else "groups of 16, 32, 48, .. inputs"
    return (
        f"has groups of {width} in rows of {layout.columns} inputs, and {format} knows {known} that fill rows. Use "
        "another --group-size, or --format gguf"
    )


def size_of(layout: Layout, sizes: Sequence[int] | None) -> int:
    """The largest size of groups that an engine knows, and of which all groups of a layout consist; 0 if none is.

    Args:
        layout: The layout.
        sizes: The sizes that it knows; None if it knows all multiples of 16, and whole rows.
    """
    width = layout.format.width(layout.columns)
    short = layout.columns % width
    if sizes is None:
        size = gcd(width, short)
        return size if size % 16 == 0 or size == layout.columns else 0
    return max((size for size in sizes if width % size == 0 and short % size == 0), default=0)


def by_size(values: Tensor, layout: Layout, size: int) -> Tensor:
    """Numbers of the groups of a layout, `[out, groups]`, as those of groups of another size, `[out, in / size]`."""
    starts = torch.arange(0, layout.columns, size, device=values.device)
    return values[:, starts // layout.format.width(layout.columns)]


def offsets_of(weight: QuantWeight) -> Tensor:
    """The offset of each group of a weight of integers, float32 `[out, groups]`."""
    offsets = weight.offsets
    assert offsets is not None, "integers have offsets, stored or implied"
    return offsets


def zero_points(weight: QuantWeight) -> Tensor:
    """The offset of each group in steps below zero, so that a weight is `scale * (code - zero-point)`.

    Whole zero-points and the middle of symmetric codes are exact. Those of float offsets are quotients: there is none
    where a scale is zero and the offset is all of the group, and the zero-point is infinite.

    Args:
        weight: A weight of integers.

    Returns:
        float64 `[out, groups]`.
    """
    if weight.format.zero == "float":
        offsets = offsets_of(weight).double()
        return torch.where(offsets == 0, offsets, -offsets / weight.scales.double())
    return integers.zero_points(weight).double()


def why_not_zeros(weight: QuantWeight) -> str:
    """Why the offsets of a weight cannot be zero-points of floats; an empty string if they can."""
    if bool(torch.isfinite(zero_points(weight)).all()):
        return ""
    return "it has a scale of zero with an offset, which zero-points cannot say. Use --format gguf or mlx"


def why_not_in_steps(weight: QuantWeight, floats: torch.dtype) -> str:
    """Why a format with scales of `floats`, and zero-points, whole ones or floats, cannot hold the numbers of a weight.

    An empty string if it can.
    """
    if weight.format.zero != "float":
        return integers.why_not(weight, floats)
    if not torch.equal(weight.scales.to(floats).float(), weight.scales):
        return f"its scales are not exact in {str(floats).removeprefix('torch.')}. Use --dtype float32"
    return why_not_zeros(weight)


def refuse_linear_form(model: Any, reader: str) -> None:
    """Raise ExportError if a model has matrices that are no linear layers in transformers, which a reader expects."""
    stacks = next(stacks_of(model), None)
    if turned(model) or stacks is not None:
        name, kind = (turned(model)[0], "a Conv1D") if stacks is None else (stacks.path, "a stack of experts")
        raise ExportError(f"{name}: is {kind} in transformers, of which {reader} reads no codes. Use --format hf")


def why_not_floats(layout: Layout, dtype: torch.dtype) -> str:
    """Why scales and offsets of a layout may not be held in a dtype; an empty string if it holds them all."""
    scales, offsets = layout.storage.of_scales, layout.storage.of_offsets
    exact = scales.exact_in(dtype) and offsets.exact_in(dtype)
    if layout.format.zero == "integer":  # the offset is a product of the scale and the zero-point
        exact = dtype == torch.float32
    return "" if exact else _INEXACT.format(dtype=str(dtype).removeprefix("torch."))


def why_not_numbers(weight: QuantWeight, dtype: torch.dtype) -> str:
    """Why the scales and offsets of a weight cannot be held in a dtype; an empty string if it holds them."""
    held = (torch.equal(each.to(dtype).float(), each) for each in (weight.scales, offsets_of(weight)))
    return (
        "" if all(held) else _INEXACT.format(dtype=str(dtype).removeprefix("torch.")).replace("may not be", "are not")
    )


_INEXACT = "its scales and offsets may not be exact in {dtype}. Use --dtype float32"


def _or(numbers: Sequence[int]) -> str:
    """Numbers in words: 2, 4 and 8."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
