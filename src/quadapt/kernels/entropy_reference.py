"""Entropy of codes in plain torch: any device, meant to be read and to be compared with. See `entropy.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from quadapt.kernels import reference

UNIT = 2.0**32
"""Units of crowding in one: rows of a million weights stay within 64 bits."""


def crowding_table(count: int, device: torch.device) -> Tensor:
    """`n log2 n` for `n` from 0 to `count`, in units of `1 / UNIT`, int64 `[count + 1]`."""
    n = torch.arange(count + 1, dtype=torch.float64)
    return (torch.special.xlogy(n, n) * (UNIT / torch.log(torch.tensor(2.0).double()))).round().long().to(device)


def entropy_shift(weight: Tensor, mids: Tensor, fractions: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Compute `entropy.entropy_shift` in torch; `mids` and `fractions` are in the dtype of `weight`."""
    columns = weight.shape[1]
    whole = columns - columns % group_size
    found = []
    for part, width in ((weight[:, :whole], group_size), (weight[:, whole:], columns - whole)):
        if part.shape[1]:
            groups = part.unflatten(1, (-1, width)).flatten(0, 1).sort(-1).values
            best = _best_shift(groups, mids, fractions)
            found.append([each.view(len(weight), -1) for each in best])
    tau, reach = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return tau, reach


def _best_shift(groups: Tensor, mids: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
    """`tau` and `reach` `[n]` of sorted groups `[n, width]`."""
    low, high, middle = groups[:, 0], groups[:, -1], groups[:, (groups.shape[1] - 1) // 2]
    spread, n = torch.maximum(high - middle, middle - low), len(fractions) // 2
    table = crowding_table(groups.shape[1], groups.device)
    best = torch.full(middle.shape, torch.iinfo(torch.int64).max, device=groups.device)
    tau, reach = middle, spread
    nearest_first = sorted(range(2 * n + 1), key=lambda k: (abs(k - n), k))
    for tried in (*(middle + fractions[k] * spread for k in nearest_first), torch.zeros_like(middle)):
        extent = torch.maximum(high - tried, tried - low)
        below = torch.searchsorted(groups, tried[:, None] + extent[:, None] * mids, right=True)
        counts = torch.nn.functional.pad(below, (1, 0)), torch.nn.functional.pad(below, (0, 1), value=groups.shape[1])
        crowding = table[counts[1] - counts[0]].sum(-1)
        better = crowding < best
        best, tau = torch.where(better, crowding, best), torch.where(better, tried, tau)
        reach = torch.where(better, extent, reach)
    return tau, reach


def group_crowding(weight: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Compute `entropy.group_crowding` in torch, on any device."""
    reference.check_codes(None, bits)
    packed = reference.nearest_codes(weight, scales, offsets, None, bits, group_size)
    return crowding_of(reference.unpack(packed, bits, weight.shape[1]), bits, group_size)


def crowding_of(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Crowding of codes `[rows, in]`, int64 `[rows, groups]`."""
    reference.check_codes(None, bits)
    rows, columns = codes.shape
    groups = torch.arange(columns, device=codes.device) // group_size
    count = -(-columns // group_size)
    cells = groups * 2**bits + codes.long()
    histogram = torch.zeros(rows, count * 2**bits, dtype=torch.int64, device=codes.device)
    histogram.scatter_add_(1, cells, torch.ones_like(cells))
    return crowding_table(min(group_size, columns), codes.device)[histogram.view(rows, count, -1)].sum(-1)
