"""NormalFloat levels: the published tables, and QLoRA's rule from the standard library's normal quantiles."""

from __future__ import annotations

from statistics import NormalDist

DELTA = 0.9677083
"""QLoRA's outermost quantile."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""As in bitsandbytes."""

NF3 = (-1.0, -0.4786292, -0.2171418, 0.0, 0.1609302, 0.3379152, 0.5626170, 1.0)
"""As in IR-QLoRA (arXiv:2402.05445)."""

NF2 = (-1.0, 0.0, 0.3379152, 1.0)
"""As in LoftQ."""

NF2_SYMMETRIC = (-1.0, -0.2525685, 0.2525685, 1.0)
"""As in IR-QLoRA."""


def asymmetric(bits: int) -> list[float]:
    """Levels evenly spaced in probability: half of them below the median, half and one more from it upwards."""
    quantile = NormalDist().inv_cdf
    half = 2 ** (bits - 1)
    below = [quantile(1 - DELTA + (DELTA - 0.5) * i / (half - 1)) for i in range(half - 1)]
    above = [quantile(0.5 + (DELTA - 0.5) * i / half) for i in range(half + 1)]
    return [value / quantile(DELTA) for value in below + above]


def symmetric(bits: int) -> list[float]:
    """Midpoints of one more quantile than levels, normalized."""
    quantile = NormalDist().inv_cdf
    count = 2**bits
    edges = [quantile(1 - DELTA + (2 * DELTA - 1) * i / count) for i in range(count + 1)]
    middles = [(edges[i] + edges[i + 1]) / 2 for i in range(count)]
    return [value / middles[-1] for value in middles]
