"""GPTQ against the textbook algorithm in NumPy, and the properties that its authors state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.gptq_numpy import damped, gptq, weighted_error
from reference.nearest_numpy import dequantize
from torch import Tensor

from quadapt.errors import CalibrationError, ConfigError, ShapeError
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ, inverse_factor
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

GRIDS = [
    *[("int", bits, zero) for bits in (2, 3, 4) for zero in ("float", "integer", "none")],
    ("int", 8, "float"),
    *[("nf", bits, zero) for bits in (2, 3, 4) for zero in ("none", "float")],
    ("nf-sym", 2, "none"),
]


def layout_of(format: Format, rows: int, columns: int, storage: Storage | None = None) -> Layout:
    return Layout(format=format, storage=storage or Storage.default(format), out=rows, columns=columns)


def correlated(columns: int, *, tokens: int = 200, seed: int = 0) -> Tensor:
    """The second moment of inputs that are correlated and of very different sizes, float64."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random, dtype=torch.float64) / columns**0.5
    x = torch.randn(tokens, columns, generator=random, dtype=torch.float64) @ (mix + 0.5 * torch.eye(columns))
    x = x * torch.rand(columns, generator=random, dtype=torch.float64).add(0.1)
    return x.T @ x / tokens


def levels_of(format: Format) -> list[float] | None:
    table = format.table(torch.zeros(1))
    return None if table is None else table.double().tolist()


def textbook(weight: Tensor, moment: Tensor, format: Format, **settings: object) -> tuple[np.ndarray, ...]:
    stored = np.float16
    return gptq(
        weight.numpy(),
        moment.numpy(),
        format.bits,
        format.width(weight.shape[1]),
        levels=levels_of(format),
        zero=format.zero,
        stored=stored,
        **settings,
    )


def assert_equal(found: QuantWeight, want: tuple[np.ndarray, ...]) -> None:
    """Codes exactly, scales and offsets as stored, and the weights in the layer's own order."""
    codes, scales, offsets, order = want
    np.testing.assert_array_equal(found.codes().numpy()[:, order], codes)
    np.testing.assert_array_equal(found.scales.numpy(), scales.astype(np.float32))
    if found.offsets is not None:
        np.testing.assert_allclose(found.offsets.numpy(), offsets, rtol=1e-6)
    width = found.format.width(found.layout.columns)
    dense = np.zeros_like(codes, dtype=np.float64)
    dense[:, order] = dequantize(codes, scales, offsets, width, levels_of(found.format))
    np.testing.assert_allclose(found.dequantize().numpy(), dense, atol=1e-6)


# --- against the textbook ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [16, 32, 64, -1])
@pytest.mark.parametrize(("levels", "bits", "zero"), GRIDS)
def test_codes_and_scales_are_the_textbooks(levels: str, bits: int, zero: str, group_size: int) -> None:
    weight, moment = torch.randn(5, 80, dtype=torch.float64), correlated(80)
    format = Format(levels=levels, bits=bits, zero=zero, group_size=group_size)
    found = GPTQ()(weight, layout_of(format, 5, 80), {"second_moment": moment})
    assert_equal(found, textbook(weight, moment, format))


@pytest.mark.parametrize("damping", [1e-4, 0.01, 0.5])
def test_damping_is_a_share_of_the_mean_of_the_diagonal(damping: float) -> None:
    weight, moment = torch.randn(5, 48, dtype=torch.float64), correlated(48)
    found = GPTQ(damping=damping)(weight, layout_of(Format(bits=3), 5, 48), {"second_moment": moment})
    assert_equal(found, textbook(weight, moment, Format(bits=3), damping=damping))
    assert not torch.equal(found.codes(), Nearest()(weight, layout_of(Format(bits=3), 5, 48)).codes())


@pytest.mark.parametrize(("levels", "bits", "zero"), [("int", 4, "float"), ("int", 3, "integer"), ("nf", 3, "none")])
def test_static_groups_take_their_scales_from_the_original_weights(levels: str, bits: int, zero: str) -> None:
    weight, moment = torch.randn(5, 80, dtype=torch.float64), correlated(80)
    format = Format(levels=levels, bits=bits, zero=zero, group_size=32)
    layout = layout_of(format, 5, 80)
    found = GPTQ(static_groups=True)(weight, layout, {"second_moment": moment})
    assert_equal(found, textbook(weight, moment, format, static=True))
    assert torch.equal(found.scales, Nearest()(weight, layout).scales)
    assert not torch.equal(found.scales, GPTQ()(weight, layout, {"second_moment": moment}).scales)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("levels", "bits", "zero"), [("int", 4, "float"), ("int", 2, "integer"), ("nf", 4, "none")])
