"""`init_scale`: a factor of the random values at which `A` begins, declared once for all adapters with such factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import quadapt
from quadapt.hf.peft_layer import adapted_layers
from quadapt.methods import METHODS, method_named
from quadapt.nn.adapters import ADAPTERS
from quadapt.nn.adapters.base import LowRank
from quadapt.setting import settings_of

WITH = [name for name, kind in ADAPTERS.items() if issubclass(kind, LowRank)]


def first(tiny_llama: Callable[..., Any], method: str, **settings: Any) -> dict[str, torch.Tensor]:
    """What the adapters of one layer begin with."""
    torch.manual_seed(0)
    model = quadapt.prepare(tiny_llama(), method=method, rounding="nearest", rank=4, alpha=4, dropout=0.0, **settings)
    return next(iter(adapted_layers(model).values())).params("default")


@pytest.mark.parametrize("method", ["qlora", "qa-lora", "l4q", "lr-qat", "qa-lora-scales", "ir-qlora"])
def test_it_scales_the_first_values_of_a_and_nothing_else(method: str, tiny_llama: Callable[..., Any]) -> None:
    plain, larger = first(tiny_llama, method), first(tiny_llama, method, init_scale=8.0)
    assert torch.equal(larger["A"], 8 * plain["A"])
    assert bool((plain["A"] != 0).any())
    assert all(torch.equal(larger[name], plain[name]) for name in plain if name != "A")


def test_it_is_a_setting_of_every_adapter_with_such_factors() -> None:
    assert set(WITH) >= {"lora", "pooled", "l4q", "lr-qat", "elastic", "lora-fa"}
    for kind in ADAPTERS.values():
        assert ("init_scale" in settings_of(kind)) == issubclass(kind, LowRank)
    for name in METHODS:
        adapter = method_named(name).adapter
        if adapter.kind in WITH:
            assert method_named(name, init_scale=2.0).adapter.identity()["init_scale"] == 2.0


def test_without_factors_it_is_refused() -> None:
    with pytest.raises(quadapt.errors.ConfigError, match=r"init_scale=2.0: nothing of .* Use init_scale=1"):
        method_named("e2e-qp", init_scale=2.0).check()
