"""GGML's blocks: bit for bit the numbers that the gguf package dequantizes, whatever the bytes are."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from quadapt.importers.ggml import BLOCKS

OUT, COLUMNS = 24, 768

HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "IQ4_NL": (0,),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where a block has its float16 numbers."""


def any_bytes(kind: str) -> np.ndarray:
    """Rows of blocks of random bytes, with sensible float16 numbers; some of them are zero, and so are some codes."""
    rng = np.random.default_rng(0)
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (OUT, COLUMNS // BLOCKS[kind].weights, size), dtype=np.uint8)
    blocks[1] = 0
    blocks[2, 0, : size // 2] = 0
    for at in HALVES[kind]:
        numbers = rng.normal(size=blocks.shape[:2]).astype(np.float16)
        numbers[3] = 0
        blocks[..., at : at + 2] = numbers[..., None].view(np.uint8)
    return blocks.reshape(OUT, -1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_all_bytes_mean_the_numbers_that_the_library_reads(kind: str) -> None:
    rows = any_bytes(kind)
    weight = BLOCKS[kind].weight(torch.from_numpy(rows), BLOCKS[kind].layout(OUT, COLUMNS))
    want = torch.from_numpy(dequantize(rows, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(weight.dequantize(), want)
    assert bool((weight.scales != 0).all()) or kind == "IQ4_NL"  # which has no level of zero


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_library_quantizes(kind: str) -> None:
    W = np.random.default_rng(0).normal(size=(OUT, COLUMNS)).astype(np.float32)
    rows = quantize(W, gguf.GGMLQuantizationType[kind])
    weight = BLOCKS[kind].weight(torch.from_numpy(rows), BLOCKS[kind].layout(OUT, COLUMNS))
    assert torch.equal(weight.dequantize(), torch.from_numpy(dequantize(rows, gguf.GGMLQuantizationType[kind])))


@pytest.mark.parametrize("kind", BLOCKS)
def test_they_are_written_again_as_they_were(kind: str) -> None:
    """Where no scale is zero, what our own export writes are the bytes that were read."""
    from quadapt.exporters.ggml import bytes_of, type_for, why_not

    torch.manual_seed(0)
    layout = BLOCKS[kind].layout(OUT, COLUMNS)
    from quadapt.quant.rounding import Nearest

    weight = Nearest()(torch.randn(OUT, COLUMNS), layout)
    block = type_for(layout)
    assert block is not None
    assert (block.name, why_not(weight)) == (kind, "")
    again = BLOCKS[kind].weight(torch.from_numpy(bytes_of(weight)), layout)
    assert again.digest() == weight.digest()
