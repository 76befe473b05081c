"""LQ-LoRA's start: a quantized and a low-rank part that belong together, and are better than either alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import lq_numpy
from torch import Tensor

from quadapt.errors import CalibrationError, ConfigError
from quadapt.nn.starts import LQ, Begun, Zero
from quadapt.nn.starts.lq import low_rank, squared_error
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import LINEAR, Storage
from quadapt.quant.weight import Layout, QuantWeight


def quantizer(bits: int, out: int, columns: int) -> Callable[[Tensor], QuantWeight]:
    format = Format(levels="nf", bits=bits, group_size=32)
    layout = Layout(format=format, storage=Storage(scales=LINEAR, offsets="absent"), out=out, columns=columns)
    return lambda weight: Nearest()(weight, layout)


def decaying(out: int, columns: int, power: float = 0.7) -> Tensor:
    """A random matrix whose singular values fall like a power, as those of trained ones do."""
    least = min(out, columns)
    U, V = (torch.linalg.qr(torch.randn(size, least)).Q for size in (out, columns))
    return (U * torch.arange(1, least + 1) ** -power) @ V.T


def error(weight: Tensor, begun: Begun, fisher: Tensor | None = None) -> float:
    up, down = begun.factors or (weight.new_zeros(len(weight), 1), weight.new_zeros(1, weight.shape[1]))
    return squared_error(weight - begun.weight.dequantize(), up, down, fisher) ** 0.5


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_turn_is_returned_as_the_equations_have_it(bits: int, weighted: bool) -> None:
    weight, quantize = decaying(64, 96), quantizer(bits, 64, 96)
    fisher = torch.rand(64, 96).pow(4) if weighted else None
    statistics = {} if fisher is None else {"fisher": fisher}

    def slow(matrix: np.ndarray) -> np.ndarray:
        return quantize(torch.from_numpy(matrix).float()).dequantize().double().numpy()

    _, _, errors = lq_numpy.decompose(
        weight.double().numpy(), slow, 8, 30, None if fisher is None else fisher.double().numpy()
    )
    begun = LQ(iterations=30, fisher=weighted)(weight, quantize, 8, statistics)
    assert error(weight, begun, fisher) == pytest.approx(min(errors), rel=0.02)
    first = LQ(iterations=1, fisher=weighted)(weight, quantize, 8, statistics)
    assert error(weight, first, fisher) == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_turns_are_never_worse_and_all_beat_quantizing_alone(bits: int) -> None:
    weight, quantize = decaying(256, 192), quantizer(bits, 256, 192)
    errors = [error(weight, LQ(iterations=turns)(weight, quantize, 16, {})) for turns in (1, 2, 3, 5, 8, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < error(weight, Zero()(weight, quantize, 16, {}))
    assert errors[-1] < errors[0]


def test_base_and_factors_are_of_one_turn() -> None:
    weight, made = decaying(64, 96), []
    inner = quantizer(2, 64, 96)

    def quantize(matrix: Tensor) -> QuantWeight:
        made.append((matrix.clone(), inner(matrix)))
        return made[-1][1]

    begun = LQ()(weight, quantize, 8, {})
    assert begun.factors is not None
    rest = next(matrix for matrix, weight in made if weight is begun.weight)
    torch.testing.assert_close(weight - begun.factors[0] @ begun.factors[1], rest, rtol=0, atol=1e-6)
    assert len(made) < 100  # it stopped by itself, one turn after the best
    assert made[-2][1] is begun.weight


def test_a_matrix_of_low_rank_is_met() -> None:
    weight = torch.randn(96, 5) @ torch.randn(5, 64)
    for rank in (5, 8):
        begun = LQ()(weight, quantizer(2, 96, 64), rank, {})
        assert error(weight, begun) < 1e-4 * float(weight.norm())


@pytest.mark.parametrize("shape", [(40, 32), (300, 320)])
def test_rank_zero_is_plain_quantization(shape: tuple[int, int]) -> None:
    weight, quantize = decaying(*shape), quantizer(3, *shape)
    begun = LQ()(weight, quantize, 0, {})
    assert begun.factors is None
    assert begun.weight.digest() == quantize(weight).digest()


def test_a_rank_beyond_the_matrix_ends_in_zeros() -> None:
    begun = LQ()(torch.randn(16, 32), quantizer(4, 16, 32), 20, {})
    assert begun.factors is not None
    assert begun.factors[0].shape == (16, 20)
    assert begun.factors[1].shape == (20, 32)
    assert float(begun.factors[0][:, 16:].abs().max()) == float(begun.factors[1][16:].abs().max()) == 0


def test_the_randomized_decomposition_is_nearly_the_exact_one() -> None:
    weight = decaying(400, 360)
    up, down, directions = low_rank(weight, 16)
    assert directions is not None
    least = float(torch.linalg.svdvals(weight.double())[16:].square().sum())
    assert squared_error(weight, up, down, None) < 1.01 * least
    torch.testing.assert_close(up.square().sum(0), down.square().sum(1), rtol=1e-3, atol=1e-6)  # shared out evenly


def test_random_numbers_are_its_own_and_the_same_each_time() -> None:
    weight, quantize = decaying(400, 360), quantizer(3, 400, 360)
    state = torch.get_rng_state()
    first, again = (LQ(iterations=3)(weight, quantize, 16, {}) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.weight.digest() == again.weight.digest()
    assert first.factors is not None
    assert again.factors is not None
    assert torch.equal(first.factors[0], again.factors[0])
    other = LQ(iterations=3, seed=1)(weight, quantize, 16, {})
    assert other.factors is not None
    assert not torch.equal(first.factors[0], other.factors[0])
    assert error(weight, other) == pytest.approx(error(weight, first), rel=0.02)


# --- Fisher information -----------------------------------------------------------------------------------------------


def test_fisher_information_of_rank_one_is_met_exactly() -> None:
    """`F = a b^T`: no product of that rank has a smaller weighted error than the singular values leave."""
    weight, fisher = torch.randn(80, 60), torch.rand(80, 1).exp() * torch.rand(1, 60).exp()
    sides = (fisher.mean(1, keepdim=True).sqrt(), fisher.mean(0, keepdim=True).sqrt())
    up, down, _ = low_rank(weight.double(), 8, sides=(sides[0].double(), sides[1].double()))
    tail = float(torch.linalg.svdvals((fisher.sqrt() * weight).double())[8:].square().sum())
    assert squared_error(weight.double(), up, down, fisher) == pytest.approx(tail, rel=1e-5)


def test_equal_information_weighs_nothing() -> None:
    weight, quantize = decaying(64, 96), quantizer(3, 64, 96)
    plain = LQ()(weight, quantize, 8, {})
    weighted = LQ(fisher=True)(weight, quantize, 8, {"fisher": torch.full((64, 96), 7e-9)})
    assert error(weight, weighted) == pytest.approx(error(weight, plain), rel=1e-4)


@given(factor=st.sampled_from([1e-12, 1e-3, 64.0, 1e9]))
def test_only_ratios_of_the_information_matter(factor: float) -> None:
    torch.manual_seed(0)
    weight, quantize, fisher = decaying(64, 96), quantizer(3, 64, 96), torch.rand(64, 96) ** 4
    one = LQ(fisher=True, iterations=2)(weight, quantize, 8, {"fisher": fisher})
    other = LQ(fisher=True, iterations=2)(weight, quantize, 8, {"fisher": factor * fisher})
    assert error(weight, other, fisher) == pytest.approx(error(weight, one, fisher), rel=1e-3)


@pytest.mark.parametrize("what", ["row", "column", "all"])
def test_weights_that_matter_to_nobody_divide_by_nothing(what: str) -> None:
    weight, fisher = decaying(64, 96), torch.rand(64, 96)
    fisher[{"row": 3, "column": (slice(None), 5), "all": slice(None)}[what]] = 0
    begun = LQ(fisher=True)(weight, quantizer(3, 64, 96), 8, {"fisher": fisher})
    assert begun.factors is not None
    assert all(bool(factor.isfinite().all()) for factor in begun.factors)
    assert error(weight, begun, fisher) <= error(weight, Begun(quantizer(3, 64, 96)(weight)), fisher)


def test_information_helps_where_it_is_uneven() -> None:
    weight, quantize = decaying(96, 128), quantizer(2, 96, 128)
    fisher = (3 * torch.randn(96, 1)).exp() * (3 * torch.randn(1, 128)).exp()
    blind = LQ()(weight, quantize, 8, {})
    seeing = LQ(fisher=True)(weight, quantize, 8, {"fisher": fisher})
    assert error(weight, seeing, fisher) < 0.7 * error(weight, blind, fisher)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({}, "needs Fisher information"),
        ({"fisher": torch.ones(3, 4)}, r"is \(3, 4\), the weight \(64, 96\)"),
        ({"fisher": torch.full((64, 96), torch.nan)}, "NaN or infinite"),
        ({"fisher": torch.full((64, 96), -1.0)}, "negative"),
    ],
)
def test_unusable_information_is_refused(statistics: dict[str, Tensor], message: str) -> None:
    assert LQ(fisher=True).needs == {"fisher"}
    assert not LQ().needs
    with pytest.raises(CalibrationError, match=message):
        LQ(fisher=True)(decaying(64, 96), quantizer(3, 64, 96), 8, statistics)


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"tolerance": 1.0}, {"tolerance": -0.1}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        LQ(**settings)
