"""Tune first, then quantize towards what was tuned: the order in which least is lost."""

from __future__ import annotations

from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.first import LoRAFirst
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters import LRQAT
from quadapt.nn.block_ap import BlockAP
from quadapt.nn.objective import OBJECTIVES
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage


@METHODS.register("recover")
def recover(bits: int = 4, group_size: int = 128, **settings: Any) -> Method:
    r"""LoRA over the dense model, Block-AP towards the tuned one, and a distilled finish. Merges exactly.

    Three stages, whose steps are counted together:

    1. LoRA tunes the dense model `W [out, in]`, and is merged into it: \( \tilde W = W + \frac{\alpha}{r} B A \).
    2. Block by block, weights, scales and offsets are trained until the quantized block does what the tuned one does
       on the training text (the rounding `block-ap`). That gives real-valued codes `v [out, in]`.
    3. A low-rank term among the codes, scales and offsets train together (the adapter `lr-qat`),

    $$ \hat W = s \, \mathrm{clamp}\big( \mathrm{round}( v + \tfrac{\alpha}{r} B A ) \big) + z $$

    towards the data and, as much, the tuned model's predictions, which stay the teacher: what rounding took from the
    task is brought back where the whole model sees it.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale and an offset.
        settings: Further settings, as :meth:`Method.having` takes them: `first_share`, `calibration_epochs`, `rank`, ..

    Example:
        >>> from quadapt.methods import recover
        >>> method = recover(bits=3, first_share=0.8)
        >>> method.tune_first.name, method.rounding.name, method.objective.name
        ('lora', 'block-ap', 'kl')

    Source: ours; of LoRA (arXiv:2106.09685), EfficientQAT's Block-AP (arXiv:2407.11062), LR-QAT (arXiv:2406.06385) and
        distillation (arXiv:1503.02531).
    """
    distilled: Any = OBJECTIVES["kl"]
    return Method(
        format=Format(group_size=group_size),
        storage=Storage(),
        rounding=BlockAP(epochs=8, range="mse"),
        adapter=LRQAT(),
        tune_first=LoRAFirst(share=0.9),
        objective=distilled(weight=0.5),
        recipe=Recipe(
            learning_rate=2e-4,
            grid_learning_rate=1e-4,
            rank=16,
            alpha=16,
            schedule="linear",
            warmup_ratio=0.1,
            max_grad_norm=1.0,
            source="LoRA's usual rate; shares, epochs and proportions ours, searched on small models",
        ),
    ).having(bits=bits, **settings)
