"""QA-LoRA: an adapter that sees its inputs summed over each group, and merges into the offsets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters import Pooled, Scales
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.storage import Storage


@METHODS.register("qa-lora")
def qa_lora(bits: int = 4, group_size: int = 32, **settings: Any) -> Method:
    r"""Integers rounded by GPTQ, adapter over pooled inputs. Merges exactly into the offsets.

    The update is the same for all inputs of a quantization group, so it is a shift of the group's offset, and merging
    moves neither codes nor scales:

    $$ \hat W_{oi} = s_{og} \, c_{oi} + z_{og} + \tfrac{\alpha}{r} (B A)_{og}, \qquad g = \text{group of } i $$

    with codes `c [out, in]`, scales `s` and offsets `z [out, groups]`, `A [rank, groups]` and `B [out, rank]`. Training
    computes with the offsets that the merge will store, so the merged model is the trained one, bit for bit.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale, an offset and a column of `A`.
        settings: Further settings, as :meth:`Method.having` takes them: `pooling`, `form`, ..

    Example:
        >>> from quadapt.methods import qa_lora
        >>> method = qa_lora(bits=2, rank=8)
        >>> method.format.name, method.adapter.exactness
        ('int2-g32', 'exact')

    Source: Xu et al. 2023, arXiv:2309.14717, section 3 and Algorithm 1.
    Differs: the paper trains a side branch on pooled inputs (`form="side"`), which equals the merged model but for
        rounding.
    """
    return Method(
        paper="2309.14717",
        format=Format(group_size=group_size),
        storage=Storage(),
        rounding=GPTQ(),
        adapter=Pooled(),
        recipe=Recipe(learning_rate=2e-5, source="QA-LoRA, 7B and 13B (1e-5 above)"),
    ).having(bits=bits, **settings)


@METHODS.register("qa-lora-scales")
def qa_lora_scales(bits: int = 4, group_size: int = 32, **settings: Any) -> Method:
    r"""QA-LoRA, and the scales train with it. Merges exactly; no paper has it.

    $$ \hat W_{oi} = s_{og} e^{\rho_{og}} c_{oi} + z_{og} e^{\rho_{og}} + \tfrac{\alpha}{r} (B A)_{og} $$

    with `rho [out, groups]`, which is zero at first; the rest as in :func:`qa_lora`.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale, an offset and a column of `A`.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import qa_lora_scales
        >>> qa_lora_scales().recipe.grid_learning_rate
        0.001

    Source: ours; of QA-LoRA (arXiv:2309.14717) and EfficientQAT's second stage (arXiv:2407.11062).
    """
    recipe = Recipe(learning_rate=2e-5, grid_learning_rate=1e-3, source="QA-LoRA; for scales as e2e-qp")
    return replace(qa_lora(bits, group_size), adapter=Scales(pooled=True), recipe=recipe).having(**settings)
