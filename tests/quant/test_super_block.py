"""Scales in super-blocks, as GGML's K-quants hold them: against the fixed point of storing, and slow references."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels import kernels_for
from quadapt.methods import method_named
from quadapt.model.layer import Quantization, quantize_layer
from quadapt.nn.adapters import Pooled
from quadapt.nn.adapters.l4q import L4Q
from quadapt.nn.adapters.scales import Scales
from quadapt.quant.format import Format, Zero
from quadapt.quant.gptq import GPTQ
from quadapt.quant.grids import spanning
from quadapt.quant.rounding import Nearest, ScaleUnderflow
from quadapt.quant.storage import STORAGES, Storage
from quadapt.quant.storage.super_block import SuperBlock
from quadapt.quant.weight import Layout, QuantWeight

KINDS: dict[str, tuple[str, int, int, Zero, float]] = {
    "Q4_K": ("q4_k", 4, 32, "float", 4.5),
    "Q5_K": ("q4_k", 5, 32, "float", 5.5),
    "Q2_K": ("q2_k", 2, 16, "float", 2.625),
    "Q3_K": ("q3_k", 3, 16, "none", 3.4375),
    "Q6_K": ("q6_k", 6, 16, "none", 6.5625),
}
"""GGML's types: the storage of scales, the width of codes, the size of groups, the zero, and the true bits a weight."""

HELD = [name for name, each in STORAGES.items() if isinstance(each, SuperBlock)]


def layout_of(kind: str, out: int = 12, columns: int = 512) -> Layout:
    scales, bits, group_size, zero, _ = KINDS[kind]
    format = Format(bits=bits, group_size=group_size, zero=zero)
    return Layout(format=format, storage=Storage.floating(scales, zero), out=out, columns=columns)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_ggmls_blocks(kind: str) -> None:
    assert layout_of(kind).bits_per_weight == KINDS[kind][-1]


# --- what is stored -------------------------------------------------------------------------------------------------


def numpy_stored(name: str, values: np.ndarray) -> np.ndarray:
    """What a storage makes of numbers `[rows, groups]`, number by number in float64."""
    held, out = STORAGES[name], np.zeros(values.shape)
    run = held.together
    for row in range(values.shape[0]):
        for start in range(0, values.shape[1], run):
            block = values[row, start : start + run].astype(np.float64)
            if held.signed:
                top = 2 ** (held.bits - 1)
                low, high = min(0.0, block.min()), max(0.0, block.max())
                unit, sign = max(high, -low) / top, -1 if high > -low else 1
                bounds = (-top, top - 1)
            else:
                block = -block if held.never_positive else block
                top = 2**held.bits - 1
                unit, sign, bounds = max(0.0, block.max()) / top, 1, (0 if held.never_positive else 1, top)
            half = np.float16(unit)
            half = np.nextafter(half, np.float16(0)) if float(half) > np.float32(unit) else half
            constant = sign * float(half)
            for at, value in enumerate(block):
                code = int(np.clip(np.round(value / constant), *bounds))
                if held.signed and code == 0:
                    code = -1 if value / constant < 0 else 1
                out[row, start + at] = (-1 if held.never_positive else 1) * code * constant
    return out


def numbers(name: str, rows: int = 7, groups: int = 40) -> Tensor:
    """Numbers of very different sizes, with the sign that the storage takes."""
    held = STORAGES[name]
    values = torch.rand(rows, groups) * torch.rand(rows, 1) ** 4 + 1e-3
    if held.signed:
        values = values * torch.randn(rows, groups).sign()
    return -values if held.never_positive else values


@pytest.mark.parametrize("name", HELD)
def test_stores_what_the_slow_reference_does(name: str) -> None:
    values = numbers(name)
    found = STORAGES[name].through(values, centre=True)
    want = numpy_stored(name, values.numpy())
    # A number within a rounding error of the middle between two codes may go to either.
    middle = np.isclose(np.abs(found.numpy() - values.numpy()), np.abs(want - values.numpy()), rtol=1e-4)
    assert (np.isclose(found.numpy(), want, rtol=1e-6) | middle).all()
    assert np.isclose(found.numpy(), want, rtol=1e-6).mean() > 0.99


