"""LQ-LoRA (arXiv 2311.12023) from its equations, in float64, slowly: scales, decomposition, budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np


def scales(
    values: np.ndarray, *, bits: int, block: int, constant: type[np.floating]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Section 3.1: codes, scales as stored (both as `values`), a constant for each block, and the offset."""
    flat = values.astype(np.float64).ravel()
    offset, top = float(flat.min()), 2**bits - 1
    codes, found, constants = np.zeros(flat.size, np.int64), np.zeros(flat.size), []
    for start in range(0, flat.size, block):
        part = flat[start : start + block] - offset
        largest = float(constant(part.max()))
        constants.append(largest)
        for i, value in enumerate(part):
            code = min(top, max(0, round(value * top / largest))) if largest else 0
            codes[start + i], found[start + i] = code, code * largest / top + offset
    return codes.reshape(values.shape), found.reshape(values.shape), np.array(constants), offset


def nearest(weight: np.ndarray, scale: np.ndarray, levels: Sequence[float], group: int) -> np.ndarray:
    """Each weight to the level nearest to it in units of its group's scale; ties to the lower one."""
    rounded = np.zeros_like(weight)
    for row, column in np.ndindex(*weight.shape):
        unit = scale[row, column // group]
        level = min(levels, key=lambda each: (abs(weight[row, column] / unit - each), each))
        rounded[row, column] = level * unit
    return rounded


def low_rank(matrix: np.ndarray, rank: int, fisher: np.ndarray | None = None) -> np.ndarray:
    """Section 3.4: the product of the factors, by whole singular value decompositions."""
    rows, columns = np.ones((len(matrix), 1)), np.ones((1, matrix.shape[1]))
    if fisher is not None:
        rows, columns = np.sqrt(fisher.mean(1, keepdims=True)), np.sqrt(fisher.mean(0, keepdims=True))
    U, S, Vh = np.linalg.svd(rows * matrix * columns, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank] / rows / columns


def decompose(
    weight: np.ndarray,
    quantize: Callable[[np.ndarray], np.ndarray],
    rank: int,
    iterations: int,
    fisher: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Algorithm 1 with the best turn kept: `Q`, `L1 L2`, and the error of each turn up to the first that is worse."""
    base, errors = np.zeros_like(weight), []
    weights = np.ones_like(weight) if fisher is None else fisher
    best: tuple[np.ndarray, np.ndarray] = (base, base)
    for _ in range(iterations):
        product = low_rank(weight - base, rank, fisher)
        base = quantize(weight - product)
        errors.append(float(np.sqrt((weights * (weight - base - product) ** 2).sum())))
        if errors[-1] > min(errors[:-1], default=np.inf):
            break
        best = (base, product)
    return *best, errors


def bits(bits: int, scale_bits: int, constant_bits: int, group: int, block: int) -> float:
    """Bits per weight of a configuration, the matrix's one offset not counted."""
    return bits + scale_bits / group + constant_bits / (group * block)


def best_plan(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> tuple[float, tuple[int, ...]] | None:
    """Equation 9 by trying everything: least total cost within `budget`, and a choice that has it."""
    best: tuple[float, tuple[int, ...]] | None = None
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        if sum(sizes[i][c] for i, c in enumerate(choice)) <= budget:
            cost = sum(costs[i][c] for i, c in enumerate(choice))
            if best is None or cost < best[0]:
                best = (cost, choice)
    return best
