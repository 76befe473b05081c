"""What is rounded stays rounded in a compiled program; kernels are called past the dispatcher if nothing is traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quadapt.kernels import dequantize, narrow
from quadapt.kernels.dispatch import MOST_TOKENS, at_once, few
from quadapt.quant.storage import STORAGES

FURTHER = [pytest.param(name, marks=pytest.mark.deep) for name in ("q4_k", "q3_k", "q2_k-min", "fp16-shared4")]


@pytest.mark.parametrize("name", ["fp16", *FURTHER])
def test_a_compiled_program_rounds_scales_as_they_are_stored(name: str) -> None:
    storage, values = STORAGES[name], torch.rand(4, 32).add_(0.1)
    if storage.never_positive:
        values = -values

    def used(values: Tensor) -> Tensor:
        return storage.rounded(values * 0.5) * 3  # with neighbours that a compiler puts into one program, exact ones

    with torch.no_grad():
        eager = used(values)
        torch._dynamo.reset()
        compiled = torch.compile(used, fullgraph=True)(values)
    torch.testing.assert_close(compiled, eager, rtol=2e-7 if storage.dtype == torch.float32 else 1e-5, atol=0)
    assert (eager / 3 != values * 0.5).any()  # rounding does something


def test_narrow_is_an_operator_in_traced_programs_alone() -> None:
    values = torch.randn(3, 5)
    torch.testing.assert_close(narrow(values, torch.float16), values.half(), rtol=0, atol=0)
    graphs = []

    def keep(module: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module.code)
        return module

    torch._dynamo.reset()
    found = torch.compile(lambda x: narrow(x, torch.float16).float(), backend=keep, fullgraph=True)(values)
    torch.testing.assert_close(found, values.half().float(), rtol=0, atol=0)
    assert "quadapt.narrow" in graphs[0]
    torch.library.opcheck(torch.ops.quadapt.narrow.default, (values, torch.float16))


def test_nothing_is_called_past_the_dispatcher_while_something_is_recorded() -> None:
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    assert not at_once(codes)  # a graph of gradients may be recorded
    with torch.no_grad():
        assert at_once(codes)
        assert at_once(nn.Parameter(codes, requires_grad=False))
        assert not at_once(codes.to("meta"))
        with torch._subclasses.FakeTensorMode() as mode:
            assert not at_once(mode.from_tensor(codes))


def test_a_gradient_that_is_not_there_is_an_error() -> None:
    scales = torch.ones(2, 1, requires_grad=True)
    weight = dequantize(torch.zeros(2, 8, dtype=torch.uint8), scales, None, None, 4, 16, 16, torch.float32)
    with pytest.raises(RuntimeError, match="quadapt"):
        weight.sum().backward()


@pytest.mark.parametrize(("device", "most"), MOST_TOKENS.items())
def test_few_tokens_are_fewer_on_a_card(device: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quadapt.kernels.dispatch.set_for", lambda _: device)
    assert few(torch.zeros(most, 64), 32, 64)
    assert not few(torch.zeros(most + 1, 64), 32, 64)
    monkeypatch.setattr("quadapt.kernels.dispatch.set_for", lambda _: "reference")
    assert not few(torch.zeros(1, 64), 32, 64)
