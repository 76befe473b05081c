"""Starts: one file each."""

from quadapt.nn.starts.base import Begun, Quantize, Start, Zero
from quadapt.nn.starts.lq import LQ

__all__ = ["LQ", "Begun", "Quantize", "Start", "Zero"]
