"""Double quantization of scales as in QLoRA's code: 8-bit codes of a dynamic map, 256 to a constant, mean taken off."""

from __future__ import annotations

import numpy as np


def dynamic_map() -> np.ndarray:
    """256 values: in decade `d` of seven, `2**d` midpoints of an even division of 0.1 .. 1, both signs; and 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        for i in range(2**decade):
            width = 0.9 / 2**decade
            middle = 0.1 + (i + 0.5) * width
            values += [middle * 10.0 ** (decade - 6), -middle * 10.0 ** (decade - 6)]
    return np.array(sorted(values))


def encode(values: np.ndarray, *, centre: bool, super_: int = 256) -> tuple[np.ndarray, np.ndarray, float]:
    """Codes (as `values`), a constant for each 256 values in row-major order, and the mean that was taken off."""
    mean = float(values.mean()) if centre else 0.0
    flat = values.astype(np.float64).ravel() - mean
    table = dynamic_map()
    codes = np.zeros(flat.size, np.uint8)
    constants = []
    for start in range(0, flat.size, super_):
        block = flat[start : start + super_]
        constant = np.abs(block).max()
        constants.append(constant)
        for i, value in enumerate(block):
            unit = value / constant if constant else 0.0
            codes[start + i] = int(np.abs(table - unit).argmin())
    return codes.reshape(values.shape), np.array(constants), mean


def decode(codes: np.ndarray, constants: np.ndarray, mean: float, super_: int = 256) -> np.ndarray:
    """The values again."""
    flat = dynamic_map()[codes.ravel()]
    return np.array([value * constants[i // super_] + mean for i, value in enumerate(flat)]).reshape(codes.shape)