@pytest.mark.parametrize("name", HELD)
@given(
    values=arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 19)),
        elements=st.one_of(
            st.floats(-100, 100, width=32),
            st.floats(-(2.0**-13), 2.0**-13, width=32),
            st.floats(-(2.0**24), 2.0**24, width=32),
        ),
    )
)
def test_what_has_been_stored_is_stored_again_as_the_same_bytes(name: str, values: np.ndarray) -> None:
    """So a merge stores the very numbers that training computed with."""
    storage, given_ = STORAGES[name], torch.from_numpy(values)
    kept = storage.encode(given_, centre=True)
    found = storage.decode(kept, tuple(values.shape))
    assert torch.equal(storage.rounded(given_), found)
    assert storage.rounded(given_.double()).dtype == torch.float64
    again = storage.encode(found, centre=True)
    assert all(torch.equal(again[suffix], each) for suffix, each in kept.items())
    assert torch.equal(storage.rounded(found), found)
    assert bool(torch.isfinite(found).all())
    assert bool((found <= 0 if storage.never_positive else found != 0).all())


@pytest.mark.parametrize("name", HELD)
def test_numbers_above_are_held_and_not_below(name: str) -> None:
    storage, values = STORAGES[name], numbers(name)
    found = storage.above(values)
    assert torch.equal(storage.rounded(found), found)
    short = found.abs() < values.abs()
    if storage.signed:  # of the sign that has one code less, the very largest may be
        assert bool((found[short].abs() > values[short].abs() * (1 - 1 / storage.top)).all())
    else:
        assert not bool(short.any())
    assert torch.equal(found.sign(), values.sign())


@pytest.mark.parametrize("name", HELD)
def test_rounding_is_straight_through_and_nan_stays(name: str) -> None:
    values = numbers(name).requires_grad_()
    (STORAGES[name].snap(values) * torch.arange(40.0)).sum().backward()
    assert torch.equal(values.grad, torch.arange(40.0).expand(7, 40))
    broken = numbers(name)
    broken[2, 3] = torch.nan
    assert bool(torch.isnan(STORAGES[name].rounded(broken)[2]).any())


# --- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q2_K"])
def test_a_range_above_zero_reaches_down_to_it(kind: str) -> None:
    layout = layout_of(kind)
    weight = torch.rand(12, 512) + 1
    stored = Nearest()(weight, layout)
    assert bool((stored.offsets <= 0).all())
    step = stored.scales.repeat_interleave(layout.format.group_size, 1)
    assert bool(((stored.dequantize() - weight).abs() <= 0.8 * step).all())


@pytest.mark.parametrize("kind", ["Q3_K", "Q6_K"])
def test_the_level_that_is_one_more_goes_to_the_largest_weight(kind: str) -> None:
    layout = layout_of(kind)
    low, high = torch.tensor([[-1.0, -0.5]]), torch.tensor([[0.5, 1.0]])
    scales, offsets = spanning(low, high, layout)
    half = 2 ** (layout.format.bits - 1)
    assert offsets is None
    assert torch.equal(scales, torch.tensor([[1 / half, -1 / half]]))
    stored = Nearest()(torch.randn(12, 512), layout)
    assert 0.2 < float((stored.scales < 0).float().mean()) < 0.8
    want = stored.scales.repeat_interleave(16, 1) * (stored.codes().float() - half)
    assert torch.equal(stored.dequantize(), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("range_", ["minmax", "mse"])
def test_nearest_errs_little_more_than_with_a_float_for_each_group(kind: str, range_: str) -> None:
    layout = layout_of(kind, 48, 1024)
    weight = torch.randn(48, 1024) * (0.02 * torch.rand(48, 1) + 0.01)
    zero = layout.format.zero
    floats = Layout(format=layout.format, storage=Storage.floating("fp16", zero), out=48, columns=1024)
    found, want = (
        float((Nearest(range=range_)(weight, each).dequantize() - weight).norm()) for each in (layout, floats)
    )
    assert found < 1.03 * want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [512, 400, 80])
