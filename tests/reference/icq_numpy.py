"""Information calibration quantization (IR-QLoRA, section 3.2) of one group, candidate by candidate, in float64."""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

SIGMA = 1 / norm.ppf(0.9677083)


def codes(group: np.ndarray, tau: float, levels: list[float]) -> list[int]:
    """Code of each weight: the level nearest to `(w - tau) / max|w - tau|`."""
    scale = max(abs(value - tau) for value in group) or 1.0
    found = []
    for value in group:
        distances = [abs((value - tau) / scale - level) for level in levels]
        found.append(distances.index(min(distances)))
    return found


def entropy(codes: list[int]) -> float:
    """Equation 6: `-sum_c p_c log2 p_c`."""
    total = 0.0
    for code in set(codes):
        share = codes.count(code) / len(codes)
        total -= share * np.log2(share)
    return total


def candidates(group: np.ndarray, n: int, reach: float) -> list[float]:
    """`median + f * max|w - median|`, nearest to the median first; the lower of two medians, as torch has it."""
    median = sorted(group)[(len(group) - 1) // 2]
    spread = max(abs(value - median) for value in group)
    shifts = [median]
    for step in range(1, n + 1):
        f = step / n * reach * SIGMA
        shifts += [median - f * spread, median + f * spread]
    return shifts


def best_shift(group: np.ndarray, levels: list[float], n: int = 100, reach: float = 0.1) -> tuple[float, float]:
    """The shift of highest entropy and that entropy; zero competes, and equal entropies go to the earlier shift."""
    best, tau = -1.0, 0.0
    for tried in [*candidates(group, n, reach), 0.0]:
        found = entropy(codes(group, tried, levels))
        if found > best + 1e-9:
            best, tau = found, tried
    return tau, best


def best_scaling(group: np.ndarray, bits: int, guard: float, n: int = 50, reach: float = 0.1) -> float:
    """The factor of both ends of an integer group's range whose codes have the highest entropy, one first."""
    top = 2**bits - 1
    best, chosen, bound = -1.0, 1.0, np.inf
    for step in sorted(range(-n, n + 1), key=lambda step: (abs(step), step)):
        factor = 1 + reach * step / n
        low, high = group.min() * factor, group.max() * factor
        scale = (high - low) / top
        coded = [int(np.clip(np.rint((value - low) / scale), 0, top)) for value in group]
        error = sum((value - low - scale * code) ** 2 for value, code in zip(group, coded, strict=True))
        if step == 0:
            bound = guard * error
        found = entropy(coded)
        if found > best + 1e-9 and error <= bound:
            best, chosen = found, factor
    return chosen
