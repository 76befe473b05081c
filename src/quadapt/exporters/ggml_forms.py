"""Forms of a quantized matrix that GGML has types for: with the same numbers, or with scales and offsets rounded.

Codes are kept by all of them but one. Whole zero-points go into the codes: `s * q - s * z` is `s * (q - z)`, exactly
where scales are float16, and `q - z` lies about zero. What is left of a step after scales or offsets have been rounded
is measured against the steps of the matrix, and said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from quadapt.exporters.blocks import codes_of, shape_objection
from quadapt.kernels import expand, pack
from quadapt.kernels.reference import rows_per_chunk
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.storage.super_block import SUPER_BLOCK
from quadapt.quant.weight import Layout, QuantWeight

_SYMMETRIC = (4, 5, 8)
"""The widths of codes without offsets for which there is a type."""


class Moved(NamedTuple):
    """How far the weights of a matrix have moved, in its own steps."""

    mean: float
    """The root of the mean square of all distances."""

    most: float
    """The largest distance of all weights."""

    def __str__(self) -> str:
        return f"weights move by {self.mean:.4f} of a step (root mean square), {self.most:.3f} at most"


def moved(weight: QuantWeight, form: QuantWeight, aside: Tensor | None = None) -> Moved:
    """How far the weights of a form are from those of a matrix, in steps of the matrix.

    Args:
        weight: The matrix.
        form: One of the same shape, and the same order of inputs.
        aside: Offsets that are added to the form, float32 `[out, groups]`.
    """
    layout, sum_, most = weight.layout, 0.0, 0.0
    before, after, scales = weight.dequantize(), form.dequantize(), weight.scales.abs()
    width = layout.format.width(layout.columns)
    for start in range(0, layout.out, rows_per_chunk(layout.columns)):
        rows = slice(start, start + rows_per_chunk(layout.columns))
        found = after[rows].double()
        if aside is not None:
            found = found + expand(aside[rows].double(), width, layout.columns)
        steps = expand(scales[rows].double(), width, layout.columns)
        apart = torch.where(steps > 0, (found - before[rows].double()) / steps, 0).abs()
        sum_, most = sum_ + float(apart.square().sum()), max(most, float(apart.max()))
    return Moved((sum_ / (layout.out * layout.columns)) ** 0.5, most)


def exact_in_half(values: Tensor) -> bool:
    """Whether float16 holds all of some numbers as they are."""
    half = values.half()
    return bool((half.float() == values).all() & torch.isfinite(half).all())


def layout_without_zero_points(layout: Layout) -> Layout | None:
    """The layout of a matrix whose codes have absorbed whole zero-points; None if it has none, or no type fits then."""
    if layout.format.zero != "integer" or layout.format.bits > 6:
        return None
    widths = (each for each in _SYMMETRIC if each > layout.format.bits)
    return _symmetric(layout, next(widths))


def _symmetric(layout: Layout, bits: int) -> Layout:
    format = replace(layout.format, bits=bits, zero="none")
    return replace(layout, format=format, storage=replace(layout.storage, offsets="absent"))


def without_zero_points(weight: QuantWeight) -> Iterator[QuantWeight]:
    """Take whole zero-points off the codes of a matrix: it is the same, in as many bits as that needs, and in more.

    The numbers are the same, bit for bit, where float16 holds all scales.
    """
    if weight.format.zero != "integer" or shape_objection(weight.layout):
        return
    layout = weight.layout
    codes = codes_of(weight.packed, weight).to(torch.int16)
    zeros = weight.layout.storage.of_offsets.decode({"": weight.tensors["offsets"]}, (layout.out, layout.groups))
    codes -= expand(zeros.to(torch.int16), weight.format.width(layout.columns), layout.columns)
    low, high = int(codes.min()), int(codes.max())
    for bits in _SYMMETRIC:
        if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1):
            packed = pack((codes + 2 ** (bits - 1)).to(torch.uint8), bits)
            yield QuantWeight.build(_symmetric(layout, bits), packed, weight.scales, None)


def fits_with_offsets_aside(layout: Layout) -> bool:
    """Whether codes have more bits than any type with offsets, and fit the one of eight bits without."""
    wide = layout.format.bits > 5 and layout.format.zero != "none"
    return wide and not shape_objection(layout)


def with_offsets_aside(weight: QuantWeight) -> tuple[QuantWeight, Tensor]:
    """A matrix in eight bits without offsets, its scales in float16, and what must be added to each group of it.

    Returns:
        The matrix, and float32 `[out, groups]`: the offsets, plus what the middle of the codes stands for. A scale that
        float16 rounds is made up for at the mean code of its group.
    """
    assert weight.offsets is not None
    layout = _with_halves(_symmetric(weight.layout, 8))
    codes = codes_of(weight.packed, weight)
    middle = 2 ** (weight.format.bits - 1)
    form = QuantWeight.build(layout, pack(codes + (128 - middle), 8), weight.scales, None)
    means = _means(codes, layout.format.width(layout.columns))
    lost = (weight.scales.double() - form.scales.double()) * (means - middle)
    return form, (weight.offsets.double() + weight.scales.double() * middle + lost).float()


def in_halves(weight: QuantWeight) -> QuantWeight:
    """A matrix with scales and offsets rounded to float16; a rounded scale is made up for at its group's mean code."""
    layout = _with_halves(weight.layout)
    if weight.offsets is None or weight.format.zero == "none":
        return QuantWeight.build(layout, weight.packed, weight.scales, None)
    width = layout.format.width(layout.columns)
    means = _means(codes_of(weight.packed, weight), width)
    rounded = layout.storage.of_scales.through(weight.scales, centre=True)
    offsets = weight.offsets.double() + (weight.scales.double() - rounded.double()) * means
    layout = replace(layout, format=replace(layout.format, zero="float"))
    return QuantWeight.build(layout, weight.packed, weight.scales, offsets.float())


