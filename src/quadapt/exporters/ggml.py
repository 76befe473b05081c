"""Which of GGML's types hold a quantized matrix: plain blocks (`blocks.py`), or super-blocks (`super_blocks.py`).

A matrix may have more than one form that means the same numbers (`ggml_forms.py`): whole zero-points can be taken off
the codes, which then lie about zero and need no offset. Each form that fits a type is a way to hold the matrix. Of the
exact ways the smallest is taken, or, if speed counts more, a type whose products llama.cpp has faster kernels for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from quadapt.exporters import ggml_forms as forms
from quadapt.exporters.blocks import (
    BLOCKS,
    Block,
    block_for,
    blocks_of,
    cannot_hold,
    cannot_hold_layout,
    shape_objection,
)
from quadapt.exporters.ggml_forms import Moved
from quadapt.exporters.super_blocks import (
    SUPER_BLOCKS,
    cannot_hold_in_super_blocks,
    super_block_for,
    super_blocks_of,
)
from quadapt.quant.weight import Layout, QuantWeight

BY_NAME: dict[str, Block] = {block.name: block for block in (*SUPER_BLOCKS, *BLOCKS)}
"""All types that are written, by GGML's names for them."""

Choice = Literal["auto", "fast"]
"""How a type is chosen. auto: the smallest that holds the same numbers. fast: one whose products are fast, which keeps
codes and may round scales and offsets."""

ASIDE = "codes as they are, offsets in a file beside it"
"""What is done where a type without offsets holds codes that have some."""

_SLOW = ("Q4_1", "Q5_0", "Q5_1")
"""Types whose products llama.cpp computes a row at a time, where it has kernels for several rows of the others."""

_QUICK = {2: "Q2_K", 3: "Q4_K", 4: "Q4_K", 5: "Q5_K"}
"""The type with offsets whose products are fastest, by the width of codes."""


@dataclass(frozen=True)
class Change:
    """What is done to the numbers of a matrix to hold it in blocks."""

    words: str
    """What is done, in words."""

    moved: Moved
    """How far weights move by it."""

    def __str__(self) -> str:
        return f"{self.words}: {self.moved}"


@dataclass(frozen=True)
class Held:
    """A way to hold a matrix in blocks of one type."""

    block: Block
    """The type of the blocks, one of GGML's."""

    weight: QuantWeight
    """What is written: a matrix of the very form that the type has."""

    aside: Tensor | None = None
    """Offsets that the type has no room for, float32 `[out, groups]`: a LoRA in a file of its own adds them."""

    change: Change | None = None
    """What is done to the numbers; None if they are the same, bit for bit."""


def ways(weight: QuantWeight, choice: Choice = "auto") -> list[Held]:
    """All ways to hold a matrix in blocks, the best first; none if there is no such type."""
    exact = sorted(_exact(weight), key=lambda held: held.block.bits_per_weight)
    if choice == "auto" or (exact and exact[0].block.name not in _SLOW and exact[0].aside is None):
        return exact
    names = {held.block.name for held in exact}
    return [*(held for held in _fast(weight) if held.block.name not in names), *exact]


def _exact(weight: QuantWeight) -> Iterator[Held]:
    """The ways to hold the same numbers."""
    if super_block_for(weight.layout) is not None:
        if not why_not_itself(weight):
            yield Held(type_for(weight.layout), weight)  # type: ignore[arg-type]
        return
    for form in (weight, *forms.without_zero_points(weight)):
        if not cannot_hold(form):
            yield Held(block_for(form.format), form)  # type: ignore[arg-type]
    if forms.fits_with_offsets_aside(weight.layout) and forms.exact_in_half(weight.scales):
        yield _aside(weight)


def _aside(weight: QuantWeight) -> Held:
    form, offsets = forms.with_offsets_aside(weight)
    return Held(BY_NAME["Q8_0"], form, offsets, Change(ASIDE, forms.moved(weight, form, offsets)))


def _fast(weight: QuantWeight) -> Iterator[Held]:
    """Ways in which products are fast, and codes are kept; scales and offsets may be rounded."""
    if shape_objection(weight.layout) or super_block_for(weight.layout) is not None:
        return
    quick = next((each for each in SUPER_BLOCKS if each.name == _QUICK.get(weight.format.bits)), None)
    whole = weight.format.levels == "int"
    if whole and quick is not None and weight.layout.storage.of_offsets.zero != "none":
        found = forms.in_super_blocks(weight, quick.scales, quick.bits)
        if found is not None:
            form, words, distance = found
            yield Held(quick, form, change=Change(words, distance))
    elif forms.fits_with_offsets_aside(weight.layout):
        yield _aside(weight)
    rounded = forms.in_halves(weight)
    block = block_for(rounded.format)
    if block is not None:
        words = "codes as they are, scales and offsets rounded to float16"
        yield Held(block, rounded, change=Change(words, forms.moved(weight, rounded)))


def type_for(layout: Layout) -> Block | None:
    """The type for matrices of a layout as it is; None if there is none, whatever their numbers."""
    return super_block_for(layout) or block_for(layout.format)


def why_not_itself(weight: QuantWeight) -> str:
    """Why no type can hold a matrix in its own form bit for bit; an empty string if one can."""
    return cannot_hold_in_super_blocks(weight.layout) if super_block_for(weight.layout) else cannot_hold(weight)


def why_not(weight: QuantWeight) -> str:
    """Why no type can hold the same numbers; an empty string if one can."""
    return "" if any(not held.change for held in ways(weight)) else why_not_itself(weight)


def why_not_layout(layout: Layout) -> str:
    """Why no type can hold matrices of a layout bit for bit, or may not; an empty string if one can."""
    if super_block_for(layout) is not None:
        return cannot_hold_in_super_blocks(layout)
    without = forms.layout_without_zero_points(layout)
    return cannot_hold_layout(layout if without is None else without)


def bytes_of(weight: QuantWeight) -> np.ndarray:
    """A matrix for which :func:`why_not_itself` has no objection, in the type that :func:`type_for` names.

    Returns:
        uint8 `[out, bytes of a row]`.
    """
    return super_blocks_of(weight) if super_block_for(weight.layout) else blocks_of(weight)
