"""EfficientQAT: blocks are trained one after the other, then all scales together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadapt.methods.base import METHODS, Method
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters import Scales
from quadapt.nn.block_ap import BlockAP
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage


@METHODS.register("e2e-qp")
def e2e_qp(bits: int = 4, group_size: int = 64, **settings: Any) -> Method:
    r"""Integers in groups, of which the scales train (EfficientQAT's second stage). Merges exactly.

    $$ \hat W_{oi} = s_{og} \, (c_{oi} - z_{og}) $$

    with codes `c [out, in]` and whole zero-points `z [out, groups]`, which stay, and scales `s [out, groups]`, which
    train on the task.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale and a zero-point.
        settings: Further settings, as :meth:`Method.having` takes them.

    Example:
        >>> from quadapt.methods import e2e_qp
        >>> e2e_qp().format.name
        'int4-zp-g64'

    Source: Chen et al. 2024, arXiv:2407.11062 (its end-to-end training of quantization parameters).
    Differs: a scale trains by its logarithm, and the learning rate is relative to it.
    """
    return Method(
        paper="2407.11062",
        format=Format(group_size=group_size, zero="integer"),
        storage=Storage(offsets="integer"),
        rounding=Nearest(),
        adapter=Scales(),
        recipe=Recipe(
            learning_rate=1e-3,
            rank=1,
            alpha=1,
            schedule="cosine",
            warmup_ratio=0.03,
            source="EfficientQAT; its 1e-5 on steps of about 0.01 is 1e-3 relative to them",
        ),
    ).having(bits=bits, **settings)


@METHODS.register("efficientqat")
def efficientqat(bits: int = 4, group_size: int = 64, **settings: Any) -> Method:
    r"""e2e-qp over a base of Block-AP: weights, scales and offsets of each block are trained first.

    Block by block, all of `W [out, in]`, `s` and `z` `[out, groups]` are trained to lower the error of the quantized
    block's output,

    $$ \min_{W, s, z} \; \lVert f_{\hat W}(\hat h) - f_W(h) \rVert^2 $$

    where `h [batch, tokens, hidden]` comes from the dense blocks before it and \( \hat h \) from the quantized ones.
    Then codes are fixed, and the scales of all blocks train on the task as in :func:`e2e_qp`.

    Args:
        bits: Width of a code.
        group_size: Inputs that share a scale and a zero-point.
        settings: Further settings, as :meth:`Method.having` takes them: `calibration_epochs`, ..

    Example:
        >>> from quadapt.methods import efficientqat
        >>> efficientqat(bits=2, calibration_epochs=4).rounding.epochs
        4

    Source: Chen et al. 2024, arXiv:2407.11062, section 3.2.
    Differs: see the rounding `block-ap`.
    """
    return replace(e2e_qp(bits, group_size), rounding=BlockAP()).having(**settings)
