"""LQ-LoRA: a decomposition into codes and a low-rank term, and the bits of each matrix by an integer program."""

from __future__ import annotations

from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters import LoRA
from quadapt.nn.starts import LQ
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import LINEAR, Storage


@METHODS.register("lq-lora")
def lq_lora(bits: int = 4, group_size: int = 64, **settings: Any) -> Method:
    r"""NormalFloat and LoRA that begin as one decomposition; bits by budget (--plan). Cannot merge exactly.

    Codes and a low-rank term are fitted to the dense matrix in turns, until the error grows:

    $$ \min_{Q, A, B} \; \lVert \sqrt{F} \odot (W - Q - B A) \rVert_F^2 $$

    where `F [out, in]` is the diagonal Fisher information of the full-precision model (with `fisher=True`) or one.
    With a plan (`quadapt plan`), an integer program gives every matrix its own width, group and storage under a budget
    of bits. Neither codes nor `B A` train: an adapter of the same rank that begins at zero trains beside them,

    $$ y = x (Q + B A)^\top + \tfrac{\alpha}{r} \, x A'^\top B'^\top $$

    with `A' [rank, in]` and `B' [out, rank]`. What is served has twice the rank.

    Args:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Inputs that share a scale.
        settings: Further settings, as :meth:`Method.having` takes them: `fisher`, ..

    Example:
        >>> from quadapt.methods import lq_lora
        >>> lq_lora(bits=3, fisher=True).start.fisher
        True

    Source: Guo et al. 2023, arXiv:2311.12023, section 3.
    Differs: the paper trains `A` and `B` themselves (`train_start=True`), with half the rank served. On small models
        that ended with a higher loss than a start from zero did.
    """
    return Method(
        paper="2311.12023",
        format=Format(levels="nf", group_size=group_size),
        storage=Storage(scales=LINEAR, offsets="absent"),
        rounding=Nearest(),
        adapter=LoRA(train_start=False),
        start=LQ(),
        recipe=Recipe(learning_rate=2e-5, schedule="cosine", warmup_ratio=0.03, source="LQ-LoRA, on C4 (its code)"),
    ).having(bits=bits, **settings)
