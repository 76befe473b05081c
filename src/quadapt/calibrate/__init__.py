"""Statistics of what a model's layers are given, gathered block by block."""

from quadapt.calibrate.batch import Batch, inputs_of, labelled, named, parted, sequences_in
from quadapt.calibrate.walk import BackwardWalk, BlockWalk, Gathered, Watch

__all__ = [
    "BackwardWalk",
    "Batch",
    "BlockWalk",
    "Gathered",
    "Watch",
    "inputs_of",
    "labelled",
    "named",
    "parted",
    "sequences_in",
]
