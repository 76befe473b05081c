"""Starts: one file for each kind."""

from quadapt.nn.starts.base import STARTS, Begun, Quantize, Start, Zero
from quadapt.nn.starts.calibrated import QERA, CLoQ, LoftQ, QuAILoRA
from quadapt.nn.starts.lq import LQ

__all__ = ["LQ", "QERA", "STARTS", "Begun", "CLoQ", "LoftQ", "QuAILoRA", "Quantize", "Start", "Zero"]
