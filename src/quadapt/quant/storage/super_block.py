"""Scales and offsets as small codes within super-blocks of 256 weights: the K-quants of GGML, which llama.cpp serves.

    W = scales * codes + offsets,    scales = d * sc,    offsets = -dmin * m

`sc` and `m` are whole numbers of a few bits, one for each group; `d` and `dmin` are float16, one for each super-block
of a row. Both products are exact in float32, so that our stored form is the one of GGML's blocks, in its own order of
operations, and a file of such blocks holds the matrix bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels import narrow, pack, unpack
from quadapt.kernels.reference import as_floats
from quadapt.quant.format import Format, Zero
from quadapt.quant.storage.base import ValueStorage, as_bytes, register
from quadapt.quant.storage.floats import LARGEST, SMALLEST_SCALE

SUPER_BLOCK = 256
"""How many weights of a row a super-block has."""

_SHORTER: dict[int, tuple[int, Zero]] = {
    2: (4, "none"),
    3: (4, "none"),
    4: (5, "none"),
    5: (5, "float"),
    6: (8, "none"),
}
"""Width and zero of the plain block that llama.cpp takes instead, by the width of codes in super-blocks."""

_LEAST = 2.0**-24
"""The smallest positive float16: a constant is never smaller, so that nothing divides by zero."""


@dataclass(frozen=True)
class SuperBlock(ValueStorage):
    """Positive scales as codes 1 to `2**bits - 1` of one float16 for each super-block: `scale = d * code`.

    The largest scale of a super-block has the largest code, and `d` is that scale over it, rounded towards zero. So
    what has been stored is stored again as the very same bytes. A code of zero, which GGML allows, is not used: nothing
    divides by such a scale, and a step of `d` serves a group of less extent as well.

    Codes are packed row by row, in the order of the groups; constants are `[out, 2 * super-blocks]`. Together they take
    the bits that GGML's blocks spend on them. A last super-block of a row may be shorter.

    Source: llama.cpp, `ggml/src/ggml-common.h` (block_q4_K, block_q5_K, block_q2_K).
    Differs: `d` is chosen from the largest scale alone; llama.cpp's quantizer also searches around it.
    """

    summary: ClassVar[str] = "a small code for each group, and a float16 for every 256 weights (K-quants of llama.cpp)"
    for_offsets: ClassVar[bool] = False
    suffixes: ClassVar[tuple[str, ...]] = ("", "_constant")

    own_name: str
    """The name of the storage, which begins with that of GGML's type."""

    bits: int
    """The width of a group's code: 4, 6 or 8."""

    group_size: int
    """How many weights a group has: 16 or 32."""

    widths: tuple[int, ...]
    """The widths of the weights' codes for which GGML has a type."""

    grid_zero: Zero = "float"
    """The zero of offsets that GGML's type has, in the words of :attr:`Format.zero`."""

    @property
    def name(self) -> str:
        return self.own_name

    @property
    def family(self) -> str:
        return "k-quant"

    def serves(self, bits: int) -> bool:
        return bits in self.widths

    @property
    def demands(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "zero": self.grid_zero}

    def shorter(self, format: Format, columns: int) -> tuple[Format, str] | None:
        """What llama.cpp takes where a row is no whole number of super-blocks: blocks of 32, with an fp16 for each.

        Source: llama.cpp, `src/llama-quant.cpp`, its fallbacks for tensors (Q2_K and Q3_K to Q4_0, Q4_K to Q5_0, Q5_K
        to Q5_1, Q6_K to Q8_0). Rows that are no multiple of 32 fit no block either, and stay as they are.
        """
        if columns % SUPER_BLOCK == 0 or columns % 32:
            return None
        bits, zero = _SHORTER[format.bits]
        return Format(bits=bits, group_size=32, zero=zero), "fp16"

    def label(self, format: Format) -> str:
        return f"int{format.bits}-q{format.bits}k"

    @property
    def together(self) -> int:
        return SUPER_BLOCK // self.group_size

    @property
    def beside(self) -> str | None:
        return f"{self.own_name}-min"

    @property
    def trained(self) -> str:
        return self.own_name

    @property
    def top(self) -> int:
        """The code of the largest number in a super-block."""
        return 2**self.bits - 1

    def check(self, format: Format) -> None:
        if format.levels != "int":
            raise ConfigError(f"{self.name} is the grid of integers, not of {format.name}. Use levels='int', or fp16")
        fits = format.bits in self.widths
        if fits and format.group_size == self.group_size and format.zero == self.grid_zero:
            return
        widths = " or ".join(map(str, self.widths))
        raise ConfigError(
            f"{self.name} is the grid of integers of {widths} bits in groups of {self.group_size} with "
            f"zero={self.grid_zero!r}, not of {format.name}. Use --scales k-quant, which chooses the group size and "
            "the zero for the bits, or fp16"
        )

    def encode(self, values: Tensor, *, centre: bool) -> dict[str, Tensor]:
        constants, codes = self._coded(values.float())
        return {
            "": pack((codes + self._shift).flatten(1)[:, : values.shape[1]].to(torch.uint8).contiguous(), self.bits),
            "_constant": as_bytes(constants.half()),
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        codes = unpack(tensors[""], self.bits, shape[1]).float() - self._shift
        constants = as_floats(tensors["_constant"], torch.float16).float()
        return codes * constants.repeat_interleave(self.together, 1)[:, : shape[1]]

    def shapes(self, out: int, groups: int) -> dict[str, tuple[int, int]]:
        return {"": (out, -(-groups * self.bits // 8)), "_constant": (out, 2 * -(-groups // self.together))}

    def rounded(self, values: Tensor) -> Tensor:
        constants, codes = self._coded(values.float())
        return (codes * constants[..., None]).flatten(1)[:, : values.shape[1]].to(values.dtype)

    def above(self, values: Tensor) -> Tensor:
        constants, codes = self._coded(values.float(), up=True)
        return (codes * constants[..., None]).flatten(1)[:, : values.shape[1]]

    def fits_scales(self, least: float, most: float) -> bool:
        """Whether the largest scale is held well, since constants alone are floats; so is that of a matrix of zeros."""
        return SMALLEST_SCALE <= most / self.top <= LARGEST or most == SMALLEST_SCALE

    def fits_offsets(self, most: float) -> bool:
        return most / self.top <= LARGEST

    # --- what the types differ in ---

    @property
    def _shift(self) -> int:
        """What is added to a code to store it, which leaves no code negative."""
        return 0

    def _coded(self, values: Tensor, *, up: bool = False) -> tuple[Tensor, Tensor]:
        """Constants `[rows, super-blocks]` and codes `[rows, super-blocks, together]`, both float32; NaN stays NaN.

        Args:
            values: float32 `[rows, groups]`.
            up: Whether no code may make less of a number than it is; the constants are then rounded up, too.
        """
        blocks = _blocks(values, self.together)
        constants = _half(blocks.amax(-1) / self.top, up=up)
        return constants, _whole(blocks / constants[..., None], up=up).clamp(1, self.top)


@dataclass(frozen=True)
class Minima(SuperBlock):
    """Offsets that are never positive, as codes from zero of one float16 for each super-block: `offset = -dmin * m`.

    Beside scales of the same type. A range that is held so contains zero, or lies below it; a positive offset is held
    as zero.
    """

    summary: ClassVar[str] = "offsets that are never positive, held as K-quants hold them beside such scales"
    for_scales: ClassVar[bool] = False
    for_offsets: ClassVar[bool] = True
    never_positive: ClassVar[bool] = True

    @property
    def alone(self) -> str:
        return "fp16"

    @property
    def beside(self) -> str | None:
        return None

    def _coded(self, values: Tensor, *, up: bool = False) -> tuple[Tensor, Tensor]:
        blocks = -_blocks(values, self.together)
        constants = _half(blocks.amax(-1) / self.top, up=up)
        return constants, -_whole(blocks / constants[..., None], up=up).clamp(0, self.top)

    def encode(self, values: Tensor, *, centre: bool) -> dict[str, Tensor]:
        constants, codes = self._coded(values.float())
        kept = (-codes).flatten(1)[:, : values.shape[1]].to(torch.uint8).contiguous()
        return {"": pack(kept, self.bits), "_constant": as_bytes(constants.half())}

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return -super().decode(tensors, shape)


@dataclass(frozen=True)
class SignedSuperBlock(SuperBlock):
    """Scales of either sign for symmetric integers: `scale = d * code`, codes from `-2**(bits - 1)`, none of them zero.

    The scale of largest magnitude has the lowest code, and `d` the sign for that. Symmetric integers have one level
    more below zero than above; by a negative scale it goes to a group's largest weight.

    Source: llama.cpp, `ggml/src/ggml-common.h` (block_q3_K, block_q6_K), and `make_qx_quants` for the signs.
    """

    signed: ClassVar[bool] = True

    @property
    def beside(self) -> str | None:
        return None

    @property
    def top(self) -> int:
        return 2 ** (self.bits - 1)

    @property
    def _shift(self) -> int:
        return self.top

    def _coded(self, values: Tensor, *, up: bool = False) -> tuple[Tensor, Tensor]:
        blocks = _blocks(values, self.together)
        high, low = blocks.amax(-1), -blocks.amin(-1)
        exact = torch.maximum(high, low) / self.top
        # Below the smallest constant no code need be the lowest, and two may tie: there the sign is always the same.
        sign = torch.where((high > low) & (exact >= _LEAST), -1.0, 1.0)
        constants = sign * _half(exact, up=up)
        ratio = blocks / constants[..., None]
        codes = ratio.sign() * _whole(ratio.abs(), up=up) if up else ratio.round()
        codes = torch.where(codes == 0, torch.where(ratio < 0, -1.0, 1.0), codes)
        return constants, codes.clamp(-self.top, self.top - 1)


def _blocks(values: Tensor, together: int) -> Tensor:
    """Numbers `[rows, groups]` by super-blocks, `[rows, super-blocks, together]`; zeros fill the last."""
    return torch.nn.functional.pad(values, (0, -values.shape[1] % together)).unflatten(1, (-1, together))


def _whole(values: Tensor, *, up: bool) -> Tensor:
    """Halves to even, or up."""
    return values.ceil() if up else values.round()


def _half(values: Tensor, *, up: bool) -> Tensor:
    """Positive numbers as float16 holds them, rounded towards zero (or up), within its range; float32."""
    values = values.clamp(_LEAST, LARGEST)
    half = narrow(values, torch.float16)
    step = torch.where(half.float() < values, 1, 0) if up else torch.where(half.float() > values, -1, 0)
    return (half.view(torch.int16) + step.to(torch.int16)).view(torch.float16).float()


Q4_K = register(SuperBlock("q4_k", bits=6, group_size=32, widths=(4, 5)))
"""Scales of GGML's Q4_K and, for codes of five bits, Q5_K."""

Q2_K = register(SuperBlock("q2_k", bits=4, group_size=16, widths=(2,)))
"""Scales of GGML's Q2_K, which has codes of two bits."""

Q3_K = register(SignedSuperBlock("q3_k", bits=6, group_size=16, widths=(3,), grid_zero="none"))
"""Scales of GGML's Q3_K, which is symmetric."""

Q6_K = register(SignedSuperBlock("q6_k", bits=8, group_size=16, widths=(6,), grid_zero="none"))
"""Scales of GGML's Q6_K, which is symmetric."""

for _each in (Q4_K, Q2_K):
    register(Minima(f"{_each.own_name}-min", bits=_each.bits, group_size=_each.group_size, widths=_each.widths))
