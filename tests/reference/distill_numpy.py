"""Distances of two categorical distributions, as their definitions say, outcome by outcome, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def softmax(logits: Floats, temperature: float) -> Floats:
    """Probabilities of one row of logits."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    raised = np.exp(scaled - scaled.max())
    return raised / raised.sum()


def kl(p: Sequence[float] | Floats, q: Sequence[float] | Floats) -> float:
    """Sum of p log(p / q) over outcomes, where 0 log 0 is 0."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jsd(p: Sequence[float] | Floats, q: Sequence[float] | Floats, beta: float) -> float:
    """The generalized Jensen-Shannon divergence of arXiv:2306.13649, section 2: `p` is the teacher."""
    mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)


def joined(p: Floats, ids: Sequence[int]) -> list[float]:
    """A distribution over some outcomes and one that stands for all others."""
    return [*(float(p[at]) for at in ids), math.fsum(p[at] for at in range(len(p)) if at not in set(ids))]
