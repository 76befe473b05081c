"""How well a model predicts text, and how often its answers are exactly right.

A model is left as it was found: each of its modules in the mode, training or evaluation, that it was in.
"""

from __future__ import annotations

from quadapt.evaluate.answers import ExactMatch, Sample, exact_match, generate_samples
from quadapt.evaluate.mode import context_limit, evaluating
from quadapt.evaluate.windows import Perplexity, joined_perplexity, perplexity

__all__ = [
    "ExactMatch",
    "Perplexity",
    "Sample",
    "context_limit",
    "evaluating",
    "exact_match",
    "generate_samples",
    "joined_perplexity",
    "perplexity",
]
