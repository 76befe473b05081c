"""Starts: one file for each kind."""

from quadapt.nn.starts.base import Begun, Quantize, Start, Zero
from quadapt.nn.starts.calibrated import QERA, CLoQ, LoftQ, QuAILoRA
from quadapt.nn.starts.lq import LQ

STARTS: dict[str, type[Start]] = {each.name: each for each in (Zero, LoftQ, LQ, QuAILoRA, CLoQ, QERA)}
"""Starts by name."""

__all__ = ["LQ", "QERA", "STARTS", "Begun", "CLoQ", "LoftQ", "QuAILoRA", "Quantize", "Start", "Zero"]
