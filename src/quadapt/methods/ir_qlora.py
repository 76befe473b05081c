"""IR-QLoRA: ranges that keep the entropy of codes high, and adapters with elastic connections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.qa_lora import qa_lora
from quadapt.methods.qlora import qlora
from quadapt.nn.adapters import Elastic, ElasticPooled
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage


@METHODS.register("ir-qlora")
def ir_qlora(bits: int = 4, group_size: int = 64, **settings: Any) -> Method:
    r"""NF4 shifted for entropy, doubly quantized, and LoRA with elastic connections. Cannot merge exactly.

    Each group is shifted by the \( \tau \) for which its codes carry the most bits, and the adapter has short cuts that
    average inputs and spread latents, each with one trained number a layer:

    $$ \hat W_{oi} = s_{og} \, \ell[c_{oi}] + \tau_{og}, \qquad
    y = x \hat W^\top + \tfrac{\alpha}{r} \, U_2(U_1(x)) $$

    $$ U_1(x) = x A^\top + \beta_1 \, x M_1, \qquad U_2(z) = z B^\top + \beta_2 \, z M_2 $$

    with `A [rank, in]`, `B [out, rank]`, and fixed averages `M1 [in, rank]` and `M2 [rank, out]`. Both connections are
    linear, so that the whole is an ordinary LoRA of the same rank once trained.

    Args:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Inputs that share a scale and a shift.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import ir_qlora
        >>> ir_qlora(bits=2).rounding.range
        'icq'

    Source: Qin et al. 2024, arXiv:2402.05445, equations 6 to 16.
    Differs: see the range `icq` and the adapter `elastic`, where the paper and its code disagree.
    """
    base = qlora()
    return Method(
        paper="2402.05445",
        format=Format(levels="nf", group_size=group_size, zero="float"),
        storage=Storage(scales="double", offsets="double"),
        rounding=Nearest(range="icq"),
        adapter=Elastic(),
        recipe=replace(base.recipe, source="IR-QLoRA, up to 13B (1e-4 and dropout 0.05 above)"),
    ).having(bits=bits, **settings)


@METHODS.register("ir-qa-lora")
def ir_qa_lora(bits: int = 4, group_size: int = 32, **settings: Any) -> Method:
    r"""QA-LoRA with IR-QLoRA's ranges and connections, pooled. Merges exactly into the offsets.

    As :func:`qa_lora`, with each group's range scaled by the factor for which its codes carry the most bits, and with
    the connections of :func:`ir_qlora` over pooled inputs:

    $$ \hat W_{oi} = s_{og} \, c_{oi} + z_{og} + \tfrac{\alpha}{r}
    \big( (B + \beta_2 M_2^\top)(A + \beta_1 M_1^\top) \big)_{og} $$

    with `A [rank, groups]`, `B [out, rank]` and fixed averages `M1 [groups, rank]` and `M2 [rank, out]`.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale, an offset and a column of `A`.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import ir_qa_lora
        >>> ir_qa_lora().adapter.exactness
        'exact'

    Source: Qin et al. 2024, arXiv:2402.05445 (its variant for QA-LoRA).
    Differs: connections start from the pooled inputs, so that the merge is exact for every shape.
    """
    found = replace(
        qa_lora(bits, group_size), paper="2402.05445", rounding=GPTQ(range="icq-scale"), adapter=ElasticPooled()
    )
    return found.having(**settings)
