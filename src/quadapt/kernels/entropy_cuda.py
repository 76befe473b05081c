"""Entropy of codes on CUDA devices, in Triton: the numbers of `entropy_reference.py`. See `entropy.py`.

Groups lie along a program's threads, so that each thread has a whole group in its registers and counts without help of
others: of a few hundred candidates and up to fifteen thresholds, every weight is compared with all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadapt.kernels import entropy_reference
from quadapt.kernels.entropy_reference import crowding_table
from quadapt.kernels.reference import check_codes
from quadapt.kernels.tiles import grid_of, launch, nearest_code, parts, power

_GROUPS = 128
"""Groups of a program: one for each thread."""

_COMPARED = 8192
"""Weights times levels that a program compares at once: 64 for each of its threads."""

_WIDEST = 256
"""Most weights of a group that a program holds; wider ones are sorted (`entropy_reference`)."""


@triton.jit
def _entropy_shift(
    weight,
    middle,
    mids,
    fractions,
    table,
    tau,
    reach,
    count,
    width,
    tried,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group, i = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, WIDTH)
    there = group < count
    real = (i < width)[:, None]
    value = tl.load(weight + group.to(tl.int64)[None, :] * width + i[:, None], mask=real & there[None, :], other=0)
    high = tl.max(tl.where(real, value, float("-inf")), axis=0)
    value = tl.where(real, value, float("inf"))  # what pads a group is never below a threshold
    low = tl.min(value, axis=0)
    center = tl.load(middle + group, mask=there, other=0)
    spread = tl.maximum(high - center, center - low)
    best = tl.full([GROUPS], 0x7FFFFFFFFFFFFFFF, tl.int64)
    best_tau, best_reach = center, spread
    for candidate in range(tried + 1):
        shift = center + tl.load(fractions + candidate) * spread
        if candidate == tried:  # the last is no shift at all
            shift = tl.zeros_like(center)
        extent = tl.maximum(high - shift, shift - low)
        crowding = tl.zeros([GROUPS], tl.int64)
        before = tl.zeros([GROUPS], tl.int32)
        for threshold in range(COUNT):
            edge = shift + extent * tl.load(mids + threshold)
            below = tl.sum((value <= edge[None, :]).to(tl.int32), axis=0)
            crowding += tl.load(table + (below - before))
            before = below
        crowding += tl.load(table + (width - before))
        better = crowding < best
        best = tl.where(better, crowding, best)
        best_tau, best_reach = tl.where(better, shift, best_tau), tl.where(better, extent, best_reach)
    tl.store(tau + group, best_tau, mask=there)
    tl.store(reach + group, best_reach, mask=there)


@triton.jit
def _group_crowding(
    weight,
    scales,
    offsets,
    table,
    crowding,
    rows,
    columns,
    groups,
    group,
    BITS: tl.constexpr,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, g = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    start, there = row.to(tl.int64), row < rows
    scale, shift = grid_of(scales, offsets, start * groups + g, there, SHIFTED)
    last = tl.minimum(columns, (g + 1) * group)
    level = tl.arange(0, 1 << BITS)
    counts = tl.zeros([ROWS, 1 << BITS], tl.int32)
    for first in range(g * group, last, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = there[:, None] & (column < last)[None, :]
        value = tl.load(weight + start[:, None] * columns + column[None, :], mask=inside, other=0).to(tl.float32)
        value = tl.div_rn(value - shift, tl.broadcast_to(scale, value.shape))
        code = tl.where(inside, nearest_code(value, value, BITS, 0), -1)
        counts += tl.sum((code[:, :, None] == level[None, None, :]).to(tl.int32), axis=1)
    tl.store(crowding + start * groups + g, tl.sum(tl.load(table + counts), axis=1), mask=there)


def entropy_shift(weight: Tensor, mids: Tensor, fractions: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Find on a GPU each group's shift of highest entropy, as `entropy_reference.entropy_shift` does."""
    rows, columns = weight.shape
    if weight.dtype != torch.float32 or min(group_size, columns) > _WIDEST:
        return entropy_reference.entropy_shift(weight, mids, fractions, group_size)
    whole = columns - columns % group_size
    found = []
    for part, width in ((weight[:, :whole], group_size), (weight[:, whole:], columns - whole)):
        if part.shape[1]:
            best = _best_shift(part.reshape(-1, width), mids, fractions)
            found.append([each.view(rows, -1) for each in best])
    tau, reach = (torch.cat(each, 1) for each in zip(*found, strict=True))
    return tau, reach


def _best_shift(groups: Tensor, mids: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
    """`tau` and `reach` `[n]` of groups `[n, width]`."""
    count, width = groups.shape
    n = len(fractions) // 2
    nearest_first = sorted(range(2 * n + 1), key=lambda k: (abs(k - n), k))
    ordered = fractions[torch.tensor([*nearest_first, n], device=fractions.device)]
    tau, reach = groups.new_empty(2, count)
    launch(
        _entropy_shift,
        (parts(count, _GROUPS),),
        groups.contiguous(),
        groups.median(-1).values,  # of an even number the lower one
        mids.contiguous(),
        ordered,
        crowding_table(width, groups.device),
        tau,
        reach,
        count,
        width,
        2 * n + 1,
        COUNT=len(mids),
        WIDTH=power(width),
        GROUPS=_GROUPS,
    )
    return tau, reach


def group_crowding(weight: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Measure on a GPU the crowding of each group's codes, as `entropy_reference.group_crowding` does."""
    check_codes(None, bits)
    if scales.dtype != torch.float32:
        return entropy_reference.group_crowding(weight, scales, offsets, bits, group_size)
    (rows, columns), groups = weight.shape, scales.shape[1]
    crowding = torch.empty(rows, groups, dtype=torch.int64, device=weight.device)
    tile = 4 if bits <= 6 else 1
    launch(
        _group_crowding,
        (parts(rows, tile), groups),
        weight.contiguous(),
        scales.contiguous(),
        scales if offsets is None else offsets.contiguous(),
        crowding_table(min(group_size, columns), weight.device),
        crowding,
        rows,
        columns,
        groups,
        group_size,
        BITS=bits,
        SHIFTED=offsets is not None,
        ROWS=tile,
        CHUNK=min(power(min(group_size, columns)), 128, _COMPARED // (tile * 2**bits)),
    )
    return crowding
