"""Starts: one file each."""

from quadapt.nn.starts.base import Begun, Quantize, Start, Zero

__all__ = ["Begun", "Quantize", "Start", "Zero"]
