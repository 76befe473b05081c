"""A real-valued low-rank term among whole codes: forward, gradients, merges, and what stays as it is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import code_lora_numpy
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels import pack
from quadapt.nn.adapters.code_lora import CodeLoRA
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

OUT, IN, RANK, SCALING = 24, 80, 3, 0.5  # groups of 32: the last has 16


def base(bits: int, zero: str, *, floats: str = "fp32", group_size: int = 32) -> QuantWeight:
    """Random codes over a grid of random scales."""
    format = Format(bits=bits, group_size=group_size, zero=zero)
    layout = Layout(format=format, storage=Storage.floating("fp32", zero).with_scales(floats), out=OUT, columns=IN)
    codes = torch.randint(0, 2**bits, (OUT, IN)).to(torch.uint8)
    size = torch.rand(OUT, layout.groups) + 0.5
    offsets = {"integer": torch.randint(0, 2**bits, size.shape).float(), "float": -size, "none": None}[zero]
    return QuantWeight.build(layout, pack(codes, bits), size, offsets)


def params(adapter: CodeLoRA, weight: QuantWeight, size: float = 1.0) -> dict[str, Tensor]:
    """Parameters that move codes by about `size * 2**bits / 4`, and the grid by a little."""
    found = {}
    for name, declared in adapter.params(weight.layout, RANK).items():
        found[name] = (0.02 if name in ("rho", "shift") else 1.0) * torch.randn(declared.shape)
    found["A"] *= size * 2**weight.format.bits / 4
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize(("scales", "offsets"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("bits", [2, 4])
def test_forward_and_gradients_are_those_of_the_reference(bits: int, scales: bool, offsets: bool, zero: str) -> None:
    weight, adapter = base(bits, zero), CodeLoRA(train_scales=scales, train_offsets=offsets and zero != "none")
    trained = params(adapter, weight)
    double = {name: tensor.detach().double().numpy() for name, tensor in trained.items()}
    q, first, top = weight.codes().double().numpy(), weight.scales.double().numpy(), 2**bits - 1
    step = first * np.exp(double["rho"]) if scales else first
    assert weight.offsets is not None
    z = -weight.offsets.double().numpy() / first
    shift = double.get("shift", 0.0)
    if zero == "float":
        held = -first * z * (step / first) + first * shift
    else:
        held = -step * (z if zero == "none" else np.clip(np.rint(z - shift), 0, top))
    codes = code_lora_numpy.codes(q, SCALING * double["B"] @ double["A"], bits)
    want = code_lora_numpy.spread(step, 32, IN) * codes + code_lora_numpy.spread(held, 32, IN)
    dense = adapter.dense(weight, trained, SCALING)
    np.testing.assert_allclose(dense.double().numpy(), want, rtol=1e-5, atol=1e-5)
    assert {0, top} <= set(np.unique(codes))

    x, dy = torch.randn(7, IN, requires_grad=True), torch.randn(7, OUT)
    y = adapter.forward(x, weight, trained, SCALING)
    assert torch.equal(y, torch.nn.functional.linear(x, dense))
    y.backward(dy)
    dW = dy.double().numpy().T @ x.detach().double().numpy()
    dA, dB, dscales, doffsets = code_lora_numpy.gradients(dW, q, double["A"], double["B"], SCALING, step, bits, 32)
    expected = {"A": dA, "B": dB}
    if scales:  # offsets move with their scale
        expected["rho"] = dscales * step + doffsets * (-first * z * step / first if zero == "float" else held)
    if "shift" in double:
        expected["shift"] = doffsets * (first if zero == "float" else step)  # zero-points: minus of a minus
    for name, gradient in expected.items():
        found = trained[name].grad
        assert found is not None
        assert np.linalg.norm(found.double().numpy() - gradient) <= 1e-4 * np.linalg.norm(gradient), name


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    zero=st.sampled_from(["none", "integer", "float"]),
    floats=st.sampled_from(["fp16", "fp32", "double"]),
    group_size=st.sampled_from([16, 32, -1]),
    scales=st.booleans(),
    offsets=st.booleans(),
    seed=st.integers(0, 9),
)
def test_what_a_merge_gives_is_what_was_trained(
    bits: int, zero: str, floats: str, group_size: int, scales: bool, offsets: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = base(bits, zero, floats=floats, group_size=group_size)
    adapter = CodeLoRA(train_scales=scales, train_offsets=offsets and zero != "none")
    trained, x = params(adapter, weight, 0.3), torch.randn(5, IN)
    merged = adapter.merge(weight, trained, SCALING)
    assert torch.equal(adapter.forward(x, weight, trained, SCALING), torch.nn.functional.linear(x, merged.dequantize()))
    assert merged.format == weight.format
    kept = [] if adapter.moves_scales else ["scales"]
    kept += [] if adapter.moves_offsets else ["offsets"]
    for name in kept:
        assert merged.layout.storage.of(name) == weight.layout.storage.of(name)
        assert all(torch.equal(merged.tensors[each], one) for each, one in weight.tensors.items() if name in each)
    again = adapter.untrained(weight, trained, SCALING)
    assert torch.equal(again.codes(), weight.codes())


def test_it_refuses_what_it_cannot_move() -> None:
    weight = base(4, "none")
    with pytest.raises(ConfigError, match=r"train_offsets: int4-sym-g32 has none. Use zero='integer' or 'float'"):
        CodeLoRA(train_offsets=True).check(weight.layout, 4, 0.0)
    table = Layout(format=Format(levels="nf"), storage=Storage(offsets="absent"), out=8, columns=32)
    with pytest.raises(ConfigError, match=r"a code-lora adapter moves codes. Use levels='int'"):
        CodeLoRA().check(table, 4, 0.0)
