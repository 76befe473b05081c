"""One row of codes times a few tokens: the inner loop of the CPU's fused product, written in LLVM's vector types.

A lane is a short run of codes of one row: eight of up to 4 bits, four of more. Sixteen lanes are read at once, spread
over 32-bit words by a shuffle that is fixed for each width; then the codes of a lane are taken one after the other by a
shift. So the inputs are laid out beforehand to match: for each vector, the first input of all lanes, the second, ..

Levels come from a register permutation where the processor has one that is wide enough, and from a conversion of the
masked code elsewhere. Scale and offset are taken out of the sum over a lane, which lies within one group.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quadapt.kernels.dispatch import codes_of_lane
from quadapt.kernels.lanes import (
    _F32,
    _FEATURES,
    _HAS_AVX512,
    _I8,
    _I32,
    _I64,
    LANES,
    _all,
    _load,
    _lookup,
    _splat,
    _vector,
)

_HAS_AVX2 = "+avx2" in _FEATURES
_HAS_FMA = "+fma" in _FEATURES


def _words(builder: Any, source: Any, bits: int) -> Any:
    """`<16 x i32>`, a lane's codes in each: the first in the lowest bits. Reads `2 * bits * codes_of_lane` bytes."""
    count = codes_of_lane(bits)
    size = LANES * bits * count // 8
    if bits * count == 32:
        return _load(builder, source, _vector(_I32))
    stored = _load(builder, source, _vector(_I8, size))
    zero = ir.Constant(_vector(_I8, size), [0] * size)
    order = []
    for lane in range(LANES):
        first, last = lane * bits * count // 8, ((lane + 1) * bits * count - 1) // 8
        order += [first + byte if first + byte <= last else size for byte in range(4)]
    words = builder.shuffle_vector(stored, zero, ir.Constant(_vector(_I32, 4 * LANES), order))
    words = builder.bitcast(words, _vector(_I32))
    begins = [lane * bits * count % 8 for lane in range(LANES)]
    return builder.lshr(words, ir.Constant(_vector(_I32), begins)) if any(begins) else words


def _permuted(builder: Any, table: Any, index: Any, lanes: int) -> Any:
    """`table[index]` within one register of 16 or 8 floats; higher bits of the index are ignored."""
    name = "llvm.x86.avx512.permvar.sf.512" if lanes == 16 else "llvm.x86.avx2.permps"
    signature = ir.FunctionType(_vector(_F32, lanes), [_vector(_F32, lanes), _vector(_I32, lanes)])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [table, index])


def _half(builder: Any, vector: Any, part: int) -> Any:
    """The first or the second eight lanes."""
    order = list(range(8 * part, 8 * part + 8))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), ir.Constant(_vector(_I32, 8), order))


