"""CLoQ: GPTQ's codes, and the low-rank term that is best for the outputs, in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.gptq_lora import gptq_lora
from quadapt.methods.quailora import RECIPE
from quadapt.nn.starts import CLoQ


@METHODS.register("cloq")
def cloq(bits: int = 4, group_size: int = 64, **settings: Any) -> Method:
    r"""Integers rounded by GPTQ, LoRA from the best fit to outputs. Cannot merge exactly.

    Of all low-rank terms the one with the least error of the outputs on calibration text, without iterations: with
    `H = R^T R [in, in]` the second moment of the inputs and `E = W - Q [out, in]`,

    $$ B A = \mathrm{SVD}_r(E R^\top) \, R^{-\top} $$

    with `A [rank, in]` and `B [out, rank]`.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import cloq
        >>> cloq(bits=2).start.name, cloq(bits=2).rounding.name
        ('cloq', 'gptq')

    Source: Deng et al. 2025, arXiv:2501.18475.
    Differs: the recipe is QuAILoRA's, since the paper's learning rates are per task.
    """
    recipe = replace(RECIPE, source="QuAILoRA's: CLoQ's own rates are per task")
    found = replace(gptq_lora(bits, group_size), paper="2501.18475", start=CLoQ(), recipe=recipe)
    return found.having(**settings)
