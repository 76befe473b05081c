"""The ways to hold a matrix that a plan chooses among, and what each costs in bits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product, starmap

from quadapt.errors import ConfigError
from quadapt.methods import Method
from quadapt.quant.format import Format
from quadapt.quant.storage import Linear, Storage
from quadapt.quant.weight import Layout
from quadapt.widths import INTEGER_WIDTHS, NORMAL_FLOAT_WIDTHS

NF_GROUPS = (16, 32, 64)
"""Weights that share a scale, for NormalFloat (LQ-LoRA's B0)."""

INT_GROUPS = (16, 32, 64, 128)
"""Inputs that share a scale, for integers."""

SCALES = tuple(starmap(Linear, product(NORMAL_FLOAT_WIDTHS, (16, 64, 256), ("fp16", "fp32"))))
"""How scales are held, for NormalFloat (LQ-LoRA's b0, B1 and b1)."""

ADAPTER_BITS = {"fp16": Fraction(16), "nf8": 8 + Fraction(8, 64) + Fraction(32, 64 * 256)}
"""Bits of an adapter's weight: as 16-bit floats, or as NF8 with LQ-LoRA's 8-bit scales (8.127), as in its section 4.3.
"""


@dataclass(frozen=True)
class Candidate:
    """One way to hold a matrix, with its grid and its storage."""

    format: Format
    """The grid: which values a weight may take."""

    storage: Storage
    """How scales and offsets are held."""

    def layout(self, out: int, columns: int) -> Layout:
        """Layout of a matrix held so."""
        return Layout(format=self.format, storage=self.storage, out=out, columns=columns)


def candidates(method: Method) -> list[Candidate]:
    """The ways among which a plan for `method` chooses.

    NormalFloat: LQ-LoRA's grid, 4 widths of codes, 3 groups, and for scales 4 widths, 3 blocks and 2 constants.
    Integers: 6 widths and 4 groups, with the method's own zero and storage; the widest also with fp32 scales, for
    matrices whose scales fp16 cannot hold.

    Source: LQ-LoRA (arXiv 2311.12023) section 3.2 and its code, whose 432 have a third kind of constant, bfloat16.
    Differs: that kind costs what fp16 does and is coarser, so these are 288.

    Raises:
        ConfigError: The method has one grid for a reason, and cannot take a plan.
    """
    check_plannable(method)
    if method.format.levels == "int":
        grids = [
            method.with_format(replace(method.format, bits=bits, group_size=group))
            for bits, group in product(INTEGER_WIDTHS, INT_GROUPS)
        ]
        found = [Candidate(grid.format, grid.storage) for grid in grids]
        wide = [
            Candidate(grid.format, grid.storage.widened()) for grid in grids if grid.format.bits == INTEGER_WIDTHS[-1]
        ]
        return found + [each for each in wide if each not in found]
    if method.format.levels != "nf":
        raise ConfigError(
            f"levels={method.format.levels!r} have {method.format.bits} bits alone: there is nothing to plan. Use "
            "levels='nf'"
        )
    return [
        Candidate(replace(method.format, bits=bits, group_size=group), replace(method.storage, scales=scales.name))
        for bits, group, scales in product(NORMAL_FLOAT_WIDTHS, NF_GROUPS, SCALES)
    ]


def check_plannable(method: Method) -> None:
    """Raise ConfigError for methods whose adapter has a grid of its own, for all layers alike."""
    if method.adapter.base != "codes":
        raise ConfigError(
            f"a {method.adapter.kind} adapter quantizes by its own grid, the same in every layer, and cannot follow a "
            "plan. Use a method that trains over codes: lq-lora, qlora, qa-lora, .."
        )


def adapter_bits(method: Method, layout: Layout, rank: int, dtype: str) -> int:
    """Bits of the adapter over a matrix: its two factors as `dtype` (fp16 or nf8), rounded up.

    Source: LQ-LoRA (arXiv 2311.12023) section 4.3, which stores them as NF8 in its compression runs.
    """
    inputs = method.adapter.inputs(layout)
    return math.ceil(rank * (layout.out + inputs) * ADAPTER_BITS[dtype]) if inputs else 0


def effective_bits(shapes: Iterable[tuple[int, int]], bits: float, rank: int, dtype: str = "nf8") -> float:
    """Bits per weight with LoRA factors of `rank` beside every matrix.

    Args:
        shapes: The shapes of the matrices, `(out, in)`.
        bits: Bits per weight, without the factors.
        rank: The rank of the factors.
        dtype: How they are stored: nf8, as LQ-LoRA counts (2.75 bits are 2.951 for Llama 2 7B at rank 64), or fp16.
    """
    shapes = list(shapes)
    weights = sum(out * columns for out, columns in shapes)
    factors = sum(rank * (out + columns) for out, columns in shapes)
    return bits + float(factors * ADAPTER_BITS[dtype] / weights)
