"""Rounding to nearest, group by group, weight by weight, in float64."""

from __future__ import annotations

import numpy as np


def grid(group: np.ndarray, bits: int, levels: list[float] | None, zero: str, stored: type) -> tuple[float, float]:
    """Scale and additive offset that the weights of one group get, as they are stored (`stored`: a NumPy float type).

    Integers: QA-LoRA's form (the offset is the smallest weight) for `zero="float"`; GPTQ's (zero is a level) for
    "integer"; two's complement for "none".
    """
    low, high, top = group.min(), group.max(), 2**bits - 1
    if levels is not None:
        if zero == "float":  # the ends of the table lie on those of the group
            scale = (high - low) / (levels[-1] - levels[0])
            middle = (low + high) / 2 - scale * (levels[-1] + levels[0]) / 2
        else:
            scale, middle = max(high / levels[-1], low / levels[0]), 0.0
        return float(stored(scale if scale > 0 else 1)), float(stored(middle))
    if zero == "float":
        scale = (high - low) / top
        return float(stored(scale if scale > 0 else 1)), float(stored(low))
    if zero == "integer":
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / top
        scale = scale if scale > 0 else 1
        point = float(np.clip(np.rint(-low / scale), 0, top))
        return float(stored(scale)), -float(stored(scale)) * point
    half = 2 ** (bits - 1)
    scale = max(-low / half, high / (half - 1))
    scale = float(stored(scale if scale > 0 else 1))
    return scale, -scale * half


def nearest(value: float, scale: float, offset: float, bits: int, levels: list[float] | None) -> int:
    """Code of the level nearest to one weight."""
    if levels is None:
        return int(np.clip(np.rint((value - offset) / scale), 0, 2**bits - 1))
    distances = [abs((value - offset) / scale - level) for level in levels]
    return distances.index(min(distances))


def quantize(
    weight: np.ndarray,
    bits: int,
    group_size: int,
    *,
    levels: list[float] | None = None,
    zero: str = "float",
    stored: type = np.float16,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[out, in]`, scales and offsets `[out, groups]`; the last group of a row may be shorter."""
    weight = weight.astype(np.float64)
    rows, columns = weight.shape
    starts = range(0, columns, group_size)
    codes = np.zeros(weight.shape, np.uint8)
    scales, offsets = np.zeros((rows, len(starts))), np.zeros((rows, len(starts)))
    for row in range(rows):
        for k, start in enumerate(starts):
            group = weight[row, start : start + group_size]
            scales[row, k], offsets[row, k] = grid(group, bits, levels, zero, stored)
            for i, value in enumerate(group):
                codes[row, start + i] = nearest(value, scales[row, k], offsets[row, k], bits, levels)
    return codes, scales, offsets


def dequantize(
    codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray, group_size: int, levels: list[float] | None = None
) -> np.ndarray:
    """`scales * levels[codes] + offsets`, float64."""
    weight = np.zeros(codes.shape)
    for row in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            level = codes[row, i] if levels is None else levels[codes[row, i]]
            weight[row, i] = scales[row, i // group_size] * float(level) + offsets[row, i // group_size]
    return weight
