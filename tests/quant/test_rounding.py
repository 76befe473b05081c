"""Rounding to nearest: against the papers' formulas, weight by weight, and the promises that hold for any weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import nearest_numpy
from torch import Tensor

from quadapt.errors import ConfigError, ShapeError
from quadapt.kernels import kernels_for, unpack
from quadapt.quant.format import Format, normal_levels
from quadapt.quant.grids import implied_offsets
from quadapt.quant.rounding import Nearest, ScaleUnderflow, find_grid
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

GRIDS = [
    *[("int", bits, zero) for bits in (2, 3, 4, 5, 6, 8) for zero in ("float", "integer", "none")],
    *[("nf", bits, zero) for bits in (2, 3, 4, 8) for zero in ("none", "float")],
    ("nf-sym", 2, "none"),
    ("nf-sym", 2, "float"),
    ("nf-qlora", 4, "none"),
    ("fp4", 4, "none"),
    ("fp4", 4, "float"),
    ("iq4-nl", 4, "none"),
    ("iq4-nl", 4, "float"),
]
FP32 = {"float": "fp32", "integer": "integer", "none": "absent"}


def layout_of(format: Format, shape: tuple[int, int], scales: str = "") -> Layout:
    storage = Storage(scales="fp32", offsets=FP32[format.zero]) if scales == "fp32" else Storage.default(format)
    return Layout(format=format, storage=storage, out=shape[0], columns=shape[1])


def levels_of(format: Format) -> Tensor:
    """The levels between which a weight may lie, in float64."""
    if format.levels == "int":
        return torch.arange(2.0**format.bits, dtype=torch.float64)
    if format.levels in ("nf-qlora", "fp4", "iq4-nl"):
        return format.table(torch.zeros(1)).double()
    return torch.tensor(normal_levels(format.bits, symmetric=format.levels == "nf-sym"), dtype=torch.float64)


def one_zero(codes: np.ndarray, levels: str) -> np.ndarray:
    """Codes where the two zeros of FP4 have the code of the first, so that codes differ only if values do."""
    return np.where((codes == 8) & (levels == "fp4"), 7, codes)


def per_weight(values: Tensor, weight: QuantWeight) -> Tensor:
    width = weight.format.width(weight.layout.columns)
    return values.double().repeat_interleave(width, 1)[:, : weight.layout.columns]


def misses(weight: Tensor, rounded: QuantWeight) -> tuple[Tensor, Tensor]:
    """How far each weight is from the level it got, and from its nearest level, by trying all (float64)."""
    scale = per_weight(rounded.scales, rounded)
    offset = 0 if rounded.offsets is None else per_weight(rounded.offsets, rounded)
    values = levels_of(rounded.format) * scale[..., None] + (offset if isinstance(offset, int) else offset[..., None])
    distance = (values - weight.double()[..., None]).abs()
    got = distance.gather(-1, rounded.codes().long()[..., None])[..., 0]
    return got, distance.amin(-1)


# --- against the formulas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "bits", "zero"), GRIDS)
@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_nearest_is_the_papers_formula(levels: str, bits: int, zero: str, group_size: int) -> None:
    weight = 0.1 * torch.randn(6, 72) + 0.02
    format = Format(levels=levels, bits=bits, zero=zero, group_size=group_size)
    rounded = Nearest()(weight, layout_of(format, (6, 72)))
    stored = np.float16
    values = None if levels == "int" else levels_of(format).tolist()
    codes, scales, offsets = nearest_numpy.quantize(
        weight.numpy(), bits, format.width(72), levels=values, zero=zero, stored=stored
    )
    np.testing.assert_allclose(rounded.scales.numpy(), scales, rtol=0)
    found = np.zeros_like(offsets) if rounded.offsets is None else rounded.offsets.numpy()
    np.testing.assert_allclose(found, offsets, rtol=1e-6, atol=1e-8)
    differing = one_zero(rounded.codes().numpy(), levels) != one_zero(codes, levels)
    assert differing.sum() <= 1  # at most one weight so near to a threshold that float32 decides otherwise
    want = nearest_numpy.dequantize(rounded.codes().numpy(), scales, offsets, format.width(72), values)
    np.testing.assert_allclose(rounded.dequantize().numpy(), want, atol=1e-6)


@pytest.mark.parametrize(("levels", "bits", "zero"), GRIDS)
def test_in_float64_codes_equal_the_formula(levels: str, bits: int, zero: str) -> None:
    weight = torch.randn(4, 80, dtype=torch.float64)
    format = Format(levels=levels, bits=bits, zero=zero, group_size=32)
    values = None if levels == "int" else torch.tensor(levels_of(format).tolist()).double().tolist()
    codes, scales, _ = nearest_numpy.quantize(weight.numpy(), bits, 32, levels=values, zero=zero, stored=np.float64)
    exact = find_grid(weight, layout_of(format, (4, 80), "fp32"))
    np.testing.assert_allclose(exact[0].numpy(), scales, rtol=1e-15)
    rounded = Nearest(code_against="exact")(weight, layout_of(format, (4, 80), "fp32"))
    np.testing.assert_array_equal(one_zero(rounded.codes().numpy(), levels), one_zero(codes, levels))


@pytest.mark.parametrize(("levels", "bits", "zero"), GRIDS)
@given(
    values=arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 50)),
        elements=st.floats(-100, 100, width=32, allow_subnormal=False),
    )
)
def test_no_level_is_nearer_than_the_one_taken(levels: str, bits: int, zero: str, values: np.ndarray) -> None:
    weight, format = torch.from_numpy(values), Format(levels=levels, bits=bits, zero=zero, group_size=16)
    rounded = Nearest()(weight, layout_of(format, tuple(weight.shape), "fp32"))
    got, best = misses(weight, rounded)
    size = weight.abs().max() + 1
    assert float((got - best).max()) <= 1e-5 * float(size)


@pytest.mark.parametrize("zero", ["float", "integer", "none"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_error_of_integers_is_at_most_half_a_step(bits: int, zero: str) -> None:
    weight = torch.randn(20, 80)
    rounded = Nearest()(weight, layout_of(Format(bits=bits, zero=zero, group_size=32), (20, 80), "fp32"))
    error = (rounded.dequantize() - weight).abs()
    step = per_weight(rounded.scales, rounded)
    reach = 1 if zero == "integer" else 0.5  # a whole zero-point may push an extreme weight half a step out of range
    assert float((error / step).max()) <= reach * (1 + 1e-5)
    assert float((error / step).max()) > 0.4


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("zero", ["float", "integer", "none"])
def test_scales_in_float16_cost_codes_of_eight_bits_next_to_nothing(zero: str, group_size: int) -> None:
    """Which is why they are the default there too: it was measured at 0.04 % of the error at most."""
    weight, format = 0.05 * torch.randn(256, 512), Format(bits=8, zero=zero, group_size=group_size)
    layouts = [layout_of(format, (256, 512), scales) for scales in ("fp32", "")]
    wide, halves = (float((Nearest()(weight, layout).dequantize() - weight).norm()) for layout in layouts)
    assert layouts[1].storage.scales == "fp16"
    assert halves < 1.001 * wide


def test_iq4_nl_errs_less_than_symmetric_integers_of_as_many_bits() -> None:
    weight, formats = torch.randn(128, 512), (Format(levels="iq4-nl", bits=4), Format(bits=4, zero="none"))
    table, even = (Nearest(range="mse")(weight, layout_of(format, (128, 512))) for format in formats)
    assert table.layout.bits_per_weight == even.layout.bits_per_weight == 4.5
    assert (table.dequantize() - weight).norm() < 0.95 * (even.dequantize() - weight).norm()


@pytest.mark.parametrize("zero", ["none", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_of_quantiles_is_at_most_half_the_local_gap(bits: int, zero: str) -> None:
    weight = torch.randn(20, 80)
    rounded = Nearest()(weight, layout_of(Format(levels="nf", bits=bits, zero=zero, group_size=32), (20, 80), "fp32"))
    unit = weight.double() - (per_weight(rounded.offsets, rounded) if zero == "float" else 0)
    unit = unit / per_weight(rounded.scales, rounded)
    table = levels_of(rounded.format)
    above = torch.bucketize(unit, table).clamp(1, len(table) - 1)
    gap = table[above] - table[above - 1]
    error = (rounded.dequantize() - weight).abs() / per_weight(rounded.scales, rounded)
    assert float((error / gap).max()) <= 0.5 + 1e-5


@pytest.mark.parametrize(("levels", "bits", "zero"), GRIDS)
def test_rounding_again_on_the_same_grid_moves_nothing(levels: str, bits: int, zero: str) -> None:
    format = Format(levels=levels, bits=bits, zero=zero, group_size=32)
    once = Nearest()(torch.randn(9, 80), layout_of(format, (9, 80)))
    kernel = kernels_for(torch.device("cpu"))
    table = format.table(once.scales)
    again = kernel.nearest_codes(once.dequantize(), once.scales, once.offsets, table, bits, 32)
    codes = (one_zero(unpack(packed, bits, 80).numpy(), levels) for packed in (again, once.packed))
    np.testing.assert_array_equal(*codes)


def test_what_fills_its_range_comes_back_exactly() -> None:
    weight = torch.arange(16.0).repeat(3, 2) - 5
    rounded = Nearest()(weight, layout_of(Format(bits=4, group_size=16), (3, 32)))
    assert torch.equal(rounded.dequantize(), weight)


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["fp16", "fp32"])
@pytest.mark.parametrize(("levels", "bits", "zero"), GRIDS)
def test_the_mse_range_is_never_worse_than_minmax(levels: str, bits: int, zero: str, scales: str) -> None:
    weight = torch.distributions.StudentT(3.0).sample((30, 80)) * 0.05
    layout = layout_of(Format(levels=levels, bits=bits, zero=zero, group_size=32), (30, 80), scales)
    minmax, mse = Nearest()(weight, layout), Nearest(range="mse")(weight, layout)

    def errors(rounded: QuantWeight) -> Tensor:
        missed = torch.nn.functional.pad(rounded.dequantize() - weight, (0, 16)).double()
        return missed.square().unflatten(1, (-1, 32)).sum(-1)

    assert bool((errors(mse) <= errors(minmax) * (1 + 1e-5) + 1e-12).all())
    if bits < 8:
        assert float(errors(mse).sum()) < 0.999 * float(errors(minmax).sum())


def test_the_mse_range_is_the_best_of_the_candidates() -> None:
    weight = torch.randn(1, 32).double()
    layout = layout_of(Format(bits=2, group_size=32), (1, 32), "fp32")
    rounded = Nearest(range="mse")(weight.float(), layout)
    best = min(_error_at(weight, 1 - 0.8 * step / 100) for step in range(100))
    found = float((rounded.dequantize().double() - weight).square().sum())
    assert found == pytest.approx(best, rel=1e-4)


def _error_at(weight: Tensor, shrink: float) -> float:
    """Squared error of two-bit integers over the range of `weight`, shrunk."""
    low, high = float(weight.min()) * shrink, float(weight.max()) * shrink
    scale = (high - low) / 3
    return sum(min((value - low - scale * code) ** 2 for code in range(4)) for value in weight.flatten().tolist())


# --- what codes are computed against ----------------------------------------------------------------------------------


def test_codes_are_computed_against_what_is_stored_or_against_what_is_exact() -> None:
    """With scales that fp16 rounds, the two differ, and each is nearest on its own grid."""
    weight = torch.randn(64, 256)
    layout = Layout(format=Format(bits=8, group_size=64), storage=Storage(), out=64, columns=256)
    stored, exact = Nearest(code_against="stored")(weight, layout), Nearest(code_against="exact")(weight, layout)
    assert torch.equal(stored.scales, exact.scales)
    assert torch.equal(stored.offsets, exact.offsets)
    assert not torch.equal(stored.codes(), exact.codes())
    scales, offsets = find_grid(weight, layout)
    for rounded, s, o in ((stored, stored.scales, stored.offsets), (exact, scales, offsets)):
        want = ((weight - o.repeat_interleave(64, 1)) / s.repeat_interleave(64, 1)).round().clamp(0, 255)
        assert torch.equal(rounded.codes().float(), want)
    error = {name: float((each.dequantize() - weight).norm()) for name, each in (("stored", stored), ("exact", exact))}
    assert error["stored"] < error["exact"]


@pytest.mark.parametrize("zero", ["float", "integer", "none"])
def test_implied_offsets_are_those_of_the_weight(zero: str) -> None:
    weight, layout = torch.randn(5, 64), layout_of(Format(bits=4, zero=zero), (5, 64), "fp32")
    rounded = Nearest()(weight, layout)
    assert torch.equal(implied_offsets(layout, *find_grid(weight, layout)), rounded.offsets)


# --- groups out of the ordinary ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "bits", "zero"), GRIDS)
def test_a_group_of_zeros_stays_zero(levels: str, bits: int, zero: str) -> None:
    weight = torch.randn(4, 64)
    weight[1, :32] = 0
    rounded = Nearest()(weight, layout_of(Format(levels=levels, bits=bits, zero=zero, group_size=32), (4, 64)))
    assert float(rounded.dequantize()[1, :32].abs().max()) <= (1e-5 if levels in ("nf-sym", "iq4-nl") else 0.0)


@pytest.mark.parametrize(("levels", "bits", "zero"), [grid for grid in GRIDS if grid[2] == "float"])
@pytest.mark.parametrize("value", [0.3, -7.0])
def test_a_constant_group_with_a_free_offset_is_kept(levels: str, bits: int, zero: str, value: float) -> None:
    weight = torch.full((2, 32), value)
    rounded = Nearest()(weight, layout_of(Format(levels=levels, bits=bits, zero=zero, group_size=32), (2, 32), "fp32"))
    atol = 2e-6 if levels == "iq4-nl" else 1e-6  # whose level nearest to zero is 1, times the smallest scale
    torch.testing.assert_close(rounded.dequantize(), weight, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("zero", ["integer", "none"])
@pytest.mark.parametrize("value", [0.3, -7.0])
def test_a_constant_group_without_one_is_an_extreme_of_its_range(zero: str, value: float) -> None:
    rounded = Nearest()(torch.full((2, 32), value), layout_of(Format(bits=4, zero=zero), (2, 32), "fp32"))
    torch.testing.assert_close(rounded.dequantize(), torch.full((2, 32), value), rtol=1e-6, atol=0)


def test_the_last_group_of_a_row_may_be_shorter() -> None:
    weight = torch.cat([torch.randn(3, 64), 100 * torch.randn(3, 5)], 1)
    rounded = Nearest()(weight, layout_of(Format(bits=4, group_size=32), (3, 69)))
    assert rounded.scales.shape == (3, 3)
    alone = Nearest()(weight[:, 64:], layout_of(Format(bits=4, group_size=32), (3, 5)))
    assert torch.equal(rounded.dequantize()[:, 64:], alone.dequantize())
    front = Nearest()(weight[:, :64], layout_of(Format(bits=4, group_size=32), (3, 64)))
    assert torch.equal(rounded.dequantize()[:, :64], front.dequantize())


def test_double_quantized_scales_near_a_group_of_zeros_stay_as_good() -> None:
    """bitsandbytes stores a scale of zero for such a group; a scale of 1 coarsens the 255 that share its constant."""
    weight = 0.005 * torch.randn(64, 256)
    storage = Storage(scales="double", offsets="absent")
    layout = Layout(format=Format(levels="nf", bits=4, group_size=64), storage=storage, out=64, columns=256)
    qlora = Nearest(code_against="exact")
    whole = qlora(weight, layout)
    weight[3] = 0
    holed = qlora(weight, layout)
    others = torch.arange(64) != 3
    error = [float((each.dequantize()[others] - weight[others]).norm()) for each in (whole, holed)]
    assert error[1] <= 1.002 * error[0]


@pytest.mark.parametrize("rows", [1, 7])
def test_rows_rounded_in_chunks_are_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from quadapt.kernels import reference

    weight, layout = torch.randn(rows, 80), layout_of(Format(bits=4), (rows, 80))
    whole = Nearest(range="mse")(weight, layout)
    monkeypatch.setattr(reference, "_CHUNK", 160)
    assert Nearest(range="mse")(weight, layout).digest() == whole.digest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("scales", "offsets"), [("fp16", "fp16"), ("fp32", "fp32"), ("double", "double")])
def test_weights_of_any_float_dtype_are_rounded_as_their_values(dtype: torch.dtype, scales: str, offsets: str) -> None:
    weight = torch.randn(5, 64).to(torch.bfloat16)
    for format in (Format(bits=4), Format(levels="nf", bits=4, zero="float")):
        layout = Layout(format=format, storage=Storage(scales=scales, offsets=offsets), out=5, columns=64)
        rounded = Nearest()(weight.to(dtype), layout)
        assert torch.equal(rounded.dequantize(), Nearest()(weight.float(), layout).dequantize())


def test_the_weight_is_left_as_it_was() -> None:
    weight = torch.randn(5, 64)
    before = weight.clone()
    Nearest(range="mse")(weight, layout_of(Format(bits=4), (5, 64)))
    assert torch.equal(weight, before)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_weights_that_are_not_finite_are_counted(value: float, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64, dtype=dtype)
    weight[2, 5] = weight[3, 60] = value
    with pytest.raises(ShapeError, match="2 of 256 weights are NaN or infinite"):
        Nearest()(weight, layout_of(Format(bits=4), (4, 64)))


@pytest.mark.parametrize("size", [1e-7, 1e7])
def test_scales_that_fp16_cannot_hold_are_refused_with_advice(size: float) -> None:
    weight = size * torch.randn(4, 64)
    layout = layout_of(Format(bits=4), (4, 64))
    with pytest.raises(ScaleUnderflow, match="Use fp32 scales"):
        Nearest()(weight, layout)
    wide = Nearest()(weight, layout_of(Format(bits=4), (4, 64), "fp32"))
    assert float((wide.dequantize() - weight).norm() / weight.norm()) < 0.1


def test_scales_that_pass_are_within_a_64th_in_fp16() -> None:
    smallest = torch.linspace(0, 1, 64)[None] * 15 * 33 * 2.0**-24
    layout = layout_of(Format(bits=4, group_size=64), (1, 64))
    rounded = Nearest()(smallest, layout)
    exact, _ = find_grid(smallest, layout)
    assert float((rounded.scales / exact - 1).abs().max()) <= 1 / 64


def test_offsets_that_fp16_cannot_hold_are_refused() -> None:
    weight = 70000 + torch.randn(2, 32)
    with pytest.raises(ShapeError):
        Nearest()(weight, layout_of(Format(bits=4), (2, 32)))


def test_a_weight_of_another_shape_than_its_layout_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"the weight is \(4, 64\), its layout \(4, 32\)"):
        Nearest()(torch.randn(4, 64), layout_of(Format(bits=4), (4, 32)))


def test_an_unknown_range_is_refused() -> None:
    for settings in ({"range": "percentile"}, {"code_against": "nothing"}):
        with pytest.raises(ConfigError):
            Nearest(**settings)(torch.randn(4, 32), layout_of(Format(bits=4), (4, 32)))
