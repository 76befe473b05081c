"""The grid: which values a weight may take.

    W[o, i] = scales[o, g] * levels[codes[o, i]] + offsets[o, g],    g = perm[i] // group_size

Integers have the levels 0, 1, .. 2**bits - 1. NormalFloat has quantiles of the normal distribution between -1 and 1.
Two more tables are those of bitsandbytes, of 16 numbers each, and one is llama.cpp's, of 16 whole numbers. Levels never
descend: nearest codes need that.

A :class:`Format` names the levels, the group, and what the offsets may be; how the numbers are stored is decided in
`quant/storage/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, get_args

import torch
from annotated_types import Ge, Le
from scipy.special import ndtri
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.quant.constants import per_device
from quadapt.setting import MOST, setting
from quadapt.widths import check_width, listed

Levels = Literal["int", "nf", "nf-sym", "nf-qlora", "fp4", "iq4-nl"]
Zero = Literal["none", "integer", "float"]

WHOLE_ROW = -1
"""The `group_size` that gives each row a single scale."""

DELTA = 0.9677083
"""The probability of the outermost quantile of NF4 (QLoRA's code: 1 - (1/30 + 1/32) / 2), which is the same for every
width, as in LQ-LoRA and IR-QLoRA."""

QLORA = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of NF4 as QLoRA prints them (appendix E) and bitsandbytes has them. They were found in float32, and some
differ from those of its rule, :func:`normal_levels`, in the seventh digit."""

_MAGNITUDES = (0.0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)

FP4 = (*(-value for value in reversed(_MAGNITUDES)), *_MAGNITUDES)
"""The levels of FP4 as bitsandbytes has them: a sign, two bits of exponent and one of mantissa. Zero is there twice,
for either sign; to a weight of zero the lower one is nearest."""

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The levels of llama.cpp's IQ4_NL (`kvalues_iq4nl`): whole numbers, denser about zero, and none of them zero. They are
kept as they are there, so that a scale of float16 means the same there and here."""

_TABLES: dict[str, tuple[float, ...]] = {"nf-qlora": QLORA, "fp4": FP4, "iq4-nl": IQ4_NL}

_ONLY = {"nf-sym": 2, "nf-qlora": 4, "fp4": 4, "iq4-nl": 4}
"""The width of levels that have only one."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """The values that one weight matrix may hold: kind of levels, width of codes, groups and offsets."""

    levels: Levels = setting("--quant-type", panel="Quantization", default="int")
    """int: evenly spaced. nf: NormalFloat (nf2 is then {-1, 0, 0.34, 1}, as in LoftQ). nf-sym: symmetric nf2, as in
    IR-QLoRA. nf-qlora and fp4: the very numbers of bitsandbytes' NF4 and FP4. iq4-nl: those of llama.cpp's IQ4_NL."""

    bits: Annotated[int, Ge(2), Le(8)] = setting(panel="Quantization", default=4)
    """Width of a code: 2, 3, 4, 5, 6 or 8 for integers; 2, 3, 4 or 8 for NormalFloat; 4 for nf-qlora, fp4 and iq4-nl.
    """

    group_size: Annotated[int, Ge(-1), Le(MOST)] = setting(panel="Quantization", default=32)
    """Inputs of a row that share a scale: a multiple of 16 from 16 to 256, or -1 for the whole row."""

    zero: Zero | Literal["default"] = setting(panel="Quantization", default="default")
    """none: symmetric. integer: the offset is a whole number of steps. float: the offset is free (for int the group's
    minimum)."""

    def __post_init__(self) -> None:
        if self.zero == "default":
            object.__setattr__(self, "zero", "float" if self.levels == "int" else "none")
        if self.levels not in get_args(Levels):
            raise ConfigError(f"levels={self.levels!r} is unknown. Use {listed(get_args(Levels))}")
        check_width(self.levels, self.bits)
        only = _ONLY.get(self.levels, self.bits)
        if self.bits != only:
            raise ConfigError(
                f"levels={self.levels!r} is defined for bits={only} alone, not bits={self.bits}. Use levels='nf'"
            )
        whole = type(self.group_size) is int
        if not whole or (self.group_size != WHOLE_ROW and (self.group_size % 16 or not 16 <= self.group_size <= 256)):
            raise ConfigError(
                f"group_size={self.group_size} is not a multiple of 16 from 16 to 256. Use 32, 64 or 128, "
                "or -1 for the whole row"
            )
        if self.zero not in ("none", "integer", "float"):
            raise ConfigError(f"zero={self.zero!r} is unknown. Use none, integer or float")
        if self.zero == "integer" and self.levels != "int":
            raise ConfigError(f"zero='integer' has no meaning for levels={self.levels!r}. Use none or float")

    @property
    def name(self) -> str:
        """The short name that reports use: `int4-g32`, `nf2-sym-g64`, `int8-sym-row`."""
        levels, dash, more = self.levels.partition("-")
        width = "" if levels in ("fp4", "iq4") else str(self.bits)
        of_integers = {"none": "-sym", "integer": "-zp", "float": ""}
        zero = (of_integers if self.levels == "int" else {"none": "", "float": "-shift"})[self.zero]
        row = "row" if self.group_size == WHOLE_ROW else f"g{self.group_size}"
        return f"{levels}{width}{dash}{more}{zero}-{row}"

    def width(self, columns: int) -> int:
        """How many inputs a full group has, in a row of `columns` inputs."""
        return columns if self.group_size == WHOLE_ROW else min(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """How many groups a row of `columns` inputs has; the last may be shorter."""
        return -(-columns // self.width(columns))

    def row_bytes(self, columns: int) -> int:
        """How many bytes a packed row of `columns` inputs takes."""
        return -(-columns * self.bits // 8)

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest level: of a table its own, of integers those of their codes."""
        if self.levels == "int":
            return 0.0, float(2**self.bits - 1)
        return (float(IQ4_NL[0]), float(IQ4_NL[-1])) if self.levels == "iq4-nl" else (-1.0, 1.0)

    def table(self, like: Tensor) -> Tensor | None:
        """The levels, float32 `[2**bits]` on the device of `like`; None for integers, whose levels are their codes."""
        if self.levels == "int":
            return None
        return _table(self.bits, self.levels, device=like.device)


@per_device
def _table(bits: int, levels: str) -> tuple[float, ...]:
    return _TABLES[levels] if levels in _TABLES else normal_levels(bits, symmetric=levels == "nf-sym")


@cache
def normal_levels(bits: int, *, symmetric: bool = False) -> tuple[float, ...]:
    """The levels of NormalFloat, ascending from -1 to 1.

    Args:
        bits: The width of a code, 2, 3, 4 or 8: there are `2**bits` levels.
        symmetric: The midpoints of one more quantile than levels, without an exact zero (IR-QLoRA's nf2); otherwise the
            asymmetric rule of QLoRA, which has one more positive level than negative ones, and a zero.

    Raises:
        ConfigError: There is no NormalFloat of so many bits.

    Source: QLoRA (arXiv 2305.14314) §3 eq. 4 as in its code; IR-QLoRA (arXiv 2402.05445) for nf2 and nf3.
    """
    check_width("nf", bits)
    if symmetric:
        edges = ndtri(torch.linspace(1 - DELTA, DELTA, 2**bits + 1, dtype=torch.float64).numpy())
        values = (edges[1:] + edges[:-1]) / 2
        return tuple((values / values.max()).tolist())
    half = 2 ** (bits - 1)
    negative = ndtri(torch.linspace(1 - DELTA, 0.5, half, dtype=torch.float64).numpy())[:-1]
    positive = ndtri(torch.linspace(0.5, DELTA, half + 1, dtype=torch.float64).numpy())
    return tuple(float(value / ndtri(DELTA)) for value in (*negative, *positive))
