"""Fake quantization: the compute-heavy steps of methods that train the quantizer itself, behind one dispatch.

`fake_reference.py` (plain torch) says what is computed; `fake_cpu.py` (numba) gives the same weights and codes bit for
bit. Both steps are opaque operators: `torch.compile` and the memory estimate's fake tensors pass over them. Where
nothing is traced, kernels are called without the operator (`dispatch.at_once`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quadapt.kernels.dispatch import kernels_for, operator
from quadapt.kernels.fake_reference import Grid

__all__ = ["Grid", "fake_gradients", "fake_quantize"]


@operator("quadapt::fake_quantize")
def fake_quantize(
    base: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor | None,
    grid: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Quantize `base + B @ A` and give the weights, or their codes.

    Args:
        base: Float `[out, columns]`, or packed codes, uint8 `[out, ceil(columns * base_bits / 8)]`.
        A: `[rank, columns]` or None, in the dtype of `scales`.
        B: `[out, rank]` or None, likewise, and already scaled.
        scales: float32 (float64 for references) `[out, groups]`: its dtype decides the codes.
        offsets: `[out, groups]`, in the dtype of `scales`.
        levels: float32 `[2**bits]`: levels of a base of codes without `A` and `B`; None for integers.
        grid: The four numbers of a :class:`Grid`.
        dtype: The dtype of the weights; uint8 for codes (integers only).

    Returns:
        `[out, columns]`.
    """
    return kernels_for(base.device, "fake").quantize(base, A, B, scales, offsets, levels, Grid(*grid), dtype)


@fake_quantize.register_fake
def _(
    base: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor | None,
    grid: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return base.new_empty(base.shape[0], grid[3], dtype=dtype)


@operator("quadapt::fake_gradients", mutates=("G", "dense"))
def fake_gradients(
    G: Tensor,
    base: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor | None,
    grid: Sequence[int],
    slack: float | None,
    dense: Tensor | None,
) -> Tensor:
    """Turn the gradient of some rows' weights into those of their quantizer. Other arguments as :func:`fake_quantize`.

    With the mask `m` of codes that were not clamped, over a float base (LSQ+, Bhalgat et al. 2020, for unsigned codes):
    `dbase = G m`, `dscales = sum G (u - v if m else u)`, `doffsets = sum G (1 - m)`; over a base of codes:
    `dv = G scales m`, `dscales = sum G u`, `doffsets = sum G`.

    Args:
        G: Gradient of the weights, `[rows, columns]` in the dtype of `scales`. On return that of the base (for
            codes: of `v`; of no use without `A` and `B`).
        base: Float, or packed codes, as for :func:`fake_quantize`; here and below, the rows that `G` has.
        A: `[rank, columns]` or None.
        B: `[rows, rank]` or None, already scaled.
        scales: float32 (float64 for references) `[rows, groups]`.
        offsets: `[rows, groups]`, in the dtype of `scales`.
        levels: float32 `[2**bits]` for a base of codes without `A` and `B`; None for integers.
        grid: The four numbers of a :class:`Grid`.
        slack: Clamp, then round: a code is clamped if `v` lies outside its range by more than this. None: round, then
            clamp: if the rounded code lies outside.
        dense: On return holds the weights, `[rows, columns]`, in its own dtype; None if they are not wanted.

    Returns:
        Gradients of scales and offsets, `[2, rows, groups]`.
    """
    return kernels_for(base.device, "fake").gradients(G, base, A, B, scales, offsets, levels, Grid(*grid), slack, dense)


@fake_gradients.register_fake
def _(
    G: Tensor,
    base: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor | None,
    grid: Sequence[int],
    slack: float | None,
    dense: Tensor | None,
) -> Tensor:
    return scales.new_empty(2, *scales.shape)