def test_groups_of_zeros_and_short_rows(kind: str, columns: int) -> None:
    weight = torch.randn(12, columns)
    weight[3], weight[4, :64], weight[5] = 0, 0, 0.5
    stored = Nearest()(weight, layout_of(kind, columns=columns))
    dense = stored.dequantize()
    assert not bool(dense[3].any())
    assert bool(torch.isfinite(dense).all())
    torch.testing.assert_close(dense[5], weight[5], rtol=0.08, atol=0)
    assert QuantWeight(stored.layout, stored.tensors).digest() == stored.digest()


def test_constants_that_fp16_cannot_hold_are_refused() -> None:
    for size in (1e-6, 1e9):
        with pytest.raises(ScaleUnderflow, match="do not fit q4_k"):
            Nearest()(torch.randn(12, 512) * size, layout_of("Q4_K"))
    widened = layout_of("Q4_K").storage.widened()
    assert widened == Storage(scales="fp32", offsets="fp32")
    assert layout_of("Q6_K").storage.widened() == Storage(scales="fp32", offsets="absent")


# --- kernels and negative scales ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 6])
def test_kernels_take_negative_scales(bits: int) -> None:
    """Encoding, its error, and GPTQ's inner loop: `-scale` on the mirrored levels is the same grid."""
    weight = torch.randn(5, 64)
    scales = (torch.rand(5, 4) + 0.5) / 2 ** (bits - 1)
    half = 2 ** (bits - 1)
    kernel = kernels_for(weight.device)
    plain = kernel.nearest_codes(weight, scales, -scales * half, None, bits, 16)
    turned = kernel.nearest_codes(-weight, -scales, scales * half, None, bits, 16)
    assert torch.equal(plain, turned)
    errors = [
        kernel.group_error(each, by, -by * half, None, bits, 16) for each, by in ((weight, scales), (-weight, -scales))
    ]
    assert torch.equal(*errors)
    upper = torch.eye(16) + torch.triu(torch.rand(16, 16), 1) / 8
    one, other = weight[:, :16].contiguous(), -weight[:, :16].contiguous()
    by = scales[:, 0]
    codes = [kernel.compensate(each, upper, s, -s * half, None, bits) for each, s in ((one, by), (other, -by))]
    assert torch.equal(*codes)
    assert torch.equal(one, -other)


# --- GPTQ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_chooses_the_grids_of_a_super_block_at_its_first_column(kind: str) -> None:
    layout, weight = layout_of(kind), torch.randn(12, 512)
    inputs = torch.randn(2000, 512) @ (torch.eye(512) + 0.3 * torch.rand(512, 512) / 16)
    moment = inputs.T @ inputs / 2000
    found = GPTQ()(weight, layout, {"second_moment": moment})
    nearest = Nearest()(weight, layout)
    groups = 256 // layout.format.group_size
    assert torch.equal(found.scales[:, :groups], nearest.scales[:, :groups])  # nothing had been handed on yet
    assert not torch.equal(found.scales[:, groups:], nearest.scales[:, groups:])
    assert found.digest() == GPTQ(block=64)(weight, layout, {"second_moment": moment}).digest()

    def seen(q: QuantWeight) -> float:
        error = (q.dequantize() - weight).double()
        return float((error @ moment.double() * error).sum())

    assert seen(found) < 0.9 * seen(nearest)


# --- settings -------------------------------------------------------------------------------------------------------


def test_it_is_refused_for_another_grid() -> None:
    for name, format in [
        ("q4_k", Format(bits=3, group_size=32)),
        ("q4_k", Format(bits=4, group_size=64)),
        ("q6_k", Format(bits=6, group_size=16)),
        ("q2_k", Format(levels="nf", bits=2, group_size=16, zero="float")),
    ]:
        with pytest.raises(ConfigError, match=r"Use --scales k-quant|Use levels='int'"):
            Nearest().check(Layout(format=format, storage=Storage.floating(name, format.zero), out=1, columns=1))
    with pytest.raises(ConfigError, match="moves offsets"):
        Pooled().check(layout_of("Q6_K"), 4, 0.0)
    with pytest.raises(ConfigError, match="moves offsets"):
        Scales(pooled=True).check(layout_of("Q3_K"), 4, 0.0)
    with pytest.raises(ConfigError, match="scales='linear8-256-fp32' is unknown"):
        L4Q(scales="linear8-256-fp32")


