"""LoRA-FA (Zhang et al. 2023, arXiv:2308.03303) in float64: the gradient of `B`, from what is kept alone."""

from __future__ import annotations

import numpy as np


def kept(x: np.ndarray, A: np.ndarray) -> np.ndarray:
    """`x A^T [tokens, rank]`: all of the inputs that backward needs, `A` being frozen."""
    return x @ A.T


def gradient(dy: np.ndarray, kept: np.ndarray, scaling: float) -> np.ndarray:
    """Of `B [out, rank]`, for the gradient `dy [tokens, out]` of the layer's output."""
    return scaling * dy.T @ kept
