"""LR-QAT: a low-rank term among the codes of a frozen fixed-point base."""

from __future__ import annotations

from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters import LRQAT
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage


@METHODS.register("lr-qat")
def lr_qat(bits: int = 4, group_size: int = 128, **settings: Any) -> Method:
    r"""A low-rank term among the codes of a frozen fixed-point base, and scales. Merges exactly.

    $$ \hat W = s \, \mathrm{clamp}\big( \mathrm{round}( \Phi_0 + \tfrac{\alpha}{r} B A ) \big) $$

    where `Phi0 [out, in]` is the dense matrix in units of the scale, held in 8-bit fixed point, `A [rank, in]` and
    `B [out, rank]` train, and so do the scales `s [out, groups]`. Training needs the memory of a quantized model, and
    what the forward multiplies with is what the merge stores.

    Args:
        bits: Width of a code of the product, below 8.
        group_size: Inputs that share a scale.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import lr_qat
        >>> lr_qat(bits=3).adapter.bits
        3

    Source: Bondarenko et al. 2024, arXiv:2406.06385.
    Differs: the fixed point reaches just below `2**(bits - 1)`, where the authors clip to the last code; `zero="float"`
        lets offsets train too, and any rounding may choose the first codes.
    """
    return Method(
        paper="2406.06385",
        format=Format(group_size=group_size, zero="none"),
        storage=Storage(offsets="absent"),
        rounding=Nearest(range="mse"),
        adapter=LRQAT(),
        recipe=Recipe(
            learning_rate=1e-3,
            grid_learning_rate=1e-3,
            rank=32,
            alpha=32,
            schedule="linear",
            warmup_ratio=0.1,
            max_grad_norm=1.0,
            adam_beta2=0.95,
            source="LR-QAT's README; its 1e-5 for scales is 1e-3 relative to them",
        ),
    ).having(bits=bits, **settings)
