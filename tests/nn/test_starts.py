"""Starts: their objective, their optimum, and what a layer computes before the first step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import starts_numpy as oracle
from torch import Tensor

from quadapt.errors import CalibrationError, ConfigError
from quadapt.nn.starts import QERA, STARTS, CLoQ, LoftQ, QuAILoRA, Zero
from quadapt.nn.starts.fit import balanced, best_offsets, leading, objective
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest, Rounding
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

OUT, IN, RANK = 24, 80, 4


def moment(columns: int = IN, tokens: int = 400, seed: int = 1) -> Tensor:
    """Of correlated inputs, a few of them large."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random, dtype=torch.float64) / columns**0.5
    x = torch.randn(tokens, columns, generator=random, dtype=torch.float64) @ (mix + torch.eye(columns))
    x[:, ::17] *= 8
    return x.T @ x / tokens


def error(out: int = OUT, columns: int = IN, seed: int = 2) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(factors: tuple[Tensor, Tensor]) -> Tensor:
    return factors[0] @ factors[1]


def quantizer(
    format: Format, rounding: Rounding | None = None, storage: Storage | None = None
) -> Callable[[Tensor], QuantWeight]:
    layout = Layout(format=format, storage=storage or Storage.default(format), out=OUT, columns=IN)
    rounding = rounding or Nearest()
    return lambda weight: rounding(weight, layout, {"second_moment": moment()})


# --- QuAILoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sweeps", [1, 3, 20])
def test_quailora_is_its_equations(sweeps: int) -> None:
    E, H = error(), moment()
    A, Bt, trace = oracle.quailora(E.numpy(), H.numpy(), RANK, sweeps)
    found = QuAILoRA(iterations=sweeps).fit(E, H, RANK)
    np.testing.assert_allclose(product(found).numpy(), A @ Bt, rtol=0, atol=1e-6)
    assert objective(E, H, found) == pytest.approx(trace[-1], rel=1e-8)


def test_no_half_step_raises_the_objective_and_none_is_worse_than_zero() -> None:
    E, H = error(), moment()
    _, _, trace = oracle.quailora(E.numpy(), H.numpy(), RANK, 20)
    assert all(after <= before * (1 + 1e-10) for before, after in pairwise(trace))
    found = [objective(E, H, QuAILoRA(iterations=count).fit(E, H, RANK)) for count in range(1, 21)]
    assert all(after <= before * (1 + 1e-10) for before, after in pairwise(found))
    assert found[0] <= trace[0] <= objective(E, H)


def test_it_converges_to_the_closed_form_at_the_rate_of_the_singular_values() -> None:
    E, H = error(), moment()
    S = np.linalg.svd(E.numpy() @ np.linalg.cholesky(H.numpy()), compute_uv=False)
    best = oracle.best_objective(E.numpy(), H.numpy(), RANK)
    gaps = [objective(E, H, QuAILoRA(iterations=count).fit(E, H, RANK)) - best for count in (10, 14, 400)]
    assert gaps[2] <= 1e-8 * best
    assert (gaps[1] / gaps[0]) ** (1 / 4) == pytest.approx((S[RANK] / S[RANK - 1]) ** 4, rel=0.15)


def test_with_white_inputs_the_svd_stays() -> None:
    E = error()
    H = 3.0 * torch.eye(IN, dtype=torch.float64)
    up, down = oracle.svd_start(E.numpy(), RANK)
    np.testing.assert_allclose(product(QuAILoRA().fit(E, H, RANK)).numpy(), up @ down, atol=1e-6)


def test_after_a_sweep_the_last_factor_is_stationary() -> None:
    E, H = error(), moment()
    up, down = QuAILoRA(iterations=5).fit(E, H, RANK)
    assert float(((E - up @ down).T @ up).norm()) < 1e-5 * float((E.T @ up).norm())
    up, down = QuAILoRA(iterations=400).fit(E, H, RANK)
    assert float(((E - up @ down) @ H @ down.T).norm()) < 1e-4 * float((E @ H @ down.T).norm())


@pytest.mark.parametrize("start", [QuAILoRA(), QuAILoRA(balance=True), CLoQ(), QERA()], ids=lambda each: each.name)
def test_edges_are_finite(start: Any) -> None:
    E, H = error(), moment()
    dead = H.clone()
    dead[3], dead[:, 3] = 0, 0
    few = torch.randn(5, IN, dtype=torch.float64)
    for e, h, rank in (
        (E, dead, RANK),
        (E, few.T @ few, RANK),  # fewer tokens than inputs
        (E, few.T @ few, 8),  # fewer tokens than the rank
        (E, torch.zeros_like(H), RANK),
        (torch.zeros_like(E), H, RANK),
        (E, H, OUT + 7),  # more rank than the matrix has
        (E[:, :2] @ E[:2], H, RANK),  # less rank than the adapter
    ):
        factors = start.fit(e, h, rank)
        assert factors[0].shape == (OUT, rank)
        assert factors[1].shape == (rank, IN)
        assert all(bool(torch.isfinite(each).all()) for each in factors)
        assert objective(e, h, factors) <= objective(e, h) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("start", [QuAILoRA(iterations=200), CLoQ(damping=0)], ids=lambda each: each.name)
