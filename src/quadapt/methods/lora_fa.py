"""LoRA-FA: LoRA of which `B` alone trains, over codes, and over pooled inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.qa_lora import qa_lora
from quadapt.methods.qlora import qlora
from quadapt.nn.adapters.lora_fa import LoRAFA, PooledFA


@METHODS.register("lora-fa")
def lora_fa(bits: int = 4, group_size: int = 64, **settings: Any) -> Method:
    r"""QLoRA of which B alone trains, with little memory for activations. Cannot merge exactly.

    $$ y = x \, \hat W^\top + \frac{\alpha}{r} \, (x A^\top) B^\top, \qquad A \text{ frozen} $$

    with `A [rank, in]` at its random start and `B [out, rank]`, which trains. What a layer keeps for backward is
    `x A^T [tokens, rank]` instead of `x [tokens, in]`.

    Args:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Inputs that share a scale.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import lora_fa
        >>> lora_fa(bits=3).adapter.kind
        'lora-fa'

    Source: Zhang et al. 2023, arXiv:2308.03303, section 3.
    Differs: the frozen weight is quantized as QLoRA's, and so is the recipe; the paper's weights are 16-bit floats, and
        its learning rates are per model.
    """
    base = qlora(bits, group_size)
    recipe = replace(base.recipe, source="QLoRA's: LoRA-FA's own rates are per model")
    return replace(base, paper="2308.03303", adapter=LoRAFA(), recipe=recipe).having(**settings)


@METHODS.register("qa-lora-fa")
def qa_lora_fa(bits: int = 4, group_size: int = 32, **settings: Any) -> Method:
    r"""QA-LoRA of which B alone trains. Merges exactly into the offsets.

    $$ \hat W_{oi} = s_{og} \, c_{oi} + z_{og} + \tfrac{\alpha}{r} (B A)_{og}, \qquad A \text{ frozen} $$

    with `A [rank, groups]` at its random start and `B [out, rank]`, which trains; the rest as in :func:`qa_lora`. What
    a layer keeps for backward is its inputs, summed over groups, times `A^T`: `[tokens, rank]`.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale, an offset and a column of `A`.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import qa_lora_fa
        >>> qa_lora_fa().adapter.exactness
        'exact'

    Source: Zhang et al. 2023, arXiv:2308.03303, for an adapter as QA-LoRA's (arXiv:2309.14717).
    """
    return replace(qa_lora(bits, group_size), paper="2308.03303", adapter=PooledFA()).having(**settings)
