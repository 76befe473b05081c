"""The bytes: how scales and offsets are held.

Floats are kept as their bits, in uint8 tensors `[out, groups * itemsize]`. A cast of the model (`model.to(bfloat16)`,
the mixed precision of FSDP2 and DeepSpeed) turns every float parameter into bfloat16, and the model that is then merged
is not the one that was trained; bytes survive. Scales and offsets are rounded to their stored form once, when they are
made, and that is the model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels import pack, unpack, widen
from quadapt.kernels.reference import SUPER, as_floats
from quadapt.quant import fixed
from quadapt.quant.constants import per_device
from quadapt.quant.format import Format

Offsets = Literal["absent", "integer", "fp16", "fp32", "double"]

FLOATS = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Linear:
    """Scales as evenly spaced codes (LQ-LoRA): written `linear8-256-fp32` for 8 bits, 256 to a constant of fp32.

        scale = code * largest / (2**bits - 1) + smallest

    `smallest` is that of the whole matrix (float32), `largest` the largest distance from it among `block` scales. No
    scale comes out below `smallest`, and larger scales get no smaller codes within a block. Codes are packed, all rows
    in one stream.

    Source: LQ-LoRA (arXiv 2311.12023) section 3.1 and its code.
    Differs: bfloat16 constants are left out, since they cost what fp16 ones do and are coarser. Scales that are all
        equal are held exactly; its code divides by zero.
    """

    bits: int = 8
    """Width of a scale's code: 2, 3, 4 or 8."""

    block: int = 256
    """Scales that share a constant: 16, 64 or 256, in row-major order."""

    constant: str = "fp32"
    """How the constant is held: fp16 or fp32."""

    @property
    def name(self) -> str:
        """As a kind of storage."""
        return f"linear{self.bits}-{self.block}-{self.constant}"

    @staticmethod
    def of(kind: str) -> Linear | None:
        """What `kind` names, or None if it is no such name."""
        return _LINEAR.get(kind)


_LINEAR = {
    each.name: each for each in itertools.starmap(Linear, itertools.product((2, 3, 4, 8), (16, 64, 256), FLOATS))
}

LINEAR = Linear().name
"""LQ-LoRA's choice where it has one grid for all matrices."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How the scales and offsets of one weight matrix are held."""

    scales: str = "fp16"
    """fp16, fp32, double (8-bit codes of a dynamic map with float32 constants for every 256, as in QLoRA), or
    linear8-256-fp32 and its like (evenly spaced codes, as in LQ-LoRA: see :class:`Linear`)."""

    offsets: Offsets = "fp16"
    """absent, integer (one byte: the zero-point in steps), fp16, fp32, or double (8-bit codes, as for scales)."""

    def __post_init__(self) -> None:
        if self.scales not in ("fp16", "fp32", "double") and Linear.of(self.scales) is None:
            raise ConfigError(
                f"scales={self.scales!r} is unknown. Use fp16, fp32, double, or linearB-N-F with B 2, 3, 4 or 8 bits, "
                "N 16, 64 or 256 scales to a constant, and F fp16 or fp32"
            )
        if self.offsets not in ("absent", "integer", "fp16", "fp32", "double"):
            raise ConfigError(f"offsets={self.offsets!r} is unknown. Use absent, integer, fp16, fp32 or double")

    def check(self, format: Format) -> None:
        """Raise ConfigError unless this storage can hold what `format` allows."""
        wanted = {"none": ("absent",), "integer": ("integer",), "float": ("fp16", "fp32", "double")}[format.zero]
        if self.offsets not in wanted:
            raise ConfigError(f"offsets={self.offsets!r} cannot hold zero={format.zero!r}. Use {' or '.join(wanted)}")

    @property
    def floats(self) -> Literal["fp16", "fp32"]:
        """The dtype of offsets that are put in the place of these."""
        return "fp32" if "fp32" in (self.scales, self.offsets) else "fp16"

    @staticmethod
    def default(format: Format) -> Storage:
        """fp16, but fp32 at 8 bits, where fp16 would cost a quarter of a step; offsets as the format's zero demands."""
        floats: Literal["fp16", "fp32"] = "fp32" if format.bits == 8 else "fp16"
        offsets: dict[str, Offsets] = {"none": "absent", "integer": "integer", "float": floats}
        return Storage(scales=floats, offsets=offsets[format.zero])


