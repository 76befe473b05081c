"""PEQA: of a quantized model the scales alone train."""

from __future__ import annotations

from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters import Scales
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage


@METHODS.register("peqa")
def peqa(bits: int = 4, group_size: int = -1, **settings: Any) -> Method:
    r"""Integers, of which the scales train, one a row. Merges exactly.

    $$ \hat W_{oi} = (s_o + \Delta s_o) \, (c_{oi} - z_o) $$

    with codes `c [out, in]`, which stay, and scales `s [out, groups]`, one a row unless `group_size` says otherwise.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale; -1 for the whole row, as in the paper.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import peqa
        >>> peqa(bits=3).format.name
        'int3-row'

    Source: Kim et al. 2023, arXiv:2305.14152.
    Differs: a scale trains by its logarithm, so that it stays positive and a step is relative to it; the learning rate
        is ours, since the paper's are per model and absolute.
    """
    return Method(
        paper="2305.14152",
        format=Format(group_size=group_size),
        storage=Storage(),
        rounding=Nearest(range="mse"),
        adapter=Scales(),
        recipe=Recipe(learning_rate=1e-3, rank=1, alpha=1, source="ours: the paper's rates are per model and absolute"),
    ).having(bits=bits, **settings)