def test_an_error_of_low_rank_is_taken_off_whole(start: Any) -> None:
    E, H = error()[:, :RANK] @ error(RANK), moment()
    assert objective(E, H, start.fit(E, H, RANK)) < 1e-12 * objective(E, H)
    assert objective(E, H, start.fit(E, H, RANK + 3)) < 1e-12 * objective(E, H)


# --- the closed form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["even", "up", "down"])
def test_cloq_is_the_optimum(split: Any) -> None:
    E, H = error(), moment()
    found = CLoQ(split=split, damping=0).fit(E, H, RANK)
    np.testing.assert_allclose(product(found).numpy(), oracle.best_product(E.numpy(), H.numpy(), RANK), atol=1e-8)
    assert objective(E, H, found) == pytest.approx(oracle.best_objective(E.numpy(), H.numpy(), RANK), rel=1e-9)


@given(seed=st.integers(0, 2**16))
def test_nothing_of_the_same_rank_is_better(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    E, H = error(seed=seed), moment(seed=seed + 1)
    up, down = CLoQ(damping=0).fit(E, H, RANK)
    least = objective(E, H, (up, down))
    for size in (1e-3, 1e-1, 1.0):
        other = [each + size * torch.randn(each.shape, generator=random, dtype=each.dtype) for each in (up, down)]
        assert objective(E, H, (other[0], other[1])) >= least * (1 - 1e-9)


def test_damping_costs_next_to_nothing() -> None:
    E, H = error(), moment()
    assert objective(E, H, CLoQ().fit(E, H, RANK)) <= objective(E, H, CLoQ(damping=0).fit(E, H, RANK)) * (1 + 1e-4)


def test_qera_is_the_optimum_for_uncorrelated_inputs_and_between_otherwise() -> None:
    E, H = error(), moment()
    D = torch.diag(H.diagonal())
    torch.testing.assert_close(
        product(QERA(damping=0).fit(E, H, RANK)), product(CLoQ(damping=0).fit(E, D, RANK)), rtol=0, atol=1e-9
    )
    exact, near = (objective(E, H, each.fit(E, H, RANK)) for each in (CLoQ(damping=0), QERA(damping=0)))
    plain = objective(E, H, oracle_svd(E))
    assert exact < near < plain


def oracle_svd(E: Tensor) -> tuple[Tensor, Tensor]:
    up, down = oracle.svd_start(E.numpy(), RANK)
    return torch.from_numpy(up), torch.from_numpy(down)


def test_the_randomized_decomposition_is_as_good_as_the_exact_one() -> None:
    random = torch.Generator().manual_seed(0)
    E = torch.randn(400, 600, generator=random, dtype=torch.float64)
    before = torch.get_rng_state()
    U, S, Vh = leading(E, 16)
    assert torch.equal(torch.get_rng_state(), before)
    left = float((E - (U * S) @ Vh).norm())
    best = float(torch.linalg.svdvals(E)[16:].square().sum().sqrt())
    assert best <= left <= 1.005 * best  # the hardest case: no decay at all


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_balancing_keeps_the_product_and_shares_it_out(rank: int) -> None:
    random = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((OUT, rank), (rank, IN)))
    even = balanced((100 * up, down))
    assert even[0].shape == up.shape
    torch.testing.assert_close(product(even), 100 * up @ down, rtol=1e-9, atol=1e-8)
    assert float(even[0].norm()) == pytest.approx(float(even[1].norm()), rel=1e-9)


# --- LoftQ ------------------------------------------------------------------------------------------------------------


def test_one_iteration_of_loftq_is_quailora_without_data() -> None:
    quantize, W = quantizer(Format(levels="nf", bits=2, group_size=64)), error().float()
    white = {"dense_second_moment": torch.eye(IN, dtype=torch.float64)}
    ours, theirs = (start(W, quantize, RANK, white) for start in (LoftQ(iterations=1), QuAILoRA()))
    assert ours.weight.digest() == theirs.weight.digest() == quantize(W).digest()
    assert ours.factors is not None
    assert theirs.factors is not None
    torch.testing.assert_close(product(ours.factors), product(theirs.factors), rtol=0, atol=1e-5)


def test_loftq_keeps_its_best_iterate() -> None:
    quantize, W = quantizer(Format(levels="nf", bits=2, group_size=64)), error().float()
    left = []
    for count in range(1, 9):
        begun = LoftQ(iterations=count)(W, quantize, RANK, {})
        assert begun.factors is not None
        left.append(float((W - begun.weight.dequantize() - product(begun.factors)).norm()))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(left))
    assert left[-1] < left[0] < float((W - quantize(W).dequantize()).norm())


