"""Entropy of codes on the CPU: numba, rows shared out over threads. See `entropy.py`.

A shift moves all thresholds of a group the same way: `tau + reach * mid` rises with `tau`, for `reach` changes by no
more than `tau` does, and `|mid| < 1`. So a group is sorted once, and each threshold, over all candidates, passes a few
of its weights alone: with these it is compared, and the others are counted once for all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quadapt.kernels import entropy_reference
from quadapt.kernels.compiled import jit
from quadapt.kernels.cpu import _numpy
from quadapt.kernels.reference import check_codes
from quadapt.kernels.threads import over_rows


@jit
def _sort(weights):
    """In place. By insertion, where a group is short: three times faster than the library's sort there."""
    if len(weights) > 128:
        weights.sort()
        return
    for i in range(1, len(weights)):
        value, j = weights[i], i
        while j > 0 and weights[j - 1] > value:
            weights[j] = weights[j - 1]
            j -= 1
        weights[j] = value


@jit
def _count(weights, mids, table, tau, reach, slack, crowding, threshold, cut, before):
    """Crowding of each candidate (`tau` ascending, `reach`), all of them at once: the inner loops are vectors.

    A threshold rises with `tau`, but for `slack` (rounding), so the first and the last candidate bound the weights that
    have to be compared with each. The last three arguments are scratch, one number a candidate.
    """
    count, candidates, at = len(weights), len(tau), 0
    for k in range(candidates):
        crowding[k] = 0
        before[k] = 0
    for t in range(len(mids)):
        mid = mids[t]
        for k in range(candidates):
            threshold[k] = tau[k] + reach[k] * mid
        while at < count and weights[at] <= threshold[0] - slack:
            at += 1
        for k in range(candidates):
            cut[k] = at
        i, top = at, threshold[candidates - 1] + slack
        while i < count and weights[i] <= top:
            weight = weights[i]
            for k in range(candidates):
                cut[k] += weight <= threshold[k]
            i += 1
        for k in range(candidates):
            crowding[k] += table[cut[k] - before[k]]
            before[k] = cut[k]
    for k in range(candidates):
        crowding[k] += table[count - before[k]]


@jit
def _best_shift(weights, mids, fractions, table, floats, cuts, crowding, epsilon):
    """`tau` and `reach` of one sorted group. Scratch, one number a candidate: `floats` `[3, ..]`, `cuts` `[2, ..]`."""
    candidates, n = len(fractions), len(fractions) // 2
    low, high, middle = weights[0], weights[len(weights) - 1], weights[(len(weights) - 1) // 2]
    spread, slack = max(high - middle, middle - low), 64 * epsilon * max(abs(low), abs(high))
    tau, reach, threshold = floats[0], floats[1], floats[2]
    for k in range(candidates):
        tau[k] = middle + fractions[k] * spread
        reach[k] = max(high - tau[k], tau[k] - low)
    _count(weights, mids, table, tau, reach, slack, crowding, threshold, cuts[0], cuts[1])
    best = n
    for k in range(candidates):
        if crowding[k] < crowding[best] or (crowding[k] == crowding[best] and abs(k - n) < abs(best - n)):
            best = k
    least, shift, extent = crowding[best], tau[best], reach[best]
    tau[0], reach[0] = 0, max(high, -low)
    _count(weights, mids, table, tau[:1], reach[:1], slack, crowding, threshold, cuts[0], cuts[1])
    return (tau[0], reach[0]) if crowding[0] < least else (shift, extent)


@jit
def _shift_rows(weight, mids, fractions, table, group, epsilon, tau, reach, first, last):
    columns, candidates = weight.shape[1], len(fractions)
    weights, floats = np.empty(group, weight.dtype), np.empty((3, candidates), weight.dtype)
    cuts, crowding = np.empty((2, candidates), np.int32), np.empty(candidates, np.int64)
    for row in range(first, last):
        for start in range(0, columns, group):
            part = weights[: min(group, columns - start)]
            part[:] = weight[row, start : start + len(part)]
            _sort(part)
            k = start // group
            tau[row, k], reach[row, k] = _best_shift(part, mids, fractions, table, floats, cuts, crowding, epsilon)


@jit
def _crowding_rows(weight, scales, offsets, shifted, bits, group, table, crowding, first, last):
    columns, levels = weight.shape[1], 2**bits
    top = np.float32(levels - 1)
    histogram = np.zeros(levels, np.int64)
    for row in range(first, last):
        for start in range(0, columns, group):
            scale, offset = scales[row, start // group], offsets[row, start // group] if shifted else np.float32(0)
            histogram[:] = 0
            for i in range(start, min(start + group, columns)):
                value = np.rint((weight[row, i] - offset) / scale)
                histogram[np.int64(min(max(value, np.float32(0)), top))] += 1
            total = table[0]
            for c in range(levels):
                total += table[histogram[c]]
            crowding[row, start // group] = total


def entropy_shift(weight: Tensor, mids: Tensor, fractions: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Find each group's shift of highest entropy, bit for bit as `entropy_reference.entropy_shift` does."""
    rows, columns = weight.shape
    width = min(group_size, columns)
    tau, reach = weight.new_empty(2, rows, -(-columns // width))
    table = entropy_reference.crowding_table(width, weight.device).numpy()
    epsilon = np.finfo(tau.numpy().dtype).eps
    arrays = (_numpy(weight), _numpy(mids), _numpy(fractions), table, width, epsilon, tau.numpy(), reach.numpy())
    over_rows(lambda first, last: _shift_rows(*arrays, first, last), rows, columns * len(mids))
    return tau, reach


def group_crowding(weight: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Measure the crowding of each group's codes, exactly as `entropy_reference.group_crowding` does."""
    check_codes(None, bits)
    if scales.dtype != torch.float32:
        return entropy_reference.group_crowding(weight, scales, offsets, bits, group_size)
    crowding = torch.empty(scales.shape, dtype=torch.int64)
    table = entropy_reference.crowding_table(min(group_size, weight.shape[1]), weight.device).numpy()
    shifts = scales if offsets is None else offsets
    arrays = (_numpy(weight.float()), _numpy(scales), _numpy(shifts), offsets is not None)
    over_rows(
        lambda first, last: _crowding_rows(*arrays, bits, group_size, table, crowding.numpy(), first, last),
        *weight.shape,
    )
    return crowding
