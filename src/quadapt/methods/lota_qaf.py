"""LoTA-QAF: a ternary product moves codes of an integer base by one step, and its rest moves the offsets."""

from __future__ import annotations

from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters.lota import LoTA
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.storage import Storage


@METHODS.register("lota-qaf")
def lota_qaf(bits: int = 4, group_size: int = 64, **settings: Any) -> Method:
    r"""GPTQ's codes, moved by a step where a ternary product is large; its rest moves offsets. Merges exactly.

    With `A [rank, in]` and `B [out, rank]` of -1, 0 and 1 and `D = B A`,

    $$ \hat W = s \, ( q + m - z + \mu ), \qquad
    m = \mathrm{sign}(D) \, [\, |D| > \omega \,], \qquad
    \mu = \tfrac{1}{\omega} \, \mathrm{mean}_g ( D - \omega m ) $$

    with codes `q [out, in]`, scales and zero-points `s, z [out, groups]`, which stay, and a mean over each group. No
    code leaves its range. The factors have no learning rate: t-SignSGD moves the entries with the largest gradients by
    one, fewer and fewer of them (`quadapt.train.sign_sgd`).

    A smaller omega moves more, and sooner: where steps are few or the base is far from the task, `omega=0.5` ends at a
    much lower loss than the paper's 0.75.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale and a zero-point.
        settings: Further settings, as :meth:`Method.having` takes them: `omega`, the share of the rank above which
            codes move; `shift_offsets`, whether the rest moves offsets, which are floats then.

    Example:
        >>> from quadapt.methods import lota_qaf
        >>> lota_qaf(bits=2, omega=0.875).adapter.limit(64)
        56.0

    Source: Chen et al. 2025, arXiv:2505.18724, section 3, and its code.
    """
    return Method(
        paper="2505.18724",
        format=Format(group_size=group_size, zero="integer"),
        storage=Storage(offsets="integer"),
        rounding=GPTQ(),
        adapter=LoTA(),
        recipe=Recipe(
            learning_rate=1e-4,
            rank=64,
            alpha=64,
            max_grad_norm=0.0,
            source="LoTA-QAF's code: batches of 64, 300 steps on Alpaca; the rate is of what trains beside the factors",
        ),
    ).having(bits=bits, **settings)
