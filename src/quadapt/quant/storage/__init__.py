"""The bytes: how scales and offsets are held.

Floats are kept as their bits, in uint8 tensors `[out, groups * itemsize]`. A cast of the model (`model.to(bfloat16)`,
the mixed precision of FSDP2 and DeepSpeed) turns every float parameter into bfloat16, and the model that is then merged
is not the one that was trained; bytes survive. Scales and offsets are rounded to their stored form once, when they are
made, and that is the model.

Each way to hold numbers is a :class:`ValueStorage` in a file of its own, known by its name on disk (`STORAGES`);
:class:`Storage` names the two of one weight matrix.
"""

from __future__ import annotations

from torch import Tensor

from quadapt.quant.storage.base import STORAGES, ValueStorage, register
from quadapt.quant.storage.double import dynamic_map
from quadapt.quant.storage.floats import FLOATS
from quadapt.quant.storage.linear import LINEAR, Linear
from quadapt.quant.storage.pair import Storage

__all__ = ["FLOATS", "LINEAR", "STORAGES", "Linear", "Storage", "ValueStorage", "dynamic_map", "register"]

Offsets = str


def encode(values: Tensor, kind: str, *, centre: bool) -> dict[str, Tensor]:
    """`STORAGES[kind].encode`; goes when its last caller asks the object."""
    return STORAGES[kind].encode(values, centre=centre)


def decode(stored: dict[str, Tensor], kind: str, shape: tuple[int, int] | None = None) -> Tensor:
    """`STORAGES[kind].decode`; goes when its last caller asks the object."""
    return STORAGES[kind].decode(stored, shape or (0, 0))


def held(stored: dict[str, Tensor], kind: str, shape: tuple[int, int] | None = None) -> list[Tensor]:
    """`STORAGES[kind].held`; goes when its last caller asks the object."""
    return STORAGES[kind].held(stored, shape or (0, 0))


def through(values: Tensor, kind: str, *, centre: bool) -> Tensor:
    """`STORAGES[kind].through`; goes when its last caller asks the object."""
    return STORAGES[kind].through(values, centre=centre)


def suffixes(kind: str) -> tuple[str, ...]:
    """`STORAGES[kind].suffixes`; goes when its last caller asks the object."""
    return STORAGES[kind].suffixes


def stored_shapes(kind: str, out: int, groups: int) -> dict[str, tuple[int, int]]:
    """`STORAGES[kind].shapes`; goes when its last caller asks the object."""
    return STORAGES[kind].shapes(out, groups)
