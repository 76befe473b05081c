"""Matrix products that are summed in a wider dtype than their operands have."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def operand_dtype(like: Tensor, wide: torch.dtype) -> torch.dtype:
    """What operands of such a product should have, given one of them: that of `like`, but `wide` on the CPU.

    A GPU multiplies short floats ten times faster, and sums them in float32. CPUs without matrix units for short floats
    are faster with `wide`, and exact.
    """
    return wide if like.device.type == "cpu" else like.dtype


def large_operand_dtype(like: Tensor, wide: torch.dtype) -> torch.dtype:
    """What operands of a product of a weight's size should have, where time counts more than the last bits.

    As :func:`operand_dtype` says, but for CPUs that have instructions for bfloat16 (AVX512-BF16, AMX), these multiply
    it five times faster than float32. Torch then rounds each product to bfloat16, as in any other backward pass.
    """
    native = like.dtype == torch.bfloat16 and like.device.type == "cpu" and _multiplies_bfloat16()
    return like.dtype if native else operand_dtype(like, wide)


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers."""
    asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(ask() for ask in asked if ask is not None)


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add `left @ right` to `total`, or put it there if it is the first; summed in the dtype of `total`."""
    if left.dtype == total.dtype:
        if first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
    elif first and left.is_cuda:  # matrix units sum in float32: asked for, the sum is not rounded
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        product = torch.mm(left, right, out_dtype=total.dtype) if left.is_cuda else left @ right
        total.copy_(product) if first else total.add_(product)
