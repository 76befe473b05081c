"""Sixteen weights at a time: the vector steps of fake quantization, in LLVM's own vector types (see `lanes.py`).

No operation is contracted or reordered: every product is rounded before it is added, as in `fake_reference.py`. Values
pass from step to step in a buffer that holds one row and stays in the nearest cache.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quadapt.kernels.lanes import _F32, _I32, _I64, LANES, _load, _splat, _store, _vector

WEIGHTS, CODES, LEVELS = 0, 1, 2
"""What a buffer holds before rounding: float weights, real-valued codes, or levels of a table (never rounded)."""

_ADDRESS, _FLOAT = types.intp, types.float32
_ZERO = ir.Constant(_vector(_F32), [0.0] * LANES)


def _ahead(builder: Any, address: Any, vectors: int) -> Any:
    return builder.add(address, ir.Constant(_I64, 4 * LANES * vectors))


def _rint(builder: Any, value: Any) -> Any:
    """Round 16 float32 numbers to whole ones, halves to even."""
    signature = ir.FunctionType(_vector(_F32), [_vector(_F32)])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, "llvm.rint.v16f32"), [value])


def _code(builder: Any, mode: int, value: Any, scale: Any, offset: Any, top: Any) -> tuple[Any, Any]:
    """Unrounded and rounded code, as in `fake_reference.py`: no zero is negative, and NaN stays."""
    if mode == LEVELS:
        return value, value
    v = builder.fdiv(builder.fsub(value, offset), scale) if mode == WEIGHTS else value
    r, top = _rint(builder, v), _splat(builder, top)
    below, above = builder.fcmp_ordered("<=", r, _ZERO), builder.fcmp_ordered(">=", r, top)
    return v, builder.select(below, _ZERO, builder.select(above, top, r))


@intrinsic
def add_low_rank16(typingctx: Any, value: Any, A: Any, B: Any, rank: Any) -> Any:
    """`value += B @ A` for 16 inputs: `A [rank, 16]`, `B [rank]`, at these addresses; summed in the rank's order."""
    signature = types.void(_ADDRESS, _ADDRESS, _ADDRESS, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, A, B, rank = args
        total = cgutils.alloca_once_value(builder, _ZERO)
        with cgutils.for_range(builder, rank) as loop:
            a = _load(builder, builder.add(A, builder.mul(loop.index, ir.Constant(_I64, 4 * LANES))), _vector(_F32))
            b = _load(builder, builder.add(B, builder.mul(loop.index, ir.Constant(_I64, 4))), _F32)
            builder.store(builder.fadd(builder.load(total), builder.fmul(_splat(builder, b), a)), total)
        _store(builder, builder.fadd(_load(builder, value, _vector(_F32)), builder.load(total)), value)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def quantize16(typingctx: Any, mode: Any, dense: Any, value: Any, scale: Any, offset: Any, top: Any) -> Any:
    """Put rounded codes (`dense` 0) or the weights that they stand for (1) in the place of 16 values of `mode`."""
    signature = types.void(mode, dense, _ADDRESS, _FLOAT, _FLOAT, _FLOAT)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, address, scale, offset, top = args
        scale, offset = _splat(builder, scale), _splat(builder, offset)
        mode, dense = (each.literal_value for each in signature.args[:2])
        _, u = _code(builder, mode, _load(builder, address, _vector(_F32)), scale, offset, top)
        _store(builder, builder.fadd(builder.fmul(u, scale), offset) if dense else u, address)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def gradient16(
    typingctx: Any,
    mode: Any,
    value: Any,
    G: Any,
    sums: Any,
    scale: Any,
    offset: Any,
    top: Any,
    rounds: Any,
    low: Any,
    high: Any,
) -> Any:
    """Gradients of 16 values of `mode`, which their weights replace.

    `G` becomes the gradient of what was rounded; what the weights add to the gradients of scale and offset is added to
    the 16 and 16 floats at `sums`. A code is clamped if it lies outside of `low` to `high`; `rounds`: once rounded.
    """
    signature = types.void(mode, _ADDRESS, _ADDRESS, _ADDRESS, _FLOAT, _FLOAT, _FLOAT, types.boolean, _FLOAT, _FLOAT)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, value, G, sums, scale, offset, top, rounds, low, high = args
        mode = signature.args[0].literal_value
        scale, offset = _splat(builder, scale), _splat(builder, offset)
        v, u = _code(builder, mode, _load(builder, value, _vector(_F32)), scale, offset, top)
        g = _load(builder, G, _vector(_F32))
        decided = builder.select(rounds, _rint(builder, v), v)
        inside = builder.and_(
            builder.fcmp_ordered(">=", decided, _splat(builder, low)),
            builder.fcmp_ordered("<=", decided, _splat(builder, high)),
        )
        if mode == WEIGHTS:
            by_scale = builder.fmul(g, builder.select(inside, builder.fsub(u, v), u))
            by_offset, masked = builder.select(inside, _ZERO, g), builder.select(inside, g, _ZERO)
        else:
            by_scale, by_offset = builder.fmul(g, u), g
            masked = builder.select(inside, builder.fmul(g, scale), _ZERO)
        _store(builder, masked, G)
        for at, each in ((sums, by_scale), (_ahead(builder, sums, 1), by_offset)):
            _store(builder, builder.fadd(_load(builder, at, _vector(_F32)), each), at)
        _store(builder, builder.fadd(builder.fmul(u, scale), offset), value)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def sum16(typingctx: Any, address: Any) -> Any:
    """Sum of the 16 floats at `address`, by halves; they are set to zero."""
    signature = _FLOAT(_ADDRESS)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _load(builder, args[0], _vector(_F32))
        _store(builder, _ZERO, args[0])
        half = LANES // 2
        while half:
            parts = (
                builder.shuffle_vector(value, value, ir.Constant(_vector(_I32, half), list(range(at, at + half))))
                for at in (0, half)
            )
            value, half = builder.fadd(*parts), half // 2
        return builder.extract_element(value, ir.Constant(_I32, 0))

    return signature, codegen
