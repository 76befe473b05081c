"""`train_start=False`: the factors of a start are frozen, and an adapter that begins at zero trains beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import iec_numpy, lora_start_numpy
from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.methods import method_named
from quadapt.nn.adapters import Adapter, Elastic, LoRA
from quadapt.nn.adapters.base import FIRST
from quadapt.nn.adapters.lora_fa import LoRAFA
from quadapt.quant.format import Format
from quadapt.quant.weight import QuantWeight

TOKENS, OUT, IN, RANK, SCALING = 12, 24, 96, 4, 0.5
ALL: list[Adapter] = [LoRA(train_start=False), LoRAFA(train_start=False), Elastic(train_start=False)]
every = pytest.mark.parametrize("adapter", ALL, ids=lambda adapter: adapter.kind)


@pytest.fixture
def weight(quant_weight: Callable[..., QuantWeight]) -> QuantWeight:
    return quant_weight(Format(bits=4), OUT, IN)


def made(adapter: Adapter, weight: QuantWeight, *, moved: bool) -> dict[str, Tensor]:
    """Parameters as they are declared, with a start; afterwards moved, as if they had trained."""
    declared = adapter.params(weight.layout, RANK, started=True)
    found: dict[str, Tensor] = {}
    for name, param in declared.items():
        found[name] = nn.Parameter(torch.zeros(param.shape), requires_grad=param.trains)
        with torch.no_grad():
            param.init(found[name], weight)
    with torch.no_grad():
        adapter.begin(found, 0.3 * torch.randn(OUT, RANK), torch.randn(RANK, IN))
        for name, param in declared.items():
            if moved and param.trains:
                found[name] += 0.3 * torch.randn(param.shape)
    return found


def in_numpy(params: dict[str, Tensor]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The frozen factors, and those that act, float64."""
    held = {name: tensor.detach().double().numpy() for name, tensor in params.items()}
    A, B = held["A"], held["B"]
    if "beta" in held:
        A = A + held["beta"][0] * iec_numpy.first(IN, RANK).T
        B = B + held["beta"][1] * iec_numpy.second(RANK, OUT).T
    return (held[FIRST[0]], held[FIRST[1]]), (A, B)


@every
def test_output_and_gradients_are_those_of_the_equations(adapter: Adapter, weight: QuantWeight) -> None:
    params = made(adapter, weight, moved=True)
    x, dy = torch.randn(TOKENS, IN, requires_grad=True), torch.randn(TOKENS, OUT)
    y = adapter.forward(x, weight, params, SCALING)
    y.backward(dy)
    first, factors = in_numpy(params)
    W, seen = weight.dequantize().double().numpy(), x.detach().double().numpy()
    want = lora_start_numpy.forward(seen, W, first, factors, SCALING)
    torch.testing.assert_close(y.detach().double(), torch.from_numpy(want), rtol=1e-4, atol=1e-4)
    slopes = lora_start_numpy.gradients(seen, dy.double().numpy(), W, first, factors, SCALING)
    for name, tensor in {"x": x, **params}.items():
        if name not in slopes or not tensor.requires_grad:
            assert name == "beta" or tensor.grad is None
            continue
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad.double(), torch.from_numpy(slopes[name]), rtol=1e-4, atol=1e-3)


@every
def test_at_first_it_is_the_base_with_the_fitted_term(adapter: Adapter, weight: QuantWeight) -> None:
    params = made(adapter, weight, moved=False)
    (A0, B0), _ = in_numpy(params)
    want = weight.dequantize().double() + SCALING * torch.from_numpy(B0 @ A0)
    torch.testing.assert_close(adapter.dense(weight, params, SCALING).double(), want, rtol=1e-5, atol=1e-5)
    first = adapter.first(params)
    assert first is not None
    x = torch.randn(TOKENS, IN)
    torch.testing.assert_close(
        adapter.forward(x, weight, first, SCALING), adapter.forward(x, weight, params, SCALING), rtol=1e-5, atol=1e-5
    )
    assert not params["B"].any()
    assert params["A"].abs().max() <= IN**-0.5  # LoRA's own, which has nothing of the fit


@every
def test_it_is_an_ordinary_lora_of_twice_the_rank(adapter: Adapter, weight: QuantWeight) -> None:
    params = made(adapter, weight, moved=True)
    lora = adapter.as_lora(weight, params)
    assert lora is not None
    assert (lora[0].shape, lora[1].shape) == ((2 * RANK, IN), (OUT, 2 * RANK))
    first, factors = in_numpy(params)
    want = first[1] @ first[0] + factors[1] @ factors[0]
    torch.testing.assert_close((lora[1] @ lora[0]).detach().double(), torch.from_numpy(want), rtol=1e-4, atol=1e-4)


@every
def test_dropout_spares_the_frozen_factors(adapter: Adapter, weight: QuantWeight) -> None:
    params = made(adapter, weight, moved=True)
    if "beta" in params:
        params["beta"].data.zero_()  # its connections see the inputs from before dropout
    x = torch.randn(TOKENS, IN)
    y = adapter.forward(x, weight, params, SCALING, torch.zeros_like)
    first, _ = in_numpy(params)
    nothing = first[0], 0 * first[1]
    want = lora_start_numpy.forward(x.double().numpy(), weight.dequantize().double().numpy(), first, nothing, SCALING)
    torch.testing.assert_close(y.detach().double(), torch.from_numpy(want), rtol=1e-4, atol=1e-4)


@every
def test_without_a_start_it_changes_nothing(adapter: Adapter, weight: QuantWeight) -> None:
    usual = type(adapter)()
    assert set(adapter.params(weight.layout, RANK)) == set(usual.params(weight.layout, RANK))
    params = {name: torch.randn(param.shape) for name, param in adapter.params(weight.layout, RANK).items()}
    x = torch.randn(TOKENS, IN)
    assert torch.equal(adapter.forward(x, weight, params, SCALING), usual.forward(x, weight, params, SCALING))
    lora = adapter.as_lora(weight, params)
    assert lora is not None
    assert len(lora[0]) == RANK


def test_it_is_a_setting_of_methods_whose_adapter_starts_from_factors() -> None:
    assert not method_named("loftq", train_start=False).adapter.train_start
    assert method_named("loftq").adapter.train_start
    with pytest.raises(ConfigError, match="train_start is a setting of the adapter of "):
        method_named("qa-lora", train_start=False)
