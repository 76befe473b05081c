"""GGML's K-quants, written straight from the codes of weights and from those of scales and offsets.

A super-block holds 256 weights of a row in eight groups of 32, or sixteen of 16. Our storages of super-blocks hold the
very numbers of such a block (`quant/storage/super_block.py`), so that only bytes change places here.

Codes of weights are cut into planes of two, four or one bits. In a plane, a byte holds weights that lie a run apart: a
plane of four bits has runs of 32 (in Q6_K 64) weights, one of two bits four runs of 32, one of single bits eight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quadapt.exporters.blocks import Block, codes_of
from quadapt.kernels import unpack
from quadapt.kernels.reference import rows_per_chunk
from quadapt.quant.storage.super_block import SUPER_BLOCK
from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True)
class SuperBlockType(Block):
    """One of GGML's types of super-blocks."""

    scales: str
    """The name of the storage whose scales it holds."""

    size: int
    """How many bytes a super-block takes."""

    lay_out: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, ...]]
    """Puts the bytes of a block in their order: given the tensors of :func:`_numbers` and codes, gives parts."""

    weights: int = field(default=SUPER_BLOCK, kw_only=True)

    @property
    def nbytes(self) -> int:
        return self.size


def _planes(codes: Tensor, bits: int, run: int = 32) -> Tensor:
    """Bytes `[.., 256 * bits / 8]` of a plane: `8 / bits` weights of `codes [.., 256]`, each `run` apart, in a byte."""
    each = 8 // bits
    runs = (codes & (2**bits - 1)).unflatten(-1, (-1, each, run))
    shifts = bits * torch.arange(each, dtype=torch.uint8)
    return (runs << shifts[:, None]).sum(-2, dtype=torch.uint8).flatten(-2)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """The codes of eight scales and of eight offsets, six bits each, as twelve bytes."""
    (low, high), (low_min, high_min) = (each.unflatten(-1, (2, 4)).unbind(-2) for each in (scales, minima))
    return torch.cat((low | high >> 4 << 6, low_min | high_min >> 4 << 6, high & 15 | high_min << 4), -1)


def _q4_k(numbers: dict[str, Tensor], codes: Tensor) -> tuple[Tensor, ...]:
    heads = numbers["scales_constant"], numbers["offsets_constant"], _six_bits(numbers["scales"], numbers["offsets"])
    return *heads, _planes(codes, 4)


def _q5_k(numbers: dict[str, Tensor], codes: Tensor) -> tuple[Tensor, ...]:
    *heads, low = _q4_k(numbers, codes)
    return *heads, _planes(codes >> 4, 1), low


def _q2_k(numbers: dict[str, Tensor], codes: Tensor) -> tuple[Tensor, ...]:
    both = numbers["scales"] | numbers["offsets"] << 4
    return both, _planes(codes, 2), numbers["scales_constant"], numbers["offsets_constant"]


def _q3_k(numbers: dict[str, Tensor], codes: Tensor) -> tuple[Tensor, ...]:
    first, last = numbers["scales"].unflatten(-1, (2, 8)).unbind(-2)
    high = (numbers["scales"] >> 4).unflatten(-1, (4, 4)) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    scales = torch.cat((first & 15 | last << 4, high.sum(-2, dtype=torch.uint8)), -1)
    return _planes(codes >> 2, 1), _planes(codes, 2), scales, numbers["scales_constant"]


def _q6_k(numbers: dict[str, Tensor], codes: Tensor) -> tuple[Tensor, ...]:
    signed = numbers["scales"] ^ 128  # to signed bytes: less the middle
    return _planes(codes, 4, run=64), _planes(codes >> 4, 2), signed, numbers["scales_constant"]


SUPER_BLOCKS = (
    SuperBlockType("Q2_K", 2, True, "2-bit codes in super-blocks", "q2_k", 84, _q2_k),
    SuperBlockType("Q3_K", 3, False, "symmetric 3-bit codes in super-blocks", "q3_k", 110, _q3_k, file_type="Q3_K_S"),
    SuperBlockType("Q4_K", 4, True, "4-bit codes in super-blocks", "q4_k", 144, _q4_k, file_type="Q4_K_S"),
    SuperBlockType("Q5_K", 5, True, "5-bit codes in super-blocks", "q4_k", 176, _q5_k, file_type="Q5_K_S"),
    SuperBlockType("Q6_K", 6, False, "symmetric 6-bit codes in super-blocks", "q6_k", 210, _q6_k),
)
"""The types of super-blocks, smallest first."""


def super_block_for(layout: Layout) -> SuperBlockType | None:
    """The type whose scales and offsets are held as those of a layout are; None if there is none."""
    storage, bits = layout.storage, layout.format.bits
    beside = storage.of_offsets.implied or storage.offsets == storage.of_scales.beside
    fitting = (each for each in SUPER_BLOCKS if each.scales == storage.scales and each.bits == bits and beside)
    return next(fitting, None)


def cannot_hold_in_super_blocks(layout: Layout) -> str:
    """Why weights of a layout that names such a type do not fit it; an empty string if they do."""
    if layout.permuted:
        return "its inputs are permuted"
    if layout.columns % SUPER_BLOCK:
        return f"{layout.columns} inputs are not a multiple of {SUPER_BLOCK}"
    return ""


def super_blocks_of(weight: QuantWeight) -> np.ndarray:
    """The super-blocks of a weight that fits the type which :func:`super_block_for` names.

    Returns:
        uint8 `[out, in / 256 * block.nbytes]`; a row of the matrix is a row here.
    """
    layout, block = weight.layout, super_block_for(weight.layout)
    assert block is not None
    numbers, count = _numbers(weight), layout.columns // SUPER_BLOCK
    result = torch.empty(layout.out, count, block.nbytes, dtype=torch.uint8)
    step = rows_per_chunk(layout.columns)
    for start in range(0, layout.out, step):
        rows = slice(start, start + step)
        codes = codes_of(weight.packed[rows], weight).cpu().unflatten(1, (-1, SUPER_BLOCK))
        result[rows] = torch.cat(block.lay_out({name: each[rows] for name, each in numbers.items()}, codes), -1)
    return result.flatten(1).numpy()


def _numbers(weight: QuantWeight) -> dict[str, Tensor]:
    """The codes of scales and offsets, uint8 `[out, super-blocks, groups]`, and their constants, `[.., 2]`."""
    layout, found = weight.layout, dict[str, Tensor]()
    count = layout.columns // SUPER_BLOCK
    for name in ("scales", "offsets"):
        storage = layout.storage.of(name)
        if not storage.implied:
            codes = unpack(weight.tensors[name], storage.bits, layout.groups)  # type: ignore[attr-defined]
            found[name] = codes.cpu().unflatten(1, (count, -1))
            found[f"{name}_constant"] = weight.tensors[f"{name}_constant"].cpu().unflatten(1, (count, 2))
    return found
