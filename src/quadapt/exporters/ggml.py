"""Which of GGML's types holds a quantized matrix: one of its plain blocks (`blocks.py`), or of super-blocks."""

from __future__ import annotations

import numpy as np

from quadapt.exporters.blocks import BLOCKS, Block, block_for, blocks_of, cannot_hold, cannot_hold_layout
from quadapt.exporters.super_blocks import (
    SUPER_BLOCKS,
    cannot_hold_in_super_blocks,
    super_block_for,
    super_blocks_of,
)
from quadapt.quant.weight import Layout, QuantWeight

BY_NAME: dict[str, Block] = {block.name: block for block in (*SUPER_BLOCKS, *BLOCKS)}
"""All types that are written, by GGML's names for them."""


def type_for(layout: Layout) -> Block | None:
    """The type for matrices of a layout; None if there is none, whatever their numbers."""
    return super_block_for(layout) or block_for(layout.format)


def why_not(weight: QuantWeight) -> str:
    """Why no type can hold a matrix bit for bit; an empty string if one can."""
    return cannot_hold_in_super_blocks(weight.layout) if super_block_for(weight.layout) else cannot_hold(weight)


def why_not_layout(layout: Layout) -> str:
    """Why no type can hold matrices of a layout bit for bit, or may not; an empty string if one can."""
    return cannot_hold_in_super_blocks(layout) if super_block_for(layout) else cannot_hold_layout(layout)


def bytes_of(weight: QuantWeight) -> np.ndarray:
    """A matrix for which :func:`why_not` has no objection, in the type that :func:`type_for` names.

    Returns:
        uint8 `[out, bytes of a row]`.
    """
    return super_blocks_of(weight) if super_block_for(weight.layout) else blocks_of(weight)