def test_act_order_rounds_large_inputs_first_and_gives_columns_back_in_order(
    levels: str, bits: int, zero: str, static: bool
) -> None:
    weight, moment = torch.randn(5, 80, dtype=torch.float64), correlated(80)
    format = Format(levels=levels, bits=bits, zero=zero, group_size=32)
    found = GPTQ(act_order=True, static_groups=static)(weight, layout_of(format, 5, 80), {"second_moment": moment})
    want = textbook(weight, moment, format, act_order=True, static=static)
    assert_equal(found, want)
    assert found.layout.permuted
    np.testing.assert_array_equal(found.tensors["perm"].numpy()[want[3]], np.arange(80))


def test_double_quantized_scales_are_those_that_codes_are_chosen_for() -> None:
    weight, moment = torch.randn(20, 96, dtype=torch.float64), correlated(96)
    format = Format(levels="nf", bits=4, group_size=32)
    layout = layout_of(format, 20, 96, Storage(scales="double", offsets="absent"))
    found = GPTQ(static_groups=True)(weight, layout, {"second_moment": moment})
    scales = found.scales.double().numpy()
    codes, *_ = gptq(
        weight.numpy(),
        moment.numpy(),
        4,
        32,
        levels=levels_of(format),
        zero="none",
        given=(scales, np.zeros_like(scales)),
    )
    np.testing.assert_array_equal(found.codes().numpy(), codes)
    assert torch.equal(found.scales, Nearest()(weight, layout).scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_double_quantized_offsets_are_those_that_codes_are_chosen_for(dtype: torch.dtype) -> None:
    weight, moment = torch.randn(20, 96, dtype=dtype), correlated(96)
    format = Format(levels="nf", bits=3, group_size=32, zero="float")
    layout = layout_of(format, 20, 96, Storage(scales="double", offsets="double"))
    found = GPTQ(static_groups=True)(weight, layout, {"second_moment": moment})
    kept = (found.scales.double().numpy(), found.offsets.double().numpy())
    codes, *_ = gptq(weight.double().numpy(), moment.numpy(), 3, 32, levels=levels_of(format), given=kept)
    assert (found.codes().numpy() != codes).mean() <= (0.01 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("group_size", [32, -1])
def test_the_block_size_does_not_change_the_result(group_size: int) -> None:
    weight, moment = torch.randn(6, 300, dtype=torch.float64), correlated(300, tokens=600)
    layout = layout_of(Format(bits=3, group_size=group_size), 6, 300)
    found = [GPTQ(block=block)(weight, layout, {"second_moment": moment}) for block in (1, 32, 100, 128, 1000)]
    assert len({each.digest() for each in found}) == 1


def test_in_float32_nearly_all_codes_are_those_of_float64() -> None:
    weight, moment = torch.randn(32, 128), correlated(128)
    layout = layout_of(Format(bits=4), 32, 128)
    narrow = GPTQ()(weight, layout, {"second_moment": moment})
    wide = GPTQ()(weight.double(), layout, {"second_moment": moment})
    assert float((narrow.codes() != wide.codes()).float().mean()) < 0.01


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    moment = correlated(40)
    upper = inverse_factor(moment, 0.01)
    assert torch.equal(upper, upper.triu())
    np.testing.assert_allclose((upper.T @ upper).numpy(), np.linalg.inv(damped(moment.numpy(), 0.01)), rtol=1e-8)


# --- what the algorithm promises --------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    grid=st.sampled_from([*(("int", bits) for bits in (2, 3, 4, 5, 6, 8)), *(("nf", bits) for bits in (2, 3, 4, 8))]),
    group_size=st.sampled_from([16, 32, -1]),
)
def test_uncorrelated_inputs_leave_nothing_to_make_up_for(seed: int, grid: tuple[str, int], group_size: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight, diagonal = torch.randn(4, 70, generator=random), torch.rand(70, generator=random) + 0.01
    layout = layout_of(Format(levels=grid[0], bits=grid[1], group_size=group_size), 4, 70)
    found = GPTQ()(weight, layout, {"second_moment": diagonal.diag()})
    assert found.digest() == Nearest()(weight, layout).digest()


@pytest.mark.parametrize(("levels", "bits"), [("int", 2), ("int", 3), ("int", 4), ("int", 5), ("nf", 3), ("nf", 4)])
@pytest.mark.parametrize("static", [False, True])
def test_the_weighted_error_is_lower_than_nearests_on_average(levels: str, bits: int, static: bool) -> None:
    layout = layout_of(Format(levels=levels, bits=bits, group_size=32), 16, 64)
    ratios = []
    for seed in range(12):
        weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
        moment = correlated(64, seed=seed)
        errors = [
            weighted_error((each.dequantize() - weight).double().numpy(), moment.numpy())
            for each in (
                GPTQ(static_groups=static)(weight, layout, {"second_moment": moment}),
                Nearest()(weight, layout),
            )
        ]
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 0.8


def test_dead_inputs_neither_widen_their_group_nor_matter() -> None:
    weight, moment = torch.randn(5, 64, dtype=torch.float64), correlated(64)
    dead = [3, 40, 41]
    moment[dead], moment[:, dead] = 0, 0
    loud, silent = weight.clone(), weight.clone()
    loud[:, dead], silent[:, dead] = 1000, 0
    layout = layout_of(Format(bits=4), 5, 64)
    found = GPTQ()(loud, layout, {"second_moment": moment})
    assert found.digest() == GPTQ()(silent, layout, {"second_moment": moment}).digest()
    assert_equal(found, textbook(loud, moment, Format(bits=4)))
    step = found.scales.repeat_interleave(32, 1)[:, dead]
    assert bool((found.dequantize()[:, dead].abs() <= step / 2 * 1.0001).all())


def test_inputs_that_are_all_dead_give_what_nearest_gives_zeros() -> None:
    layout = layout_of(Format(bits=4), 5, 64)
    found = GPTQ()(torch.randn(5, 64), layout, {"second_moment": torch.zeros(64, 64)})
    assert torch.equal(found.dequantize(), torch.zeros(5, 64))


@pytest.mark.parametrize("settings", [{}, {"act_order": True}, {"static_groups": True}, {"range": "mse"}], ids=str)
def test_what_it_is_given_stays_as_it_was(settings: dict[str, object]) -> None:
    weight, moment = torch.randn(5, 64), correlated(64)
    copies = weight.clone(), moment.clone()
    GPTQ(**settings)(weight, layout_of(Format(bits=4), 5, 64), {"second_moment": moment})
    assert torch.equal(weight, copies[0])
    assert torch.equal(moment, copies[1])


def test_the_mse_range_lowers_the_weighted_error_at_two_bits() -> None:
    layout, ratios = layout_of(Format(bits=2, group_size=64), 16, 64), []
    for seed in range(8):
        weight, moment = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)), correlated(64, seed=seed)
        errors = [
            weighted_error(
                (GPTQ(range=kind)(weight, layout, {"second_moment": moment}).dequantize() - weight).double().numpy(),
                moment.numpy(),
            )
            for kind in ("mse", "minmax")
        ]
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 0.9