def encode(values: Tensor, kind: str, *, centre: bool) -> dict[str, Tensor]:
    """Store float32 `[out, groups]` as `kind`: uint8 tensors by the suffix of their name ("" for the main one).

    Args:
        values: What to store.
        kind: fp16, fp32, integer (whole numbers 0 to 255), double, or linear and its settings.
        centre: Whether double quantization subtracts the mean first: for scales as in QLoRA, not for offsets
            (IR-QLoRA).
    """
    if kind in FLOATS:
        return {"": _as_bytes(values.float().to(FLOATS[kind]))}
    if kind == "integer":
        return {"": values.to(torch.uint8)}
    values = values.float()
    if linear := Linear.of(kind):
        return _encode_linear(values, linear)
    mean = fixed.mean(values).float() if centre else values.new_zeros(())
    blocks = torch.nn.functional.pad((values - mean).flatten(), (0, -values.numel() % SUPER)).view(-1, SUPER)
    absmax = blocks.abs().amax(1)
    unit = blocks / torch.where(absmax == 0, 1, absmax)[:, None]
    table = dynamic_map(device=values.device)
    codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2)
    return {
        "": codes.to(torch.uint8).flatten()[: values.numel()].view(values.shape),
        "_absmax": _as_bytes(absmax[:, None]),
        "_mean": _as_bytes(mean.view(1, 1)),
    }


def decode(stored: dict[str, Tensor], kind: str, shape: tuple[int, int] | None = None) -> Tensor:
    """What :func:`encode` stored, as float32 `[out, groups]`; `shape` is these two, which linear codes do not tell."""
    if kind in FLOATS:
        return as_floats(stored[""], FLOATS[kind]).float()
    tensors = held(stored, kind, shape)
    return widen(*tensors) if kind == "double" else tensors[0].float()


def held(stored: dict[str, Tensor], kind: str, shape: tuple[int, int] | None = None) -> list[Tensor]:
    """What :func:`encode` stored, as `kernels.product` takes it: the bytes themselves, but floats for linear codes."""
    if linear := Linear.of(kind):
        assert shape is not None
        return [_decode_linear(stored, linear, shape)]
    table = [dynamic_map(device=stored[""].device)] if kind == "double" else []
    return [*stored.values(), *table]


def _encode_linear(values: Tensor, linear: Linear) -> dict[str, Tensor]:
    """Codes against the constants as they are stored, all in float32. `values` are float32 `[out, groups]`."""
    smallest, top = values.min(), 2**linear.bits - 1
    above = torch.nn.functional.pad((values - smallest).flatten(), (0, -values.numel() % linear.block))
    above = above.view(-1, linear.block)
    largest = above.amax(1, keepdim=True).to(FLOATS[linear.constant])
    unit = largest.float()
    # A constant of zero (equal scales, or below fp16's smallest number) leaves all codes zero. One that fp16 has
    # rounded down would give codes above the top.
    codes = torch.where(unit > 0, above * top / torch.where(unit > 0, unit, 1), 0).round().clamp_max(top)
    return {
        "": pack(codes.flatten()[None, : values.numel()].to(torch.uint8), linear.bits),
        "_largest": _as_bytes(largest),
        "_smallest": _as_bytes(smallest.view(1, 1)),
    }


def _decode_linear(stored: dict[str, Tensor], linear: Linear, shape: tuple[int, int]) -> Tensor:
    count = shape[0] * shape[1]
    codes = unpack(stored[""], linear.bits, count).flatten().float()
    largest = as_floats(stored["_largest"], FLOATS[linear.constant]).float().flatten()
    largest = largest.repeat_interleave(linear.block)[:count]
    smallest = as_floats(stored["_smallest"], torch.float32).flatten()
    return (codes * largest / (2**linear.bits - 1) + smallest).view(shape)


def through(values: Tensor, kind: str, *, centre: bool) -> Tensor:
    """What values `[out, groups]` are once they have been stored as `kind`."""
    return decode(encode(values, kind, centre=centre), kind, (values.shape[0], values.shape[1]))


def suffixes(kind: str) -> tuple[str, ...]:
    """Suffixes of the tensors that :func:`encode` makes for `kind`."""
    if Linear.of(kind):
        return ("", "_largest", "_smallest")
    return {"absent": (), "double": ("", "_absmax", "_mean")}.get(kind, ("",))


def stored_shapes(kind: str, out: int, groups: int) -> dict[str, tuple[int, int]]:
    """Shapes of the uint8 tensors that hold `[out, groups]` values as `kind`, by suffix."""
    if linear := Linear.of(kind):
        constants = (-(-out * groups // linear.block), FLOATS[linear.constant].itemsize)
        return {"": (1, -(-out * groups * linear.bits // 8)), "_largest": constants, "_smallest": (1, 4)}
    size = {"fp16": 2, "fp32": 4}.get(kind, 1)
    shapes = {"": (out, groups * size), "_absmax": (-(-out * groups // SUPER), 4), "_mean": (1, 4)}
    return {suffix: shapes[suffix] for suffix in suffixes(kind)}


@per_device
@cache
def dynamic_map() -> tuple[float, ...]:
    """QLoRA's signed dynamic 8-bit map: 256 values from -0.993 to 1, dense near zero.

    As bitsandbytes' `create_dynamic_map`: decade `d` of seven, `10**(d - 6)`, has the `2**d` midpoints of an even
    division of [0.1, 1], with both signs; 0 and 1 are added.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middle = (edges[1:] + edges[:-1]) / 2
        for sign in (-1.0, 1.0):
            values += (sign * 10.0 ** (decade - 6) * middle).tolist()
    return tuple(sorted(values))


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
