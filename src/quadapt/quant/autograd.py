"""The product with a quantized matrix, differentiable, without ever keeping the dense matrix.

Forward dequantizes, multiplies, and drops the dense weight; backward dequantizes again. What is saved is the stored
form itself (which exists anyway) and, where offsets are trained, these as they would be stored, and the inputs pooled
over groups, `1 / group_size` of the inputs, or less. Few tokens under `torch.no_grad()` (decoding) are multiplied with
the codes themselves.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from quadapt.kernels import few, pool, product
from quadapt.quant.products import add_product, operand_dtype, product_dtype, unrounded
from quadapt.quant.weight import Layout, QuantWeight


class Move(Protocol):
    """How trained parameters move the offsets of a quantized matrix during training (hashable; holds no tensors)."""

    def offsets(self, weight: QuantWeight, params: tuple[Tensor, ...]) -> Tensor | None:
        """Offsets to compute with, as :meth:`QuantWeight.operand` gives them: those that a merge would store.

        Called in forward; backward computes with what it gave.
        """

    def keep(
        self, layout: Layout, pooled: Tensor, params: tuple[Tensor, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor, ...]:
        """What `gradients` needs of the inputs, given their sums over groups, `pooled [tokens, groups]`.

        `needed` says of each parameter whether its gradient is wanted.
        """

    def gradients(
        self,
        layout: Layout,
        params: tuple[Tensor, ...],
        dy: Tensor,
        kept: tuple[Tensor, ...],
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of `params`, straight through the rounding of offsets: see :func:`offset_gradient`.

        `dy` is the gradient of the output, `[tokens, out]`, and `kept` what :meth:`keep` gave.
        """


class QuantMatmul(torch.autograd.Function):
    """`x @ W.T` for `x [..., in]`, with `W` dequantized on the fly to the dtype of `x`, or of the product.

    Gradients reach `x` and, through `move`, the trained parameters. Codes and scales are fixed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, move: Move | None, *tensors: Tensor) -> Tensor:
        weight, params = _split(layout, tensors)
        x = weight.stored_order(x)
        needed = ctx.needs_input_grad[3 + len(layout.shapes) :]
        kept = move.keep(layout, _pooled(x, layout), params, needed) if move is not None and any(needed) else ()
        ctx.layout, ctx.move, ctx.kept = layout, move, len(kept)
        offsets = weight.operand("offsets") if move is None else move.offsets(weight, params)
        moved = offsets if move is not None and ctx.needs_input_grad[0] else None
        ctx.save_for_backward(*tensors, *kept, moved)
        wide = product_dtype(x)
        dense = weight.decode(offsets, wide)
        with unrounded(x.device.type, wide):
            return torch.nn.functional.linear(x.to(wide), dense).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        layout, move = ctx.layout, ctx.move
        *saved, moved = ctx.saved_tensors
        tensors, kept = tuple(saved[: len(saved) - ctx.kept]), tuple(saved[len(saved) - ctx.kept :])
        weight, params = _split(layout, tensors)
        needed = ctx.needs_input_grad[3 + len(layout.shapes) :]
        dx = None
        if ctx.needs_input_grad[0]:
            wide = product_dtype(dy)
            dense = weight.decode(weight.operand("offsets") if move is None else moved, wide)
            with unrounded(dy.device.type, wide):  # backward may run inside of autocast
                dx = weight.layer_order((dy.to(wide) @ dense).to(dy.dtype))
        gradients: tuple[Tensor | None, ...] = (None,) * len(params)
        if kept:
            gradients = move.gradients(layout, params, dy.reshape(-1, layout.out), kept, needed)
        return dx, None, None, *((None,) * len(layout.shapes)), *gradients


def _pooled(x: Tensor, layout: Layout) -> Tensor:
    """Inputs summed over groups, `[tokens, groups]`, as the product of backward takes them.

    In float32 for float16, whose range a sum may leave.
    """
    pooled = pool(x, layout.format.width(layout.columns)).reshape(-1, layout.groups)
    return pooled if x.dtype == torch.float16 else pooled.to(operand_dtype(x, pooled.dtype))


def offset_gradient(dy: Tensor, pooled: Tensor) -> Tensor:
    """`dy^T pooled`, float32 `[out, groups]` (float64 for float64): the gradient of the offsets.

    Args:
        dy: Gradient of the output, `[tokens, out]`.
        pooled: Inputs summed over groups, `[tokens, groups]`, or what `Move.keep` has made of them.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    gradient = dy.new_empty(dy.shape[1], pooled.shape[1], dtype=wide)
    add_product(gradient, dy.to(pooled.dtype).T, pooled, first=True)
    return gradient


def _split(layout: Layout, tensors: tuple[Tensor, ...]) -> tuple[QuantWeight, tuple[Tensor, ...]]:
    count = len(layout.shapes)
    return QuantWeight(layout, dict(zip(layout.shapes, tensors, strict=False))), tensors[count:]


def _few(x: Tensor, weight: QuantWeight, move: Move | None, params: tuple[Tensor, ...]) -> Tensor:
    """The product of few tokens, without the dense matrix and without gradients."""
    format, columns = weight.format, weight.layout.columns
    moved = None if move is None else move.offsets(weight, params)
    y = product(
        weight.stored_order(x).reshape(-1, columns),
        weight.packed,
        weight.held("scales"),
        weight.held("offsets") if moved is None else [moved],
        format.table(x),
        format.bits,
        format.width(columns),
        columns,
    )
    return y.view(*x.shape[:-1], weight.layout.out)


def quant_matmul(x: Tensor, weight: QuantWeight, move: Move | None = None, params: tuple[Tensor, ...] = ()) -> Tensor:
    """`x @ W.T`: `x [..., in]` in float16, bfloat16, float32 (or float64, on the reference kernels) to `[..., out]`.

    Args:
        x: Inputs; their dtype is that of the product.
        weight: The quantized matrix; `move` and `params` say what training changes about it.
        move: None to use the weight as it is stored.
        params: Trained parameters, given to `move`.
    """
    # Asked of the mode alone: with gradients on, a trained model and its merge must take the same product, too.
    if not torch.is_grad_enabled() and few(x, weight.format.width(weight.layout.columns), weight.layout.columns):
        return _few(x, weight, move, params)
    return QuantMatmul.apply(x, weight.layout, move, *(weight.tensors[name] for name in weight.layout.shapes), *params)
