"""Eight bits that remember what was rounded: training over them begins with exactly the model of any rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quadapt.errors import ConfigError
from quadapt.methods import method_named
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.nn.adapters import LRQAT
from quadapt.nn.block_ap import BlockAP
from quadapt.quant.fixed_point import FixedPoint, fixed_point
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import BlockRounding, Nearest, Rounding
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

Make = Callable[..., Any]
ROUNDINGS = {
    "nearest": Nearest(),
    "mse": Nearest(range="mse"),
    "gptq": GPTQ(),
    "act-order": GPTQ(act_order=True, range="mse"),
}


def layout(bits: int, zero: str, out: int = 12, columns: int = 80) -> Layout:
    format = Format(bits=bits, group_size=32, zero=zero)  # type: ignore[arg-type]
    return Layout(format=format, storage=Storage.floating("fp16", zero), out=out, columns=columns)


def moment(columns: int) -> dict[str, torch.Tensor]:
    inputs = torch.randn(400, columns) @ torch.randn(columns, columns)
    return {"second_moment": inputs.T @ inputs / 400}


def at_first(base: QuantWeight, coarse: Layout) -> QuantWeight:
    """What LR-QAT would merge to before it has trained."""
    adapter = LRQAT(bits=coarse.format.bits, offsets=coarse.format.zero, scales="fp16")  # type: ignore[arg-type]
    params = adapter.params(adapter.layout_of(base), 2)
    made = {name: torch.zeros(param.shape) for name, param in params.items()}
    return adapter.untrained(base, made, 1.0)


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_training_begins_with_the_model_of_the_rounding(name: str, bits: int, zero: str) -> None:
    coarse, rounding = layout(bits, zero), ROUNDINGS[name]
    weight, statistics = torch.randn(12, 80), moment(80)
    want = rounding(weight, coarse, statistics)
    base = FixedPoint(rounding=rounding)(weight, coarse, statistics)
    found = at_first(base, coarse)
    assert found.layout == want.layout
    assert all(torch.equal(found.tensors[each], want.tensors[each]) for each in want.tensors)


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 6]), seed=st.integers(0, 1000), spread=st.floats(0.01, 30))
def test_the_base_is_what_was_rounded_to_half_a_step_of_its_own(bits: int, seed: int, spread: float) -> None:
    """Against the definition in float64: within the range, and but for the middle between two codes."""
    coarse = layout(bits, "float", out=6)
    weight = spread * torch.randn(6, 80, generator=torch.Generator().manual_seed(seed))
    rounding = Nearest(range="mse")
    base = FixedPoint(rounding=rounding)(weight, coarse)
    grid = rounding(weight, coarse)
    scales, offsets = (np.repeat(each.double().numpy(), 32, 1)[:, :80] for each in (grid.scales, grid.offsets))
    real = (weight.double().numpy() - offsets) / scales
    found = base.codes().double().numpy() / 2 ** (8 - bits)
    inside = (real > -0.5) & (real < 2**bits - 0.5)
    assert np.abs(found - np.maximum(real, 0))[inside].max() <= 1.001 / 2 ** (8 - bits)
    assert np.array_equal(np.rint(found), grid.codes().numpy())


def test_gptq_hands_on_the_weights_that_it_rounded() -> None:
    """Those with the errors of the columns before them: a column at a time, by the paper's equation, in float64."""
    coarse, rounding = layout(3, "float", out=5, columns=32), GPTQ()
    weight, statistics = torch.randn(5, 32), moment(32)
    quantized, real = rounding.with_real_codes(weight.double(), coarse, statistics)
    H = statistics["second_moment"].double().numpy().copy()
    H += rounding.damping * np.mean(np.diag(H)) * np.eye(32)
    upper = np.linalg.cholesky(np.linalg.inv(H)).T
    work, want = weight.double().numpy().copy(), np.empty((5, 32))
    dense = quantized.dequantize(torch.float64).numpy()
    for i in range(32):
        want[:, i] = work[:, i]
        work[:, i + 1 :] -= np.outer((work[:, i] - dense[:, i]) / upper[i, i], upper[i, i + 1 :])
    scales, offsets = quantized.scales.double().numpy(), quantized.offsets.double().numpy()
    np.testing.assert_allclose(real.numpy(), (want - offsets) / scales, rtol=1e-4, atol=1e-4)


def test_block_ap_hands_on_the_weights_that_it_trained(tiny_llama: Make) -> None:
    method = method_named("lr-qat", bits=3, zero="float", rounding=BlockAP(epochs=1))
    found, want = tiny_llama(), tiny_llama()
    want.load_state_dict(found.state_dict())
    text = [torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(each)) for each in range(6)]
    for model, (format, storage, rounding) in (
        (found, method.base()),
        (want, (method.format, method.storage, method.rounding)),
    ):
        quantize_model(
            model, select(model).chosen, Quantization(format=format, storage=storage, rounding=rounding), batches=text
        )
    layers = quantized_layers(want)
    assert len(layers) == 14
    for name, layer in quantized_layers(found).items():
        first, exact = at_first(layer.quant_weight, layers[name].layout), layers[name].quant_weight
        assert all(torch.equal(first.tensors[each], exact.tensors[each]) for each in exact.tensors)


@pytest.mark.parametrize(
    "rounding", [Nearest(), GPTQ(true_sequential=False), BlockAP(batch_size=5)], ids=lambda each: each.name
)
def test_it_needs_what_the_rounding_inside_needs(rounding: Rounding) -> None:
    outside = fixed_point(rounding)
    assert (outside.needs, outside.true_sequential) == (rounding.needs, rounding.true_sequential)
    assert outside.least_sequences == rounding.least_sequences
    assert isinstance(outside, BlockRounding) == isinstance(rounding, BlockRounding)


def test_a_base_of_another_kind_is_refused() -> None:
    format = Format(levels="nf", bits=4)
    with pytest.raises(ConfigError, match="a fixed-point base is made of integers"):
        FixedPoint().check(Layout(format=format, storage=Storage.default(format), out=4, columns=64))
    base = FixedPoint()(torch.randn(4, 64), layout(4, "integer", 4, 64))
    for adapter in (LRQAT(offsets="float"), LRQAT(offsets="integer", group_size=64)):
        with pytest.raises(ConfigError, match="trains over 8-bit fixed point of"):
            adapter.layout_of(base)


@pytest.mark.parametrize(("bits", "name"), [(2, "q2_k"), (3, "q3_k"), (4, "q4_k"), (5, "q4_k"), (6, "q6_k")])
@pytest.mark.parametrize("columns", [256, 288, 96])
def test_k_quants_and_the_blocks_that_take_their_place(bits: int, name: str, columns: int) -> None:
    """Rows that are no whole super-blocks have a width of their own: up to eight bits, which leave no fraction."""
    method = method_named("lr-qat", bits=bits, scales="k-quant")
    assert method.storage.scales == name
    wanted = Layout.fitting(method.format, method.storage, 8, columns)
    assert ((wanted.format, wanted.storage) == (method.format, method.storage)) == (columns == 256)
    weight = torch.randn(8, columns)
    base = FixedPoint(rounding=Nearest())(weight, wanted)
    adapter, want = method.adapter, Nearest()(weight, wanted)
    params = {each: torch.zeros(param.shape) for each, param in adapter.params(adapter.layout_of(base), 2).items()}
    found = adapter.untrained(base, params, 1.0)
    assert found.layout == want.layout
    assert all(torch.equal(found.tensors[each], want.tensors[each]) for each in want.tensors)