def _level(builder: Any, words: Any, k: int, bits: int, lookup: bool, table: Any) -> Any:
    """`<16 x float>`: the levels of the codes that stand at place `k` of each lane.

    `table` is the address of the levels, 16 of them; fewer are repeated, so that what stands above a code in its word
    needs no mask. Only 8 bits have more, and are looked up one by one.
    """
    moved = builder.lshr(words, _all(_I32, k * bits)) if k else words
    if bits <= 4 and _HAS_AVX512:
        return _permuted(builder, _load(builder, table, _vector(_F32)), moved, 16)
    if bits <= 3 and _HAS_AVX2:
        short = _load(builder, table, _vector(_F32, 8))
        halves = [_permuted(builder, short, _half(builder, moved, part), 8) for part in (0, 1)]
        return builder.shuffle_vector(*halves, ir.Constant(_vector(_I32), list(range(LANES))))
    codes = builder.and_(moved, _all(_I32, 2**bits - 1))
    if not lookup:
        return builder.sitofp(codes, _vector(_F32))
    if bits > 4:
        lanes = (builder.extract_element(codes, ir.Constant(_I32, lane)) for lane in range(LANES))
        return _gathered(builder, table, [builder.zext(each, _I64) for each in lanes])
    if not _HAS_AVX2:
        return _lookup(builder, table, codes)
    low, high = (_load(builder, builder.add(table, ir.Constant(_I64, 32 * part)), _vector(_F32, 8)) for part in (0, 1))
    upper = builder.icmp_signed("<", builder.shl(moved, _all(_I32, 28)), _all(_I32, 0))
    found = []
    for each in (low, high):
        halves = [_permuted(builder, each, _half(builder, moved, part), 8) for part in (0, 1)]
        found.append(builder.shuffle_vector(*halves, ir.Constant(_vector(_I32), list(range(LANES)))))
    return builder.select(upper, found[1], found[0])


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, in one step where the processor has one."""
    if not _HAS_FMA:
        return builder.fadd(builder.fmul(a, b), c)
    signature = ir.FunctionType(a.type, [a.type] * 3)
    fused = cgutils.get_or_insert_function(builder.module, signature, "llvm.fma.v16f32")
    return builder.call(fused, [a, b, c])


def _spread(builder: Any, values: Any, vector: Any, lanes: int, size: int) -> Any:
    """The values of the groups of one vector, each repeated over its `lanes` lanes, as floats.

    `values` is the address of a row's values, of 4 bytes each or 2, `vector` the number of the vector in the row; 0
    lanes stand for a single group. Most groups are a whole number of vectors, or a vector one of groups; for others the
    lanes are filled singly.
    """
    if not lanes:
        return _splat(builder, _float(builder, values, size))
    if lanes % LANES == 0:
        at = builder.udiv(vector, ir.Constant(_I64, lanes // LANES))
        return _splat(builder, _float(builder, _after(builder, values, at, size), size))
    if LANES % lanes:
        first = builder.mul(vector, ir.Constant(_I64, LANES))
        groups = [
            builder.udiv(builder.add(first, ir.Constant(_I64, lane)), ir.Constant(_I64, lanes)) for lane in range(LANES)
        ]
        return _gathered(builder, values, groups, size)
    count = LANES // lanes
    found = _float(builder, _after(builder, values, vector, size * count), size, count)
    order = ir.Constant(_vector(_I32), [lane // lanes for lane in range(LANES)])
    return builder.shuffle_vector(found, ir.Constant(found.type, ir.Undefined), order)


def _float(builder: Any, address: Any, size: int, count: int = 0) -> Any:
    """A float32 at an address, or a vector of `count` of them; of 2 bytes they are float16 there."""
    kind = ir.HalfType() if size == 2 else _F32
    value = _load(builder, address, _vector(kind, count) if count else kind)
    return value if size == 4 else builder.fpext(value, _vector(_F32, count) if count else _F32)


def _gathered(builder: Any, values: Any, places: list[Any], size: int = 4) -> Any:
    """`<16 x float>` from 16 places of an array of floats, one by one."""
    found = ir.Constant(_vector(_F32), ir.Undefined)
    for lane, place in enumerate(places):
        value = _float(builder, _after(builder, values, place, size), size)
        found = builder.insert_element(found, value, ir.Constant(_I32, lane))
    return found


def _after(builder: Any, address: Any, count: Any, size: int) -> Any:
    return builder.add(address, builder.mul(count, ir.Constant(_I64, size)))


def _sum(builder: Any, vector: Any) -> Any:
    """The sum of 16 lanes, halves added to halves: the same order on every processor."""
    for width in (8, 4, 2, 1):
        both = [list(range(width)), list(range(width, 2 * width))]
        undefined = ir.Constant(vector.type, ir.Undefined)
        low, high = (builder.shuffle_vector(vector, undefined, ir.Constant(_vector(_I32, width), o)) for o in both)
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


@intrinsic(prefer_literal=True)
def multiply_row(
    typingctx: Any,
    bits: Any,
    lookup: Any,
    lanes: Any,
    tokens: Any,
    source: Any,
    begin: Any,
    end: Any,
    scales: Any,
    scale_size: Any,
    offsets: Any,
    offset_size: Any,
    table: Any,
    inputs: Any,
    sums: Any,
    target: Any,
) -> Any:
    """Add the product of a run of one row with `tokens` tokens to `tokens` floats at `target`.

    The first four and the sizes are literals. `source` is the address of the codes of vector `begin` of the row, and
    `end` the vector after the last. `scales` and `offsets` are numbers of so many bytes (4: float32, 2: float16), one
    for each group of the row; `lanes` says how many lanes a group has (0: one group). `inputs` is float32 `[vectors,
    tokens, codes of a lane, 16]`, `sums` float32 `[vectors, tokens, 16]`, the sum of each lane's inputs.
    """
    addresses = (types.intp,) * 4
    known = (bits, lookup, lanes, tokens)
    signature = types.void(*known, *addresses, scale_size, types.intp, offset_size, *addresses)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        width, by_table, spread, count = (each.literal_value for each in signature.args[:4])
        source, begin, end, scales, _, offsets, _, table, inputs, sums, target = args[4:]
        sizes = [signature.args[at].literal_value for at in (8, 10)]
        codes, zero = codes_of_lane(width), _all(_F32, 0)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(count)]
        with cgutils.for_range(builder, builder.sub(end, begin)) as loop:
            vector = builder.add(begin, loop.index)
            words = _words(builder, _after(builder, source, loop.index, 2 * width * codes), width)
            dots = [zero] * count
            first = _after(builder, inputs, vector, 4 * LANES * codes * count)
            for k in range(codes):
                level = _level(builder, words, k, width, bool(by_table), table)
                for t in range(count):
                    place = ir.Constant(_I64, 4 * LANES * (codes * t + k))
                    value = _load(builder, builder.add(first, place), _vector(_F32))
                    dots[t] = _multiply_add(builder, level, value, dots[t])
            scale, offset = (
                _spread(builder, each, vector, spread, size)
                for each, size in zip((scales, offsets), sizes, strict=True)
            )
            ones = _after(builder, sums, vector, 4 * LANES * count)
            for t in range(count):
                one = _load(builder, builder.add(ones, ir.Constant(_I64, 4 * LANES * t)), _vector(_F32))
                total = _multiply_add(builder, dots[t], scale, builder.load(totals[t]))
                builder.store(_multiply_add(builder, one, offset, total), totals[t])
        for t in range(count):
            place = builder.inttoptr(builder.add(target, ir.Constant(_I64, 4 * t)), _F32.as_pointer())
            builder.store(builder.fadd(builder.load(place), _sum(builder, builder.load(totals[t]))), place)
        return context.get_dummy_value()

    return signature, codegen
