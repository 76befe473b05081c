"""Memory of models with experts is estimated by running them on tensors without content, whose routing nobody knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_models import FAMILIES, tiny_of

from quadapt.calibrate import MOMENTS_AT_ONCE
from quadapt.model.linear_form import linear_form
from quadapt.model.select import select
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout
from quadapt.report import memory

FORMAT = Format(bits=4, group_size=32)


def _bytes(name: str, tokens: int = 64, **changes: Any) -> int:
    """Of a step of a quantized model in which norms and biases train, so that gradients flow through all."""
    with torch.device("meta"):
        model = tiny_of(name, **changes)
    for path, layer in select(model).chosen.items():
        layout = Layout.fitting(FORMAT, Storage.default(FORMAT), layer.out_features, layer.in_features)
        model.set_submodule(path, QuantLinear(layout, bias=layer.bias is not None, device="meta", dtype=torch.float32))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    return memory.step_bytes(model, 2, tokens // 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_estimated(name: str) -> None:
    small, large = _bytes(name, 64), _bytes(name, 128)
    assert 1.5 < large / small < 2.6  # nearly all that lives in a step is by tokens


def test_the_number_of_experts_matters_little_and_that_of_a_token_much() -> None:
    few, many = (_bytes("Mixtral", num_local_experts=count) for count in (4, 16))
    assert many == pytest.approx(few, rel=0.2)
    one, four = (_bytes("Mixtral", num_experts_per_tok=count) for count in (1, 4))
    assert four > 1.4 * one


def test_weights_are_no_part_of_what_a_step_takes() -> None:
    with torch.device("meta"):
        model = linear_form(tiny_of("Mixtral"))
    weights = memory.parameter_bytes(model)
    assert memory.step_bytes(model, 1, 2, trains=False) < weights / 20


def test_moments_of_experts_count_as_far_as_they_are_gathered_at_once() -> None:
    model = linear_form(tiny_of("Mixtral"))  # 4 experts, 64 inputs, 96 inner ones
    assert memory.routed_moment_bytes(model) == 4 * 8 * 96 * 96
    assert memory.routed_moment_bytes(linear_form(tiny_of("GPT2"))) == 0
    with torch.device("meta"):
        wide = linear_form(tiny_of("Mixtral", intermediate_size=8192))
    assert memory.routed_moment_bytes(wide) == MOMENTS_AT_ONCE
