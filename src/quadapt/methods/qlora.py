"""QLoRA: NormalFloat with double-quantized scales under an ordinary LoRA."""

from __future__ import annotations

from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters import LoRA
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage


@METHODS.register("qlora")
def qlora(bits: int = 4, group_size: int = 64, **settings: Any) -> Method:
    r"""NF4 with double-quantized scales, LoRA beside it. Cannot merge exactly.

    The frozen weight is held as NormalFloat, whose levels are quantiles of the normal distribution, and an ordinary
    LoRA trains beside it:

    $$ y = x \, \hat W^\top + \frac{\alpha}{r} \, x A^\top B^\top, \qquad \hat W_{oi} = s_{og} \, \ell[c_{oi}] $$

    with `W [out, in]`, codes `c [out, in]`, scales `s [out, groups]`, `A [rank, in]` and `B [out, rank]`. The scales
    are themselves held as 8-bit codes with one float32 constant for 256 of them, so that a scale costs 0.127 bits a
    weight in groups of 64. The update changes weights within a group, which codes cannot follow: serve base and
    adapter, or requantize and accept the loss.

    Args:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Inputs that share a scale.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import qlora
        >>> qlora(bits=3, rank=16).format.name
        'nf3-g64'

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    return Method(
        paper="2305.14314",
        format=Format(levels="nf", group_size=group_size),
        storage=Storage(scales="double", offsets="absent"),
        rounding=Nearest(code_against="exact"),
        adapter=LoRA(),
        recipe=Recipe(learning_rate=2e-4, dropout=0.1, source="QLoRA, up to 13B (1e-4 and dropout 0.05 above)"),
    ).having(bits=bits, **settings)
