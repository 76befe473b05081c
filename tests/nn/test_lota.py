"""LoTA-QAF: marks, rest and gradients against the paper's equations; codes in range; merges bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import lota_numpy
from torch import Tensor

from quadapt.errors import ConfigError
from quadapt.kernels import pack
from quadapt.nn.adapters.lota import LoTA, ternary
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

OUT, IN = 24, 80  # groups of 32: the last has 16


def base(bits: int = 3, zero: str = "integer", group_size: int = 32, scales: str = "fp32") -> QuantWeight:
    """Random codes, many of them at the ends, over whole zero-points or free offsets."""
    format = Format(bits=bits, group_size=group_size, zero=zero)
    layout = Layout(format=format, storage=Storage.floating("fp32", zero).with_scales(scales), out=OUT, columns=IN)
    codes = (torch.randn(OUT, IN) * 2**bits).round().clamp(0, 2**bits - 1).to(torch.uint8)
    size = torch.rand(OUT, layout.groups) + 0.5
    offsets = {"integer": torch.randint(0, 2**bits, size.shape).float(), "float": -size, "none": None}[zero]
    return QuantWeight.build(layout, pack(codes, bits), size, offsets)


def factors(rank: int, share: float = 0.9) -> dict[str, Tensor]:
    """Ternary factors, whose product is often large: rows of `B` and columns of `A` are alike."""
    signs = torch.randint(0, 2, (rank, 1)) * 2.0 - 1
    A, B = (signs * torch.sign(torch.randn(1, size)).expand(rank, -1) for size in (IN, OUT))
    A, B = (torch.where(torch.rand(each.shape) < share, each, torch.randint(-1, 2, each.shape)) for each in (A, B))
    return {"A": A.clone(), "B": B.T.clone()}


def double(weight: QuantWeight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets = weight.offsets
    assert offsets is not None
    return tuple(each.double().numpy() for each in (weight.codes(), weight.scales, offsets))  # type: ignore[return-value]


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_forward_and_gradients_are_the_papers(bits: int, rest: bool) -> None:
    weight, adapter, rank = base(bits), LoTA(shift_offsets=rest, scales="fp32"), 6
    params = {name: each.requires_grad_() for name, each in factors(rank).items()}
    codes, scales, offsets = double(weight)
    A, B = (params[name].detach().double().numpy() for name in "AB")
    omega = 0.75 * rank
    m = lota_numpy.marks(codes, B @ A, omega, bits)
    assert {-1, 0, 1} == set(np.unique(m))
    want = lota_numpy.weight(codes, scales, offsets, B @ A, omega, bits, 32)
    if not rest:
        want = want - np.repeat(scales * lota_numpy.shifts(B @ A, m, omega, 32), 32, 1)[:, :IN]
    dense = adapter.dense(weight, params, 123.0)  # the scaling has no meaning here
    np.testing.assert_allclose(dense.double().numpy(), want, rtol=1e-5, atol=1e-5)

    x, dy = torch.randn(7, IN, requires_grad=True), torch.randn(7, OUT)
    y = adapter.forward(x, weight, params, 123.0)
    assert torch.equal(y, torch.nn.functional.linear(x, dense))
    y.backward(dy)
    dA, dB = lota_numpy.gradients(
        dy.double().numpy().T @ x.detach().double().numpy(), A, B, scales, omega, 32, rest=rest
    )
    np.testing.assert_allclose(params["A"].grad.double().numpy(), dA, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(params["B"].grad.double().numpy(), dB, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(x.grad.double().numpy(), dy.double().numpy() @ want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rest", [True, False])
def test_nothing_of_the_size_of_the_matrix_or_of_a_factor_is_kept(rest: bool) -> None:
    weight, params = base(4), {name: each.requires_grad_() for name, each in factors(8).items()}
    x, sizes = torch.randn(7, IN, requires_grad=True), []
    known = {each.untyped_storage().data_ptr() for each in (x, *params.values(), *weight.tensors.values())}

    def kept(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        LoTA(shift_offsets=rest).forward(x, weight, params, 1.0)
    assert max(sizes) <= OUT * weight.layout.groups


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    rank=st.integers(1, 40),
    omega=st.floats(0.5, 0.99),
    zero=st.sampled_from(["none", "integer", "float"]),
    group_size=st.sampled_from([16, 32, -1]),
    rest=st.booleans(),
    seed=st.integers(0, 9),
)
def test_what_a_merge_gives_is_what_was_trained(
    bits: int, rank: int, omega: float, zero: str, group_size: int, rest: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, adapter = base(bits, zero, group_size), LoTA(omega=omega, shift_offsets=rest)
    adapter.check(weight.layout, rank, 0.0)
    params, x = factors(rank), torch.randn(20, IN)
    merged = adapter.merge(weight, params, 1.0)
    D = (params["B"] @ params["A"]).double().numpy()
    limit = adapter.limit(rank)
    assert math.floor(limit) in (math.floor(omega * rank), math.floor(omega * rank + 1e-6))
    m = lota_numpy.marks(weight.codes().numpy(), D, limit, bits)
    assert np.array_equal(merged.codes().numpy(), weight.codes().numpy() + m)
    assert torch.equal(adapter.forward(x, weight, params, 1.0), torch.nn.functional.linear(x, merged.dequantize()))
    assert torch.equal(merged.tensors["scales"], weight.tensors["scales"])
    width = weight.format.width(IN)
    mu = adapter.shift(weight, params)
    assert float(mu.abs().max()) <= rank / limit + 1e-6
    np.testing.assert_allclose(mu.numpy(), lota_numpy.shifts(D, m, limit, width), rtol=1e-5, atol=1e-6)
    if not rest:
        assert merged.layout == weight.layout
        assert all(torch.equal(merged.tensors[name], each) for name, each in weight.tensors.items() if name != "weight")


@pytest.mark.parametrize("scales", ["double", "linear8-256-fp32"])
def test_what_does_not_move_keeps_its_bytes(scales: str) -> None:
    weight = base(4, "none", scales=scales)
    merged = LoTA(shift_offsets=False).merge(weight, factors(8), 1.0)
    assert merged.layout == weight.layout
    assert all(torch.equal(merged.tensors[name], each) for name, each in weight.tensors.items() if name != "weight")
    moved = LoTA().merge(weight, factors(8), 1.0)
    assert moved.layout.storage == Storage(scales=scales, offsets="fp16")
    assert torch.equal(moved.scales, weight.scales)


@pytest.mark.parametrize("rank", [1, 2, 3, 64, 255, 1024])
def test_no_product_is_near_the_middle_between_two_marks(rank: int) -> None:
    """In float32, summed one by one as the engine does, at every value of `D`."""
    for omega in (0.5, 0.75, 0.999):
        adapter = LoTA(omega=omega)
        unit = torch.tensor(adapter.unit({"A": torch.empty(rank, 1)}), dtype=torch.float32)
        sums = torch.zeros(rank + 1)
        for at in range(1, rank + 1):
            sums[at] = sums[at - 1] + unit
        for code in (0.0, 255.0):
            assert torch.equal((code + sums).round() - code, (torch.arange(rank + 1) > adapter.limit(rank)).float())


def test_the_start_is_ternary_and_changes_no_code(quant_weight: Callable[..., Any]) -> None:
    A = torch.empty(32, 400)
    ternary(A, A)
    assert set(A.unique().tolist()) == {-1.0, 0.0, 1.0}
    share = 2 * (1 - torch.distributions.Normal(0, 1).cdf(torch.tensor(0.75 * math.sqrt(2 / math.pi))))
    assert float(A.abs().mean()) == pytest.approx(float(share), abs=0.02)
    weight = quant_weight(Format(bits=4, zero="integer"), OUT, IN)
    params = {"A": A[:8, :IN], "B": torch.zeros(OUT, 8)}
    assert torch.equal(LoTA(shift_offsets=False).merge(weight, params, 1.0).dequantize(), weight.dequantize())


def test_it_refuses_what_it_cannot_do() -> None:
    layout = base().layout
    with pytest.raises(ConfigError, match=r"omega=0.4: must be at least 0.5"):
        LoTA(omega=0.4)
    with pytest.raises(ConfigError, match=r"rank=2000: .* Use a smaller rank"):
        LoTA().check(layout, 2000, 0.0)
    with pytest.raises(ConfigError, match="Use levels='int'"):
        LoTA().check(Layout(format=Format(levels="nf"), storage=Storage(offsets="absent"), out=8, columns=32), 4, 0.0)
