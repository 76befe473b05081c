"""Statistics of what a model's layers are given, gathered block by block."""

from quadapt.calibrate.backward import BackwardWalk, Watch
from quadapt.calibrate.batch import Batch, call_of, inputs_of, named, parted, sequences_in
from quadapt.calibrate.walk import BlockWalk, Gathered

__all__ = [
    "BackwardWalk",
    "Batch",
    "BlockWalk",
    "Gathered",
    "Watch",
    "call_of",
    "inputs_of",
    "named",
    "parted",
    "sequences_in",
]