def _with_halves(layout: Layout) -> Layout:
    zero = layout.format.zero
    return replace(layout, storage=Storage.floating("fp16", "float" if zero == "integer" else zero))


def in_super_blocks(weight: QuantWeight, scales: str, bits: int) -> tuple[QuantWeight, str, Moved] | None:
    """A matrix with offsets in super-blocks, what was done, and how far it moves weights; None if its rows do not fit.

    Codes are kept, and scales and offsets rounded to what super-blocks hold; or all is quantized anew, if that moves
    weights less: where offsets are positive, which super-blocks have not, it does.

    Args:
        weight: A matrix of integers with offsets.
        scales: The name of the storage of the scales.
        bits: The width of the type's codes, at least that of the matrix.
    """
    storage, format = Storage.floating(scales, "float"), weight.format
    size = int(storage.of_scales.demands["group_size"])
    layout = Layout(
        format=Format(bits=bits, group_size=size), storage=storage, out=weight.layout.out, columns=weight.layout.columns
    )
    if layout.columns % SUPER_BLOCK or format.width(layout.columns) % size:
        return None
    found = []
    anew = Nearest(range="least-squares")(weight.dequantize(), layout)
    for words, form in (
        ("codes as they are, scales and offsets rounded", _kept(weight, layout)),
        ("quantized anew, which moves less than keeping codes", anew),
    ):
        found.append((form, words, moved(weight, form)))
    return min(found, key=lambda each: each[2].mean)


def _kept(weight: QuantWeight, layout: Layout) -> QuantWeight:
    """The codes of a matrix with its scales and offsets as another layout of smaller groups holds them."""
    assert weight.offsets is not None
    codes, size = codes_of(weight.packed, weight), layout.format.group_size
    repeat = weight.format.width(layout.columns) // size
    scales, offsets = (expand(each, repeat, layout.groups) for each in (weight.scales, weight.offsets))
    rounded = layout.storage.of_scales.through(scales, centre=True)
    offsets = offsets.double() + (scales.double() - rounded.double()) * _means(codes, size)
    return QuantWeight.build(layout, pack(codes, layout.format.bits), scales, offsets.float())


def _means(codes: Tensor, width: int) -> Tensor:
    """The mean code of each group of `width`, float64 `[out, groups]`; the last group may be shorter."""
    lacks = -codes.shape[1] % width
    sums = torch.nn.functional.pad(codes, (0, lacks)).unflatten(1, (-1, width)).sum(-1, dtype=torch.int64).double()
    sizes = torch.full((sums.shape[1],), float(width), dtype=torch.float64)
    sizes[-1] -= lacks
    return sums / sizes.to(sums.device)
