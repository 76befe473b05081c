"""t-SignSGD (Chen et al. 2025, arXiv:2505.18724) in float64, by the quantiles that NumPy interpolates."""

from __future__ import annotations

import numpy as np


def sigma(step: int, steps: int) -> float:
    """From 0.95 to 0.999 over four fifths of the steps, then to 0.9999; `step` counts from 1."""
    return float(np.interp(step / steps, [0, 0.8, 1], [0.95, 0.999, 0.9999]))


def stepped(params: list[np.ndarray], grads: list[np.ndarray], step: int, steps: int) -> list[np.ndarray]:
    """All ternary parameters after a step."""
    norm = np.sqrt(sum(float((grad**2).sum()) for grad in grads))
    found = []
    for param, grad in zip(params, grads, strict=True):
        size = np.abs(grad)
        moves = (size > np.quantile(size, sigma(step, steps))) & (size > 1e-9)
        if step > 0.8 * steps and norm > 10:
            moves &= size < np.quantile(size, 0.99995)
        found.append(np.clip(param - np.sign(grad) * moves, -1, 1))
    return found
