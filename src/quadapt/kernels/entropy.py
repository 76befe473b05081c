"""How evenly a group's weights spread over its codes, and the shift that spreads them best, behind one dispatch.

The entropy of `n` codes, `n_c` of them equal to `c`, is `log2 n - crowding / n` with `crowding = sum_c n_c log2 n_c`.
Crowding is summed in whole units of `1 / UNIT`: two histograms that differ in their order alone are then exactly tied,
on every device. `entropy_reference.py` (plain torch) says what is computed; `entropy_cpu.py` (numba) and
`entropy_cuda.py` (Triton) give the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quadapt.kernels import entropy_reference
from quadapt.kernels.dispatch import kernels_for
from quadapt.kernels.entropy_reference import UNIT

__all__ = ["entropy_shift", "group_crowding", "group_entropy"]


def entropy_shift(weight: Tensor, mids: Tensor, fractions: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The shift of each group whose codes have the highest entropy, of a few about its median, and of zero.

    Candidates are `tau = median + fraction * max|w - median|`, the lower of two medians, and `tau = 0`. Thresholds of
    the codes lie at `tau + reach * mid`, with `reach = max|w - tau|`. Of candidates with equal entropy the one nearest
    to the median wins (of two as near, the lower), and zero only if it is better than all.

    Args:
        weight: Float32 or float64 `[rows, in]`, finite; the last group of a row may be shorter.
        mids: Ascending thresholds between levels from -1 to 1, `[levels - 1]`.
        fractions: Ascending, symmetric, with zero in the middle, `[2 * n + 1]`; each below 1.
        group_size: Inputs in a full group.

    Returns:
        `tau` and `reach`, `[rows, groups]`, in the dtype of `weight`.
    """
    kernel = kernels_for(weight.device, "entropy").entropy_shift
    return kernel(weight, mids.to(weight.dtype), fractions.to(weight), group_size)


def group_crowding(weight: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Crowding of the integer codes that rounding to nearest gives each group, int64 `[rows, groups]`.

    Of one group, lower is more entropy. Arguments as for `reference.nearest_codes`.
    """
    return kernels_for(weight.device, "entropy").group_crowding(weight, scales, offsets, bits, group_size)


def group_entropy(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Entropy in bits of the codes of each group, float64 `[rows, groups]`, from uint8 codes `[rows, in]`."""
    columns = codes.shape[1]
    starts = torch.arange(0, columns, group_size, device=codes.device)
    sizes = (columns - starts).clamp(max=group_size).double()
    return sizes.log2() - entropy_reference.crowding_of(codes, bits, group_size).double() / UNIT / sizes
