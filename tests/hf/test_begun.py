"""Adapters over dense matrices that begin with what a rounding gives: its codes, its scales, its offsets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import quadapt
from quadapt.errors import ConfigError
from quadapt.methods import method_named
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model
from quadapt.model.select import select
from quadapt.nn.adapters import L4Q
from quadapt.nn.block_ap import BlockAP
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest, Rounding

Make = Callable[..., Any]
ROUNDINGS = {"mse": Nearest(range="mse"), "gptq": GPTQ(range="mse"), "block-ap": BlockAP(epochs=1)}
TEXT = [torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(each)) for each in range(4)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(40).view(2, 20)).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_training_begins_with_the_quantized_model(name: str, zero: str, dtype: torch.dtype, tiny_llama: Make) -> None:
    """Bit for bit: the very logits of the model that the rounding makes; and the merge is exact."""
    method = method_named("l4q", bits=3, group_size=32, zero=zero, rounding=ROUNDINGS[name])
    dense = tiny_llama(dtype=dtype)
    want = copy.deepcopy(dense)
    plain = Quantization(format=method.format, storage=method.storage, rounding=method.rounding)
    quantize_model(want, select(want).chosen, plain, batches=TEXT)
    model = quadapt.prepare(dense, method=method, calibration=TEXT, rank=4, alpha=4)
    assert torch.equal(logits(model), logits(want))

    ids = TEXT[0]
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model)
    assert not torch.equal(trained, logits(want))
    merged, certificate = quadapt.merge(model)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), trained)


def test_by_itself_it_begins_with_the_matrix(tiny_llama: Make) -> None:
    assert not method_named("l4q").begins_rounded
    assert not method_named("qa-lora").begins_rounded  # over codes, whatever their rounding
    assert method_named("l4q", range="mse").begins_rounded
    dense = tiny_llama()
    weight = copy.deepcopy(dense.model.layers[0].mlp.up_proj.weight)
    model = quadapt.prepare(dense, method="l4q", rank=4)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert torch.equal(layer.get_base_layer().weight, weight)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rounding": GPTQ(act_order=True)}, "puts inputs into groups in another order"),
        ({"rounding": "gptq", "dense_steps": 2}, "chooses one before them"),
    ],
)
def test_what_cannot_be_begun_with_is_refused(settings: dict[str, Any], told: str, tiny_llama: Make) -> None:
    with pytest.raises(ConfigError, match=told):
        quadapt.prepare(tiny_llama(), method="l4q", calibration=TEXT, **settings)


class Own(L4Q):
    """An adapter over dense matrices that chooses its first grid itself."""

    takes_grid = False


def test_an_adapter_that_takes_no_grid_is_refused_one(tiny_llama: Make) -> None:
    method = replace(method_named("l4q"), adapter=Own())
    method.check()
    with pytest.raises(ConfigError, match="chooses its first grid itself"):
        quadapt.prepare(tiny_llama(), method=replace(method, rounding=Nearest(range="mse")))


def test_a_rounding_without_text_is_refused(tiny_llama: Make) -> None:
    rounding: Rounding = GPTQ()
    with pytest.raises(ConfigError, match="needs text to calibrate on"):
        quadapt.prepare(tiny_llama(), method="l4q", rounding=rounding)
