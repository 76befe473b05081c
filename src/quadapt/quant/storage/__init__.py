"""The bytes: how scales and offsets are held.

Floats are kept as their bits, in uint8 tensors `[out, groups * itemsize]`. A cast of the model (`model.to(bfloat16)`,
the mixed precision of FSDP2 and DeepSpeed) turns every float parameter into bfloat16, and the model that is then merged
is not the one that was trained; bytes survive. Scales and offsets are rounded to their stored form once, when they are
made, and that is the model.

Each way to hold numbers is a :class:`ValueStorage` in a file of its own, known by its name on disk (`STORAGES`);
:class:`Storage` names the two of one weight matrix.
"""

from __future__ import annotations

from quadapt.quant.storage.base import STORAGES, ValueStorage, register
from quadapt.quant.storage.double import DOUBLE, dynamic_map
from quadapt.quant.storage.floats import FLOATS
from quadapt.quant.storage.linear import LINEAR, Linear
from quadapt.quant.storage.pair import Storage, scales_meant

__all__ = [
    "DOUBLE",
    "FLOATS",
    "LINEAR",
    "STORAGES",
    "Linear",
    "Storage",
    "ValueStorage",
    "dynamic_map",
    "register",
    "scales_meant",
]
