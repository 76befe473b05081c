"""L4Q: the forward quantizes the dense matrix with its low-rank update inside; and QAT-LoRA, its baseline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters import L4Q, QATLoRA
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage


@METHODS.register("l4q")
def l4q(bits: int = 4, group_size: int = 128, **settings: Any) -> Method:
    r"""Quantizes W + B A inside the forward; A, B, scales and offsets train. Merges exactly.

    $$ \hat W = s \, \mathrm{round}\Big( \mathrm{clamp}\Big( \frac{W_0 + \frac{\alpha}{r} B A - b}{s} \Big) \Big) + b $$

    with the dense `W0 [out, in]`, `A [rank, in]`, `B [out, rank]`, scales `s` and offsets `b [out, groups]`. All of
    these but `W0` train, and the forward multiplies with what the merge stores. Training needs the memory of LoRA over
    16-bit weights.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale and an offset.
        settings: Further settings, as :meth:`Method.having` takes them: `init`, `zero`, `dense_steps`, .. With another
            rounding than to nearest over the whole range (`rounding="gptq"`, `"block-ap"`, or a `range`), training
            begins with the codes, scales and offsets which that chooses.

    Example:
        >>> from quadapt.methods import l4q
        >>> l4q(bits=3, zero="integer").adapter.offsets
        'integer'

    Source: Jeon et al. 2024, arXiv:2402.04902; first scales of equation 15.
    Differs: scales and offsets train relative to the first scale.
    """
    return Method(
        paper="2402.04902",
        format=Format(group_size=group_size),
        storage=Storage(),
        rounding=Nearest(),
        adapter=L4Q(),
        recipe=Recipe(
            learning_rate=2e-4,
            grid_learning_rate=1e-3,
            rank=4,
            alpha=4,
            schedule="cosine",
            warmup_ratio=0.1,
            weight_decay=0.01,
            max_grad_norm=1.0,
            source="L4Q, Llama-2 7B (appendix D); for scales ours, relative to them",
        ),
    ).having(bits=bits, **settings)


@METHODS.register("qat-lora")
def qat_lora(bits: int = 4, group_size: int = 128, **settings: Any) -> Method:
    r"""L4Q's baseline: a trained quantizer, and LoRA beside it. Cannot merge exactly.

    $$ y = x \, q(W_0; s, b)^\top + \tfrac{\alpha}{r} \, x A^\top B^\top $$

    with scales `s` and offsets `b [out, groups]`, `A [rank, in]` and `B [out, rank]`, which all train.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale and an offset.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import qat_lora
        >>> qat_lora().adapter.exactness
        'none'

    Source: Jeon et al. 2024, arXiv:2402.04902 (its baseline).
    """
    return replace(l4q(bits, group_size), adapter=QATLoRA()).having(**settings)
