"""The two storages of one weight matrix: that of its scales and that of its offsets, by their names."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from quadapt.errors import ConfigError
from quadapt.quant.format import Format
from quadapt.quant.storage.base import STORAGES, ValueStorage
from quadapt.widths import INTEGER_WIDTHS, listed


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How the scales and offsets of one weight matrix are held.

    The fields are names, as a checkpoint's config has them; :meth:`of` gives the object that a name means, which
    answers whatever there is to know about it.

    Raises:
        ConfigError: There is no storage of that name, or it is not for scales, or not for offsets.
    """

    scales: str = "fp16"
    """fp16, fp32, double (8-bit codes of a dynamic map with float32 constants for every 256, as in QLoRA),
    linear8-256-fp32 and its like (evenly spaced codes, as in LQ-LoRA: see :class:`Linear`), or q4_k and its like (those
    of llama.cpp's K-quants: see :class:`SuperBlock`)."""

    offsets: str = "fp16"
    """absent, integer (one byte: the zero-point in steps), fp16, fp32, double (8-bit codes, as for scales), or q4_k-min
    and q2_k-min (those of K-quants)."""

    def __post_init__(self) -> None:
        if not _known(self.scales, "for_scales"):
            raise ConfigError(f"scales={self.scales!r} is unknown. Use {_choices('for_scales')}")
        if not _known(self.offsets, "for_offsets"):
            raise ConfigError(f"offsets={self.offsets!r} is unknown. Use {_choices('for_offsets')}")

    def of(self, name: Literal["scales", "offsets"]) -> ValueStorage:
        """How one of the two is held."""
        return self.of_scales if name == "scales" else self.of_offsets

    @property
    def of_scales(self) -> ValueStorage:
        """The storage that holds the scales."""
        return _held_by(self.scales)

    @property
    def of_offsets(self) -> ValueStorage:
        """The storage that holds the offsets."""
        return _held_by(self.offsets)

    def check(self, format: Format) -> None:
        """Raise ConfigError unless this storage can hold what `format` allows."""
        if self.of_offsets.zero != format.zero:
            wanted = [name for name, each in STORAGES.items() if each.for_offsets and each.zero == format.zero]
            raise ConfigError(
                f"offsets={self.offsets!r} cannot hold zero={format.zero!r}. Use {' or '.join(sorted(wanted))}"
            )
        self.of_scales.check(format)
        self.of_offsets.check(format)

    def fitting(self, format: Format, columns: int) -> tuple[Format, Storage]:
        """Grid and storage of rows of `columns` inputs: these, or what takes their place where they do not fit.

        Every layer's layout is made by it.
        """
        instead = self.of_scales.shorter(format, columns)
        return (format, self) if instead is None else (instead[0], Storage.floating(instead[1], instead[0].zero))

    def label(self, format: Format) -> str:
        """The short name that reports use of a grid that is held so: `int4-g32`, `int4-q4k`."""
        alike = self.of_offsets.implied or self.offsets == self.of_scales.beside
        return self.of_scales.label(format) if alike else format.name

    @property
    def together(self) -> int | None:
        """How many neighbouring groups of a row are stored together; None for all of the matrix."""
        runs = self.of_scales.together, self.of_offsets.together
        return None if None in runs else math.lcm(*(run for run in runs if run is not None))

    @property
    def local(self) -> bool:
        """Whether each scale and each offset is stored by itself, whatever the others of the matrix are."""
        return self.together == 1

    @property
    def floats(self) -> str:
        """The storage that holds offsets which are put in the place of these: plain floats, or that of K-quants."""
        if _trains_itself(self.of_offsets):
            return self.offsets
        return self._plain

    @property
    def _plain(self) -> str:
        return "fp32" if torch.float32 in (self.of_scales.dtype, self.of_offsets.dtype) else "fp16"

    def trained(self, zero: str) -> Storage:
        """This storage once scales train, and offsets as a format's zero (none, integer or float) demands."""
        scales = self.scales if _trains_itself(self.of_scales) else self._plain
        return Storage(scales=scales, offsets={"none": "absent", "integer": "integer", "float": self.floats}[zero])

    def with_scales(self, scales: str) -> Storage:
        """Scales held otherwise, and offsets alike, if these may be any and that storage can hold offsets."""
        alike = STORAGES[scales].beside if self.of_offsets.free and _known(scales, "for_scales") else None
        return replace(self, scales=scales, offsets=alike or self.of_offsets.alone)

    def widened(self) -> Storage:
        """This storage with fp32 for the scales, and for the offsets unless all of them are held together."""
        offsets = self.offsets if self.of_offsets.together is None else self.of_offsets.widest
        return replace(self, scales=self.of_scales.widest, offsets=offsets)

    def widest(self) -> Storage:
        """This storage with fp32 for every number that may be any."""
        return replace(self, scales=self.of_scales.widest, offsets=self.of_offsets.widest)

    @staticmethod
    def default(format: Format) -> Storage:
        """fp16, at 8 bits too: the error of rounding grows by 0.04 % at most. Offsets as the format's zero demands."""
        return Storage.floating("fp16", format.zero)

    @staticmethod
    def floating(floats: str, zero: str) -> Storage:
        """Scales held so, and offsets as a format's zero (none, integer or float) demands, alike if it may."""
        beside = STORAGES[floats].beside or "fp16"
        return Storage(scales=floats, offsets={"none": "absent", "integer": "integer", "float": beside}[zero])


def scales_meant(name: str, bits: int) -> ValueStorage:
    """The storage of scales that settings mean by a name: its own, or that of its family for codes of `bits` bits.

    Raises:
        ConfigError: The family has none for this width.
    """
    family = [each for each in STORAGES.values() if each.for_scales and each.family == name]
    if not family:
        return STORAGES[name]
    for each in family:
        if each.serves(bits):
            return each
    widths = [width for width in INTEGER_WIDTHS if any(each.serves(width) for each in family)]
    raise ConfigError(f"scales={name!r} are for codes of {listed(tuple(widths))} bits, not {bits}. Use fp16 or fp32")


def _trains_itself(storage: ValueStorage) -> bool:
    """Whether numbers that train stay in a storage which is not one of plain floats."""
    return not storage.is_float and storage.trained == storage.name


@cache
def _held_by(name: str) -> ValueStorage:
    return STORAGES[name]


def _known(name: object, role: str) -> bool:
    return isinstance(name, str) and name in STORAGES and bool(getattr(STORAGES[name], role))


def _choices(role: str) -> str:
    """The names that there are for scales or for offsets, in words."""
    words = list(dict.fromkeys(each.spelling for each in STORAGES.values() if getattr(each, role)))
    return f"{', '.join(words[:-1])} or {words[-1]}"
