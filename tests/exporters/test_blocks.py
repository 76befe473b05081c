"""GGML's blocks: bit for bit the weights that they are made of, as the `gguf` package reads them; or said why not."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from quadapt.exporters.blocks import BLOCKS, block_for, blocks_of, cannot_hold, cannot_hold_layout
from quadapt.quant.format import Format, Zero
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight


def weight(format: Format, columns: int = 128, storage: Storage | None = None) -> QuantWeight:
    torch.manual_seed(0)
    layout = Layout(format=format, storage=storage or Storage.default(format), out=48, columns=columns)
    return Nearest()(torch.randn(48, columns), layout)


HELD: list[tuple[str, int, Zero]] = [
    *(("Q4_0", bits, "none") for bits in (2, 3, 4)),
    *(("Q4_1", bits, "float") for bits in (2, 3, 4)),
    ("IQ4_NL", 4, "none"),
    ("Q5_0", 5, "none"),
    ("Q5_1", 5, "float"),
    *(("Q8_0", bits, "none") for bits in (6, 8)),
]
"""Types of blocks, and what they hold."""


def read(stored: QuantWeight) -> np.ndarray:
    """A weight's blocks as the `gguf` package reads them."""
    block = block_for(stored.format)
    assert block is not None
    rows = blocks_of(stored)
    assert rows.shape[1] * 8 == block.bits_per_weight * stored.layout.columns
    return dequantize(rows, gguf.GGMLQuantizationType[block.name])


@pytest.mark.parametrize("group_size", [32, 64, 96, -1])
@pytest.mark.parametrize(("block", "bits", "zero"), HELD)
def test_blocks_are_the_weight_bit_for_bit(block: str, bits: int, zero: Zero, group_size: int) -> None:
    halves = Storage(scales="fp16", offsets="absent" if zero == "none" else "fp16")
    levels = "iq4-nl" if block == "IQ4_NL" else "int"
    stored = weight(Format(levels=levels, bits=bits, group_size=group_size, zero=zero), storage=halves)
    assert cannot_hold(stored) == cannot_hold_layout(stored.layout) == ""
    assert block_for(stored.format).name == block
    assert len(stored.codes().unique()) > 0.9 * 2**bits  # about all of them are tried
    np.testing.assert_array_equal(read(stored), stored.dequantize().numpy(), strict=True)


BLOCK = re.compile(r"\| (Q|IQ)\d_(\d|NL) \|")
"""A row of the page's table of blocks."""


def test_the_page_about_exports_lists_the_blocks() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "export.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if BLOCK.match(line)]
    assert [(name, float(bits)) for name, _, bits in rows] == [(each.name, each.bits_per_weight) for each in BLOCKS]
    for (_, codes, _), block in zip(rows, BLOCKS, strict=True):
        widths = [bits for name, bits, _ in HELD if name == block.name]
        if block.name == "IQ4_NL":
            assert codes == "of levels `iq4-nl`, without offsets, of 4 bits"
            continue
        assert codes.startswith("with offsets" if block.shifted else "symmetric")
        assert codes.endswith(f"of {' or '.join(', '.join(map(str, widths)).rsplit(', ', 1))} bits")


def test_blocks_are_made_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = weight(Format(bits=3, group_size=32))
    whole = blocks_of(stored)
    monkeypatch.setattr("quadapt.exporters.blocks.rows_per_chunk", lambda _: 7)
    np.testing.assert_array_equal(blocks_of(stored), whole)


NOT_HELD = [
    (weight(Format(levels="nf", bits=4)), "not evenly spaced"),
    (weight(Format(levels="nf", bits=4)), "--quant-type iq4-nl has those of IQ4_NL"),
    (weight(Format(levels="iq4-nl", bits=4, zero="float")), "iq4-nl-shift-g32 has offsets, and IQ4_NL none"),
    (weight(Format(bits=8)), "8-bit codes with offsets fit no block (without offsets they do: --zero none)"),
    (weight(Format(bits=6, zero="integer")), "6-bit codes with offsets"),
    (weight(Format(bits=8, zero="none"), storage=Storage(scales="fp32", offsets="absent")), "scales (fp32)"),
    (weight(Format(bits=4, group_size=16)), "groups of 16"),
    (weight(Format(bits=4), columns=172), "172 inputs"),
    (weight(Format(bits=4, group_size=-1), columns=172), "172 inputs"),
    (weight(Format(bits=4, zero="integer")), "offsets (integer)"),
    (weight(Format(bits=4), storage=Storage(scales="fp32", offsets="fp32")), "scales (fp32)"),
    (weight(Format(bits=4), storage=Storage(scales="double", offsets="fp16")), "scales (double)"),
    (weight(Format(bits=4)).with_offsets(torch.full((48, 4), 1e-9), "fp32"), "offsets (fp32)"),
]


@pytest.mark.parametrize(("stored", "why"), NOT_HELD, ids=[why for _, why in NOT_HELD])
def test_says_what_blocks_cannot_hold(stored: QuantWeight, why: str) -> None:
    assert why in cannot_hold(stored)
    assert why.replace("integer", "zero-points times scales") in cannot_hold_layout(stored.layout)


def test_fp32_scales_that_float16_holds_are_held() -> None:
    layout = Layout(format=Format(bits=4), storage=Storage(scales="fp32", offsets="fp32"), out=4, columns=32)
    codes = torch.arange(64, dtype=torch.uint8).view(4, 16)
    stored = QuantWeight.build(layout, codes, torch.full((4, 1), 0.5), torch.ones(4, 1))
    assert cannot_hold(stored) == ""
    np.testing.assert_array_equal(read(stored), stored.dequantize().numpy())
