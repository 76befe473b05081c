"""GPTQ-LoRA: the baseline that rounds by GPTQ and trains an ordinary LoRA over the codes."""

from __future__ import annotations

from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters import LoRA
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.storage import Storage


@METHODS.register("gptq-lora")
def gptq_lora(bits: int = 4, group_size: int = 128, **settings: Any) -> Method:
    r"""Integers rounded by GPTQ, LoRA beside them. Cannot merge exactly.

    GPTQ rounds `W [out, in]` column by column and moves each column's error onto the columns that are not rounded yet,
    which greedily lowers the error of the outputs on calibration text `X [tokens, in]`. An ordinary LoRA, with
    `A [rank, in]` and `B [out, rank]`, trains over the result:

    $$ Q \approx \arg\min_Q \lVert (W - Q) X^\top \rVert^2, \qquad
    y = x Q^\top + \tfrac{\alpha}{r} \, x A^\top B^\top $$

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale.
        settings: Further settings, as :meth:`Method.having` takes them: `damping`, `act_order`, ..

    Example:
        >>> from quadapt.methods import gptq_lora
        >>> gptq_lora(bits=3, damping=0.05).rounding.damping
        0.05

    Source: Frantar et al. 2022, arXiv:2210.17323, Algorithm 1; as a baseline for adapters, LQ-LoRA (arXiv:2311.12023).
    """
    return Method(
        paper="2210.17323",
        format=Format(group_size=group_size),
        storage=Storage(),
        rounding=GPTQ(),
        adapter=LoRA(),
        recipe=Recipe(
            learning_rate=2e-5,
            schedule="cosine",
            warmup_ratio=0.03,
            max_grad_norm=1.0,
            source="the GPTQ-LoRA baseline of LQ-LoRA (arXiv 2311.12023)",
        ),
    ).having(bits=bits, **settings)
