"""Matrix products that are summed in a wider dtype than their operands have."""

from __future__ import annotations

import torch
from torch import Tensor


def operand_dtype(like: Tensor, wide: torch.dtype) -> torch.dtype:
    """What operands of such a product should have, given one of them: that of `like`, but `wide` on the CPU.

    A GPU multiplies short floats ten times faster, and sums them in float32. CPUs without matrix units for short floats
    are faster with `wide`, and exact.
    """
    return wide if like.device.type == "cpu" else like.dtype


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
