"""Statistics of what a model's layers are given, gathered block by block."""

from quadapt.calibrate.backward import BackwardWalk, Watch
from quadapt.calibrate.batch import Batch, call_of, inputs_of, named, parted, sequences_in
from quadapt.calibrate.walk import LEAST_TOKENS, MOMENTS_AT_ONCE, BlockWalk, Gathered

__all__ = [
    "LEAST_TOKENS",
    "MOMENTS_AT_ONCE",
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
