"""Matrix products that are summed in a wider dtype than their operands have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from quadapt.hooks import when_imported


def operand_dtype(like: Tensor, wide: torch.dtype) -> torch.dtype:
    """What operands of such a product should have, given one of them: that of `like`, but `wide` on the CPU.

    A GPU multiplies short floats ten times faster, and sums them in float32. CPUs without matrix units for short floats
    are faster with `wide`, and exact.
    """
    return wide if like.device.type == "cpu" else like.dtype


def product_dtype(like: Tensor) -> torch.dtype:
    """In which dtype inputs `like` and a dequantized matrix are multiplied: their own, or float32 on most CPUs.

    What is multiplied in float32 is rounded once, to the dtype of the inputs, at the end. Which it is depends on the
    processor alone, so a trained model and its merge always take the same.
    """
    short = like.dtype in (torch.bfloat16, torch.float16)
    if like.device.type != "cpu" or not short or (like.dtype == torch.bfloat16 and _multiplies_bfloat16()):
        return like.dtype
    return torch.float32


def unrounded(device_type: str, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Inside, autocast does not round operands of a product in `dtype`; nothing is switched where it would not."""
    rounds = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) != dtype
    return torch.autocast(device_type, enabled=False) if rounds else nullcontext()


def large_operand_dtype(like: Tensor, wide: torch.dtype) -> torch.dtype:
    """What operands of a product of a weight's size should have, where time counts more than the last bits.

    As :func:`operand_dtype` says, but CPUs that are quick at bfloat16 multiply it five times faster than float32. Torch
    then rounds each product to bfloat16, as in any other backward pass.
    """
    native = like.dtype == torch.bfloat16 and like.device.type == "cpu" and _multiplies_bfloat16()
    return like.dtype if native else operand_dtype(like, wide)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers faster than float32: with AMX, or as AMD's do with AVX512-BF16.

    Intel's have AVX512-BF16 too, and without AMX take twice as long with it as with float32.
    """
    return _asked()


# A compiled program is made for one processor, and takes this as given.
when_imported("torch._dynamo", lambda: torch.compiler.assume_constant_result(_multiplies_bfloat16))


@cache
def _asked() -> bool:
    avx, amx = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    if amx() or not avx():
        return bool(amx())
    from llvmlite.binding import get_host_cpu_name

    return str(get_host_cpu_name()).startswith("znver")


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