def test_a_parameter_is_quantized_like_its_values() -> None:
    weight, moment = torch.randn(5, 64), correlated(64)
    layout = layout_of(Format(bits=4), 5, 64)
    want = GPTQ()(weight, layout, {"second_moment": moment}).digest()
    assert GPTQ()(torch.nn.Parameter(weight), layout, {"second_moment": moment}).digest() == want


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused(value: float) -> None:
    moment = correlated(64)
    moment[3, 5] = moment[5, 3] = value
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        GPTQ()(torch.randn(4, 64), layout_of(Format(bits=4), 4, 64), {"second_moment": moment})


def test_a_moment_that_is_not_positive_definite_is_refused() -> None:
    moment = torch.eye(64, dtype=torch.float64)
    moment[0, 1] = moment[1, 0] = 5.0
    with pytest.raises(CalibrationError, match="larger damping"):
        GPTQ()(torch.randn(4, 64), layout_of(Format(bits=4), 4, 64), {"second_moment": moment})


def test_fewer_tokens_than_inputs_are_made_up_for_by_damping() -> None:
    x = torch.randn(10, 64, dtype=torch.float64)
    found = GPTQ()(torch.randn(4, 64), layout_of(Format(bits=4), 4, 64), {"second_moment": x.T @ x / 10})
    assert bool(torch.isfinite(found.dequantize()).all())


def test_missing_or_foreign_statistics_are_refused() -> None:
    layout = layout_of(Format(bits=4), 4, 64)
    with pytest.raises(CalibrationError, match="Give calibration data"):
        GPTQ()(torch.randn(4, 64), layout, {})
    with pytest.raises(ShapeError, match=r"second_moment is \(32, 32\), the layer has 64 inputs"):
        GPTQ()(torch.randn(4, 64), layout, {"second_moment": torch.eye(32)})


@pytest.mark.parametrize("damping", [0.0, 1.0, -0.1])
def test_damping_that_makes_no_sense_is_refused(damping: float) -> None:
    with pytest.raises(ConfigError, match="is not between 0 and 1"):
        GPTQ(damping=damping)(torch.randn(4, 64), layout_of(Format(bits=4), 4, 64), {"second_moment": torch.eye(64)})


def test_double_quantization_without_static_groups_is_refused() -> None:
    layout = layout_of(Format(levels="nf", bits=4), 4, 64, Storage(scales="double", offsets="absent"))
    with pytest.raises(ConfigError, match="static_groups=True"):
        GPTQ()(torch.randn(4, 64), layout, {"second_moment": torch.eye(64)})


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = torch.randn(4, 64)
    weight[1, 2] = float("nan")
    with pytest.raises(ShapeError, match="NaN or infinite"):
        GPTQ()(weight, layout_of(Format(bits=4), 4, 64), {"second_moment": torch.eye(64)})


def test_a_weight_of_another_shape_than_its_layout_is_refused() -> None:
    with pytest.raises(ShapeError):
        GPTQ()(torch.randn(6, 64), layout_of(Format(bits=4), 4, 64), {"second_moment": torch.eye(64)})