FALLBACKS = {"Q4_K": ("int5-sym-g32", 5.5), "Q5_K": ("int5-g32", 6.0), "Q2_K": ("int4-sym-g32", 4.5)} | {
    "Q3_K": ("int4-sym-g32", 4.5),
    "Q6_K": ("int8-sym-g32", 8.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_no_whole_super_blocks_take_llama_cpps_blocks(kind: str) -> None:
    wanted = layout_of(kind)
    format, storage = wanted.format, wanted.storage
    assert Layout.fitting(format, storage, 12, 512) == wanted
    assert wanted.name == f"int{format.bits}-{kind.lower().replace('_', '')}"
    found = Layout.fitting(format, storage, 12, 96)
    assert (found.name, found.bits_per_weight) == FALLBACKS[kind]
    assert Layout.fitting(found.format, found.storage, 12, 96) == found
    assert Layout.fitting(format, storage, 12, 72).storage == storage  # fits no block of llama.cpp either


def test_layers_say_what_they_take_instead() -> None:
    quantization = Quantization(format=layout_of("Q4_K").format, storage=layout_of("Q4_K").storage, rounding=Nearest())
    _, row = quantize_layer("down", torch.randn(12, 96), quantization, {})
    assert (row.format, row.bits_per_weight) == ("int5-sym-g32", 5.5)
    assert row.note == "int5-sym-g32 for int4-q4k, as llama.cpp does: 96 inputs are no whole super-blocks"
    _, row = quantize_layer("up", torch.randn(12, 256), quantization, {})
    assert (row.format, row.bits_per_weight, row.note) == ("int4-q4k", 4.5, "")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ["l4q", "qa-lora", "qlora"])
def test_k_quant_chooses_the_type_for_the_bits(name: str, bits: int) -> None:
    settings = {"levels": "int"} if name == "qlora" else {}
    method = method_named(name, bits=bits, scales="k-quant", **settings)
    kind = next(each for each in KINDS if KINDS[each][1] == bits)
    wanted = layout_of(kind)
    assert (method.format, method.storage) == (wanted.format, wanted.storage)
    assert method.having(bits=4).storage.scales == "q4_k"  # another width stays in the family
    assert method.having(scales="fp16").storage.scales == "fp16"
    if name == "qa-lora" and wanted.format.zero == "none":
        with pytest.raises(ConfigError, match="moves offsets"):
            method.check()
    else:
        method.check()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"bits": 8}, "are for codes of 2, 3, 4, 5 or 6 bits, not 8. Use fp16"),
        ({"bits": 4, "group_size": 64}, "have group_size=32 at 4 bits, not 64"),
        ({"bits": 3, "zero": "float"}, "have zero='none' at 3 bits, not 'float'"),
        ({"levels": "nf"}, "Use levels='int'"),
    ],
)
def test_k_quant_is_refused_with_advice(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        method_named("qa-lora", scales="k-quant", **settings).check()


def test_pairs_of_storages() -> None:
    pair = Storage(scales="fp16", offsets="fp16").with_scales("q4_k")
    assert pair == Storage(scales="q4_k", offsets="q4_k-min")
    assert (pair.together, pair.local, pair.floats) == (8, False, "q4_k-min")
    assert pair.trained("float") == pair
    assert pair.with_scales("fp32") == Storage(scales="fp32", offsets="fp32")
    assert pair.with_scales("linear8-256-fp32") == Storage(scales="linear8-256-fp32", offsets="fp16")
    alone = Storage(scales="fp16", offsets="absent").with_scales("q6_k")
    assert alone == Storage(scales="q6_k", offsets="absent")
    assert (alone.together, alone.floats, alone.trained("none")) == (16, "fp16", alone)
    assert Storage(scales="double", offsets="double").together is None
