"""The bytes: how scales and offsets are held.

Floats are kept as their bits, in uint8 tensors `[out, groups * itemsize]`. A cast of the model (`model.to(bfloat16)`,
the mixed precision of FSDP2 and DeepSpeed) turns every float parameter into bfloat16, and the model that is then merged
is not the one that was trained; bytes survive. Scales and offsets are rounded to their stored form once, when they are
made, and that is the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.quant.constants import per_device
from quadapt.quant.format import Format

Scales = Literal["fp16", "fp32", "double"]
Offsets = Literal["absent", "integer", "fp16", "fp32", "double"]

SUPER = 256
"""Scales that share one second-level constant under double quantization (QLoRA)."""

FLOATS = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How the scales and offsets of one weight matrix are held."""

    scales: Scales = "fp16"
    """fp16, fp32, or double: 8-bit codes of a dynamic map with float32 constants for every 256, as in QLoRA."""

    offsets: Offsets = "fp16"
    """absent, integer (one byte: the zero-point in steps), fp16, fp32, or double (8-bit codes, as for scales)."""

    def __post_init__(self) -> None:
        if self.scales not in ("fp16", "fp32", "double"):
            raise ConfigError(f"scales={self.scales!r} is unknown. Use fp16, fp32 or double")
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
        kind: fp16, fp32, integer (whole numbers 0 to 255) or double.
        centre: Whether double quantization subtracts the mean first: for scales as in QLoRA, not for offsets
            (IR-QLoRA).
    """
    if kind in FLOATS:
        return {"": _as_bytes(values.float().to(FLOATS[kind]))}
    if kind == "integer":
        return {"": values.to(torch.uint8)}
    values = values.float()
    mean = values.mean() if centre else values.new_zeros(())
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


def decode(stored: dict[str, Tensor], kind: str) -> Tensor:
    """What :func:`encode` stored, as float32 `[out, groups]`."""
    if kind in FLOATS:
        return _as_floats(stored[""], FLOATS[kind]).float()
    if kind == "integer":
        return stored[""].float()
    codes, absmax = stored[""], _as_floats(stored["_absmax"], torch.float32).flatten()
    unit = dynamic_map(device=codes.device)[codes.int()].flatten()
    scaled = unit * absmax.repeat_interleave(SUPER)[: unit.numel()]
    return (scaled + _as_floats(stored["_mean"], torch.float32).flatten()).view(codes.shape)


def suffixes(kind: str) -> tuple[str, ...]:
    """Suffixes of the tensors that :func:`encode` makes for `kind`."""
    return {"absent": (), "double": ("", "_absmax", "_mean")}.get(kind, ("",))


def stored_shapes(kind: str, out: int, groups: int) -> dict[str, tuple[int, int]]:
    """Shapes of the uint8 tensors that hold `[out, groups]` values as `kind`, by suffix."""
    size = {"fp16": 2, "fp32": 4}.get(kind, 1)
    shapes = {"": (out, groups * size), "_absmax": (-(-out * groups // SUPER), 4), "_mean": (1, 4)}
    return {suffix: shapes[suffix] for suffix in suffixes(kind)}


def stored_bits(kind: str, out: int, groups: int) -> int:
    """Bits that `[out, groups]` values cost when stored as `kind`, second-level constants included."""
    return 8 * sum(rows * columns for rows, columns in stored_shapes(kind, out, groups).values())


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


def _as_floats(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Read bytes as floats. A tensor read from a file may start at any byte; torch views only aligned ones."""
    if torch.compiler.is_compiling() or stored.storage_offset() % dtype.itemsize or not stored.is_contiguous():
        stored = stored.clone(memory_format=torch.contiguous_format)
    return stored.view(dtype)