def test_peft_finds_the_same_first_iterate() -> None:
    """PEFT's LoftQ step is the plain SVD; it does not absorb the scaling, so products are compared."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    E = error().float()
    theirs = _low_rank_decomposition(E, RANK)
    torch.testing.assert_close(theirs["L"] @ theirs["R"], product(oracle_svd(E.double())).float(), rtol=0, atol=1e-4)


# --- any start over any grid ------------------------------------------------------------------------------------------


FORMATS = [Format(bits=2), Format(bits=4, zero="integer"), Format(levels="nf", bits=3, group_size=64)]


@pytest.mark.parametrize("rounding", [Nearest(), GPTQ(), GPTQ(act_order=True)], ids=["nearest", "gptq", "act-order"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda each: each.name)
@pytest.mark.parametrize("name", [name for name in STARTS if name != "zero"])
def test_a_layer_starts_nearer_to_the_dense_one(name: str, format: Format, rounding: Rounding) -> None:
    quantize, W, H = quantizer(format, rounding), error().float(), moment()
    begun = STARTS[name]()(W, quantize, RANK, {"dense_second_moment": H})
    assert begun.factors is not None
    assert [each.dtype for each in begun.factors] == [torch.float32] * 2
    E = W.double() - begun.weight.dequantize().double()
    factors = (begun.factors[0].double(), begun.factors[1].double())
    under = None if name == "loftq" else H
    assert objective(E, under, factors) < 0.9 * objective(W.double() - quantize(W).dequantize().double(), under)


def test_zero_changes_nothing() -> None:
    quantize, W = quantizer(Format(bits=3)), error().float()
    begun = Zero()(W, quantize, RANK, {})
    assert begun.factors is None
    assert begun.weight.digest() == quantize(W).digest()


@pytest.mark.parametrize("rounding", [Nearest(), GPTQ(act_order=True)], ids=["nearest", "act-order"])
@pytest.mark.parametrize("name", ["quailora", "loftq"])
def test_a_pooled_adapters_start_is_folded_into_the_best_offsets(name: str, rounding: Rounding) -> None:
    """Least squares over all offsets, by NumPy: no adapter over pooled inputs, of whatever rank, fits better."""
    quantize, W, H = (
        quantizer(Format(bits=2), rounding, Storage(scales="fp32", offsets="fp32")),
        error().float(),
        moment(),
    )
    base = quantize(W)
    begun = STARTS[name]()(W, quantize, RANK, {"dense_second_moment": H}, pooled=True)
    assert begun.factors is None
    assert torch.equal(begun.weight.codes(), base.codes())
    assert torch.equal(begun.weight.scales, base.scales)
    E = base.stored_order(W.double() - base.dequantize().double())
    under = H if name == "quailora" else torch.eye(IN, dtype=torch.float64)
    under = base.stored_order(base.stored_order(under).T)
    want = oracle.pooled_least_squares(E.numpy(), under.numpy(), 32)
    assert begun.weight.offsets is not None
    assert base.offsets is not None
    np.testing.assert_allclose((begun.weight.offsets - base.offsets).numpy(), want, rtol=1e-3, atol=1e-5)
    left = W.double() - begun.weight.dequantize().double()
    assert objective(left, H if name == "quailora" else None) < objective(
        W.double() - base.dequantize().double(), H if name == "quailora" else None
    )


def test_best_offsets_equal_alternating_least_squares_of_full_rank() -> None:
    """E ~ B A P at the full rank: QuAILoRA on the problem projected onto pooled inputs."""
    W, H = error().float(), moment()
    base = quantizer(Format(bits=2), storage=Storage(scales="fp32", offsets="fp32"))(W)
    E = W.double() - base.dequantize().double()
    P = torch.zeros(3, IN, dtype=torch.float64)
    P[torch.arange(IN) // 32, torch.arange(IN)] = 1
    PHP = P @ H @ P.T
    projected = E @ H @ P.T @ torch.linalg.inv(PHP)
    up, down = QuAILoRA(iterations=50).fit(projected, PHP, 3)
    torch.testing.assert_close(up @ down, best_offsets(E, H, base), rtol=1e-5, atol=1e-7)


def test_what_is_missing_or_wrong_is_said() -> None:
    quantize, W = quantizer(Format(bits=3)), error().float()
    with pytest.raises(CalibrationError, match="second moment of the layer's inputs is missing"):
        QuAILoRA()(W, quantize, RANK, {})
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        CLoQ()(W, quantize, RANK, {"dense_second_moment": torch.full((IN, IN), torch.nan)})
    with pytest.raises(ConfigError, match="damping=-1 is not between 0 and 1"):
        CLoQ(damping=-1)
    with pytest.raises(ConfigError, match="split='half' is unknown"):
        CLoQ(split="half")  # type: ignore[arg-type]
