"""LoftQ: a base and an adapter that begin as a low-rank fit to the quantization error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.qlora import qlora
from quadapt.methods.recipe import Recipe
from quadapt.nn.starts import LoftQ


@METHODS.register("loftq")
def loftq(bits: int = 4, group_size: int = 64, **settings: Any) -> Method:
    r"""QLoRA that starts from a low-rank fit to the quantization error. Cannot merge exactly.

    Quantizing and the singular value decomposition of what it lost take turns:

    $$ Q_t = q(W - B_{t-1} A_{t-1}), \qquad B_t A_t = \mathrm{SVD}_r(W - Q_t) $$

    so that `Q [out, in]` and the factors `A [rank, in]`, `B [out, rank]` together begin nearer to the dense matrix than
    `Q` alone. Training then goes on as in QLoRA.

    Args:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Inputs that share a scale.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import loftq
        >>> loftq(bits=2).start.name
        'loftq'

    Source: Li et al. 2023, arXiv:2310.08659, Algorithm 1.
    Differs: the dropout of the authors' code is off, since it would drop part of the fit.
    """
    recipe = Recipe(
        learning_rate=3e-4,
        schedule="cosine",
        warmup_ratio=0.03,
        weight_decay=0.1,
        source="LoftQ's code (GSM8K), without its dropout, which would drop part of the fit",
    )
    found = replace(qlora(bits, group_size), paper="2310.08659", start=LoftQ(), recipe=recipe)
    return found.having(**settings)
