"""Sixteen weights at a time: the vector step of the CPU kernels, written in LLVM's own vector types.

Left to itself the compiler vectorizes neither the unpacking of odd bit widths nor a table lookup (ten times slower), so
this one step is spelled out. Sixteen codes of `bits` bits are two runs of `bits` bytes; each run is read as one 64-bit
word, spread over eight lanes by a shift per lane, and masked. That holds for every width up to eight bits.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

LANES = 16
BF16, FP16, FP32 = 0, 1, 2
"""The dtypes that :func:`decode16` can give, as the numbers it takes for them."""

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FEATURES = (get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES).split(",")
"""Features of the processor that numba compiles for, which need not be this one (NUMBA_CPU_NAME)."""

_HAS_AVX512 = "+avx512f" in _FEATURES
_HAS_FP16 = "+f16c" in _FEATURES or platform.machine() in ("aarch64", "arm64")
"""Whether float16 can be converted at all: elsewhere LLVM calls a function that is not there, and aborts."""


def _vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    vector = _vector(value.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        first, ir.Constant(vector, ir.Undefined), ir.Constant(_vector(_I32, lanes), [0] * lanes)
    )


def _all(element: ir.Type, value: int, lanes: int = LANES) -> ir.Constant:
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _load(builder: Any, address: Any, type_: ir.Type) -> Any:
    value = builder.load(builder.inttoptr(address, type_.as_pointer()))
    value.align = 1
    return value


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def _codes(builder: Any, source: Any, bits: Any) -> Any:
    """`<16 x i32>` codes from the two runs of `bits` bytes at `source`."""
    step = _splat(builder, bits, 8)
    shift = builder.mul(step, ir.Constant(_vector(_I64, 8), list(range(8))))
    one = ir.Constant(_I64, 1)
    mask = _splat(builder, builder.sub(builder.shl(one, bits), one), 8)
    halves = []
    for address in (source, builder.add(source, bits)):
        word = _splat(builder, _load(builder, address, _I64), 8)
        halves.append(builder.trunc(builder.and_(builder.lshr(word, shift), mask), _vector(_I32, 8)))
    return builder.shuffle_vector(*halves, ir.Constant(_vector(_I32), list(range(LANES))))


def _lookup(builder: Any, table: Any, codes: Any) -> Any:
    """`table[codes]` for a table of 16 floats: one register permutation, or compare and select where there is none."""
    vector = _vector(_F32)
    if _HAS_AVX512:
        signature = ir.FunctionType(vector, [vector, _vector(_I32)])
        permute = cgutils.get_or_insert_function(builder.module, signature, "llvm.x86.avx512.permvar.sf.512")
        return builder.call(permute, [_load(builder, table, vector), codes])
    value = _splat(builder, _load(builder, table, _F32))
    for level in range(1, LANES):
        entry = _load(builder, builder.add(table, ir.Constant(_I64, 4 * level)), _F32)
        chosen = builder.icmp_unsigned("==", codes, _all(_I32, level))
        value = builder.select(chosen, _splat(builder, entry), value)
    return value


def _narrow(builder: Any, value: Any, dtype: int) -> Any:
    """Round `<16 x float>` to the output dtype, halves to even."""
    if dtype == FP16:
        return builder.fptrunc(value, _vector(ir.HalfType())) if _HAS_FP16 else _half_of(builder, value)
    if dtype == BF16:
        bits = builder.bitcast(value, _vector(_I32))
        odd = builder.and_(builder.lshr(bits, _all(_I32, 16)), _all(_I32, 1))
        rounded = builder.add(builder.add(bits, _all(_I32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, _all(_I32, 16)), _vector(_I16))
    return value


def _half_of(builder: Any, value: Any) -> Any:
    """Bits of `<16 x float>` rounded to float16, by whole numbers alone.

    A normal result: halves of the 13 bits that go are rounded by an addition, and a carry may end in infinity, as it
    should. A smaller one is shifted into place by adding 0.5, whose last bit is the smallest float16.
    """
    bits = builder.bitcast(value, _vector(_I32))
    size = builder.and_(bits, _all(_I32, 0x7FFFFFFF))
    sign = builder.lshr(builder.xor(bits, size), _all(_I32, 16))
    odd = builder.and_(builder.lshr(size, _all(_I32, 13)), _all(_I32, 1))
    normal = builder.lshr(builder.add(builder.sub(size, _all(_I32, (112 << 23) - 0xFFF)), odd), _all(_I32, 13))
    half = ir.Constant(_vector(_F32), [0.5] * LANES)
    moved = builder.fadd(builder.bitcast(size, _vector(_F32)), half)
    small = builder.sub(builder.bitcast(moved, _vector(_I32)), _all(_I32, 126 << 23))
    nan = builder.or_(builder.and_(builder.lshr(size, _all(_I32, 13)), _all(_I32, 0x3FF)), _all(_I32, 0x7E00))
    found = builder.select(builder.icmp_unsigned("<", size, _all(_I32, 113 << 23)), small, normal)
    found = builder.select(builder.icmp_unsigned(">=", size, _all(_I32, 143 << 23)), _all(_I32, 0x7C00), found)
    found = builder.select(builder.icmp_unsigned(">", size, _all(_I32, 255 << 23)), nan, found)
    return builder.trunc(builder.or_(found, sign), _vector(_I16))


def _float_of(builder: Any, bits: Any) -> Any:
    """`<16 x float>` of the bits of float16: exponents are 112 apart, but for infinity, NaN and the smallest."""
    bits = builder.zext(bits, _vector(_I32))
    size = builder.shl(builder.and_(bits, _all(_I32, 0x7FFF)), _all(_I32, 13))
    sign = builder.shl(builder.and_(bits, _all(_I32, 0x8000)), _all(_I32, 16))
    normal = builder.add(size, _all(_I32, 112 << 23))
    endless = builder.add(size, _all(_I32, 224 << 23))
    one = builder.bitcast(builder.add(size, _all(_I32, 113 << 23)), _vector(_F32))
    small = builder.bitcast(builder.fsub(one, ir.Constant(_vector(_F32), [2.0**-14] * LANES)), _vector(_I32))
    found = builder.select(builder.icmp_unsigned("<", size, _all(_I32, 1 << 23)), small, normal)
    found = builder.select(builder.icmp_unsigned(">=", size, _all(_I32, 31 << 23)), endless, found)
    return builder.bitcast(builder.or_(found, sign), _vector(_F32))


@intrinsic(prefer_literal=True)
def decode16(
    typingctx: Any, dtype: Any, lookup: Any, source: Any, bits: Any, scale: Any, offset: Any, table: Any, target: Any
) -> Any:
    """Write 16 weights `scale * level + offset` at address `target`.

    `dtype` and `lookup` are literals: the dtype written, and whether levels come from the 16 floats at `table` or are
    the codes themselves. Reads up to 6 bytes past the last code. The product is rounded before the sum, as in torch.
    """
    signature = types.void(dtype, lookup, types.intp, types.intp, types.float32, types.float32, types.intp, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, source, bits, scale, offset, table, target = args
        codes = _codes(builder, source, bits)
        found = signature.args[1].literal_value
        level = _lookup(builder, table, codes) if found else builder.uitofp(codes, _vector(_F32))
        value = builder.fadd(builder.fmul(level, _splat(builder, scale)), _splat(builder, offset))
        _store(builder, _narrow(builder, value, signature.args[0].literal_value), target)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def convert16(typingctx: Any, have: Any, want: Any, source: Any, target: Any) -> Any:
    """Read 16 floats of dtype `have` at `source`, write them as dtype `want` at `target` (both literals)."""
    signature = types.void(have, want, types.intp, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        have, want = (each.literal_value for each in signature.args[:2])
        if have == BF16:
            bits = builder.zext(_load(builder, args[2], _vector(_I16)), _vector(_I32))
            value = builder.bitcast(builder.shl(bits, _all(_I32, 16)), _vector(_F32))
        elif have == FP16:
            half = _vector(ir.HalfType()) if _HAS_FP16 else _vector(_I16)
            loaded = _load(builder, args[2], half)
            value = builder.fpext(loaded, _vector(_F32)) if _HAS_FP16 else _float_of(builder, loaded)
        else:
            value = _load(builder, args[2], _vector(_F32))
        _store(builder, _narrow(builder, value, want), args[3])
        return context.get_dummy_value()

    return signature, codegen


def pointer(element: Any) -> Any:
    """An intrinsic that turns an integer address into a pointer that `numba.carray` takes."""

    @intrinsic
    def cast(typingctx: Any, address: Any) -> Any:
        signature = types.CPointer(element)(types.intp)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return signature, codegen

    return cast
