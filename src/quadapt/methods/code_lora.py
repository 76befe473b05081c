"""A real-valued low-rank term among the codes of any integer base, which no paper has."""

from __future__ import annotations

from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters.code_lora import CodeLoRA
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.storage import Storage


@METHODS.register("code-lora")
def code_lora(bits: int = 4, group_size: int = 64, **settings: Any) -> Method:
    r"""GPTQ's codes, moved by a low-rank term that is rounded with them. Merges exactly, and keeps the format.

    $$ \hat W = s \, \big( \mathrm{clamp}( \mathrm{round}( q + \tfrac{\alpha}{r} B A ) ) - z \big) $$

    with codes `q [out, in]`, scales and whole zero-points `s, z [out, groups]`, and `A [rank, in]` and `B [out, rank]`,
    which train straight through the rounding. Scales and zero-points stay, or train as well. Training needs the memory
    of a quantized model, and the result goes back into whatever format the base came from.

    No code moves until the low-rank term reaches half a step. So rates are larger than LoRA's, and `A` begins larger.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale and a zero-point.
        settings: Further settings, as :meth:`Method.having` takes them: `train_scales`, `train_offsets`, `init_scale`,
            and any rounding.

    Example:
        >>> from quadapt.methods import code_lora
        >>> code_lora(bits=3, rounding="nearest", train_scales=True).adapter.train_scales
        True

    Source: ours; the idea is that of LR-QAT (arXiv:2406.06385), whose base keeps fractions of codes.
    """
    return Method(
        format=Format(group_size=group_size, zero="integer"),
        storage=Storage(offsets="integer"),
        rounding=GPTQ(),
        adapter=CodeLoRA(init_scale=32.0),
        recipe=Recipe(
            learning_rate=1e-2,
            grid_learning_rate=1e-3,
            rank=32,
            alpha=32,
            schedule="linear",
            warmup_ratio=0.1,
            max_grad_norm=1.0,
            source="ours: 60 steps on the embedded model at 4, 3 and 2 bits",
        ),
    ).having(bits=bits, **settings)
