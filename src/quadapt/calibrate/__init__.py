"""Statistics of what a model's layers are given, gathered block by block."""

from quadapt.calibrate.backward import BackwardWalk, Watch
from quadapt.calibrate.batch import Batch, inputs_of, labelled, named, parted, sequences_in, settings_of
from quadapt.calibrate.walk import BlockWalk, Gathered

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
    "settings_of",
]
