"""QuAILoRA: an adapter that begins as a fit to what quantization did to the layer's outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.qlora import qlora
from quadapt.methods.recipe import Recipe
from quadapt.nn.starts import QuAILoRA

RECIPE = Recipe(learning_rate=2e-4, warmup_ratio=0.03, source="QuAILoRA §4")


@METHODS.register("quailora")
def quailora(bits: int = 4, group_size: int = 64, **settings: Any) -> Method:
    r"""QLoRA that starts from a fit to what quantization did to outputs. Cannot merge exactly.

    The first factors lower the error of the layer's outputs on calibration text rather than that of its weights:

    $$ \min_{A, B} \; \mathbb{E} \lVert (W - Q - B A) \, x \rVert^2 = \mathrm{tr}\big[ (E - BA) H (E - BA)^\top \big],
    \qquad H = \mathbb{E}[x x^\top] $$

    with `E = W - Q [out, in]` and the second moment `H [in, in]` of the inputs in the full-precision model.
    `A [rank, in]` and `B [out, rank]` are found by alternating least squares, from the singular value decomposition of
    `E`.

    Args:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Inputs that share a scale.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import quailora
        >>> quailora(bits=4).start.needs
        frozenset({'dense_second_moment'})

    Source: Lawton et al. 2024, arXiv:2410.14713, equations 2 to 6.
    """
    found = replace(qlora(bits, group_size), paper="2410.14713", start=QuAILoRA(), recipe=RECIPE)
    return found.having(**settings)
