"""Elastic connections: IR-QLoRA's equations in NumPy, merges to the last bit, gradients, dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import get_peft_model
from reference import iec_numpy, qa_lora_numpy
from torch import Tensor, nn

from quadapt.errors import ConfigError, MergeError
from quadapt.hf.peft_layer import lora_config
from quadapt.nn.adapters import CodesAdapter, Elastic, ElasticPooled, adapter_from
from quadapt.nn.adapters.base import same
from quadapt.nn.adapters.codes import MergedForm
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.autograd import quant_matmul
from quadapt.quant.format import Format
from quadapt.quant.weight import QuantWeight

Make = Callable[..., QuantWeight]
SCALING = 0.25
SHAPES = [(64, 16, 32), (12, 8, 20), (15, 10, 35), (7, 3, 5), (16, 16, 16), (4, 8, 2), (1376, 64, 4096)]
"""Inputs, rank, outputs: rank divides both; it shares a factor with each; none; it is as large or larger."""
shapes = pytest.mark.parametrize(("inputs", "rank", "out"), SHAPES)


def trained(inputs: int, rank: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random A, B and beta, float64."""
    return (
        torch.randn(rank, inputs).double(),
        torch.randn(out, rank).double(),
        torch.tensor([0.7, -0.4], dtype=torch.float64),
    )


def named(A: Tensor, B: Tensor, beta: Tensor) -> dict[str, Tensor]:
    return {"A": A, "B": B, "beta": beta}


# --- against the equations --------------------------------------------------------------------------------------------


@shapes
def test_merged_factors_do_what_the_equations_do(inputs: int, rank: int, out: int) -> None:
    """To 1e-12, for any dimensions."""
    A, B, beta = trained(inputs, rank, out)
    x = torch.randn(5, inputs).double()
    want = iec_numpy.branch(x.numpy(), A.numpy(), B.numpy(), (0.7, -0.4))
    merged = Elastic().factors(named(A, B, beta))
    found = (x @ merged[0].T @ merged[1].T).numpy()
    assert np.abs(found - want).max() <= 1e-12 * np.abs(want).max()
    plain = (x @ A.T @ B.T).numpy()
    assert np.abs(plain - want).max() > 1e-3 * np.abs(want).max()


@pytest.mark.parametrize(("inputs", "rank", "out"), [(11008, 64, 4096), (4096, 64, 11008), (80, 64, 13824)])
def test_connections_of_large_layers_are_the_equations(inputs: int, rank: int, out: int) -> None:
    """The added parts alone, with their gcd windows, at dimensions of Llama."""
    A, B = torch.zeros(rank, inputs, dtype=torch.float64), torch.zeros(out, rank, dtype=torch.float64)
    first, second = Elastic().factors(named(A, B, torch.ones(2, dtype=torch.float64)))
    np.testing.assert_array_equal(first.numpy(), iec_numpy.first(inputs, rank).T)
    np.testing.assert_array_equal(second.numpy(), iec_numpy.second(rank, out).T)


def test_the_layout_of_the_papers_text_is_another() -> None:
    """The trap: training with tiled latents and merging with repeated ones is wrong by as much as the adapter does."""
    A, B, beta = trained(32, 8, 24)
    x = torch.randn(5, 32).double()
    hidden = x @ (A + 0.7 * torch.from_numpy(iec_numpy.first(32, 8)).T).T
    tiled = hidden @ B.T - 0.4 * hidden @ torch.from_numpy(iec_numpy.tiled(8, 24))
    merged = Elastic().factors(named(A, B, beta))
    assert float((x @ merged[0].T @ merged[1].T - tiled).norm() / (hidden @ torch.ones(8, 24).double()).norm()) > 0.05


def test_windows_are_means_and_copies_where_the_rank_divides() -> None:
    A, B = torch.zeros(4, 12), torch.zeros(8, 4)
    first, second = Elastic().factors(named(A, B, torch.ones(2)))
    x = torch.randn(3, 12)
    torch.testing.assert_close(x @ first.T, x.unflatten(1, (4, 3)).mean(-1))
    z = torch.randn(3, 4)
    torch.testing.assert_close(z @ second.T, z.repeat_interleave(2, 1))


@pytest.mark.parametrize("columns", [96, 80])
@pytest.mark.parametrize("permuted", [False, True])
def test_the_side_branch_is_the_equations(columns: int, permuted: bool, quant_weight: Make) -> None:
    weight = quant_weight(Format(levels="nf", bits=4), 24, columns, permuted=permuted)
    A, B, beta = trained(columns, 4, 24)
    x = torch.randn(5, columns).double()
    want = quant_matmul(x, weight).numpy() + SCALING * iec_numpy.branch(x.numpy(), A.numpy(), B.numpy(), (0.7, -0.4))
    params = named(A, B, beta)
    found = Elastic().side(x, quant_matmul(x, weight), weight, params, SCALING, same)
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-12, atol=1e-12)
    lora = Elastic().as_lora(weight, params)
    assert all(torch.equal(*pair) for pair in zip(lora, Elastic().factors(params), strict=True))


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("columns", "rank"), [(96, 4), (80, 2), (256, 6), (64, 8)])
def test_pooled_connections_start_from_pooled_inputs(
    columns: int, rank: int, permuted: bool, pooling: str, quant_weight: Make
) -> None:
    """As a side branch, and merged into fp32 offsets, at every shape."""
    weight = quant_weight(Format(bits=4), 24, columns, permuted=permuted)
    adapter = ElasticPooled(form="side", pooling=pooling, offsets="fp32")
    A, B, beta = trained(weight.layout.groups, rank, 24)
    x = torch.randn(5, columns).double()
    P = qa_lora_numpy.pooling(columns, 32, pooling).T
    pooled = weight.stored_order(x).numpy() @ P
    want = quant_matmul(x, weight).numpy() + SCALING * iec_numpy.branch(pooled, A.numpy(), B.numpy(), (0.7, -0.4))
    params = named(A, B, beta)
    found = adapter.side(x, quant_matmul(x, weight), weight, params, SCALING, same)
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-12, atol=1e-12)
    merged = quant_matmul(x, adapter.merge(weight, params, SCALING)).numpy()
    assert np.linalg.norm(merged - want) < 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("columns", "rank"), [(96, 4), (80, 2), (256, 6)])
def test_the_merged_form_is_the_merged_matrix_bit_for_bit(
    columns: int, rank: int, dtype: torch.dtype, quant_weight: Make
) -> None:
    weight, adapter = quant_weight(Format(bits=3), 24, columns), ElasticPooled()
    A, B, beta = (part.to(dtype) for part in trained(weight.layout.groups, rank, 24))
    params = named(A, 0.01 * B, 0.01 * beta)
    x = torch.randn(7, columns).to(dtype)
    computed = quant_matmul(x, weight, MergedForm(((adapter, SCALING),)), adapter.factors(params))
    assert torch.equal(computed, adapter.forward(x, weight, params, SCALING))
    assert torch.equal(computed, quant_matmul(x, adapter.merge(weight, params, SCALING)))
    assert not torch.equal(computed, quant_matmul(x, weight))


# --- gradients and beginnings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [Elastic(), ElasticPooled(form="side")], ids=["elastic", "elastic-pooled"])
@pytest.mark.parametrize("columns", [48, 44])
def test_gradients_of_inputs_factors_and_betas(columns: int, adapter: CodesAdapter, quant_weight: Make) -> None:
    """By finite differences (gradcheck), and against autograd over the dense equations."""
    weight = quant_weight(Format(bits=4, group_size=16), 6, columns)
    inputs = adapter.inputs(weight.layout)
    given = (torch.randn(3, columns).double(), *trained(inputs, 4, 6))
    for tensor in given:
        tensor.requires_grad_(True)

    def ours(x: Tensor, A: Tensor, B: Tensor, beta: Tensor) -> Tensor:
        return adapter.forward(x, weight, named(A, B, beta), SCALING)

    def dense(x: Tensor, A: Tensor, B: Tensor, beta: Tensor) -> Tensor:
        first = torch.from_numpy(iec_numpy.first(inputs, 4))
        second = torch.from_numpy(iec_numpy.second(4, 6))
        seen = x if inputs == columns else x @ torch.from_numpy(qa_lora_numpy.pooling(columns, 16, "sum").T)
        hidden = seen @ A.T + beta[0] * seen @ first
        return x @ weight.dequantize(torch.float64).T + SCALING * (hidden @ B.T + beta[1] * hidden @ second)

    assert torch.autograd.gradcheck(ours, given)
    dy = torch.randn(3, 6).double()
    found, want = (torch.autograd.grad(f(*given), given, dy) for f in (ours, dense))
    for mine, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_merged_form_are_those_of_the_side_branch(quant_weight: Make) -> None:
    """Straight through the rounding of offsets."""
    weight = quant_weight(Format(bits=4, group_size=16), 6, 48)
    given = [part.requires_grad_(True) for part in trained(3, 3, 6)]
    x, dy, found = torch.randn(5, 48).double(), torch.randn(5, 6).double(), []
    for adapter in (ElasticPooled(), ElasticPooled(form="side")):
        found.append(torch.autograd.grad(adapter.forward(x, weight, named(*given), SCALING), given, dy))
    for merged, side in zip(*found, strict=True):
        torch.testing.assert_close(merged, side, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", [Elastic(), ElasticPooled(), ElasticPooled(form="side")])
def test_it_starts_as_the_quantized_base_and_leaves_it_by_b_and_the_second_beta(
    adapter: CodesAdapter, quant_weight: Make
) -> None:
    layer = layer_over(quant_weight(Format(bits=4), 24, 96), adapter)
    x = torch.randn(20, 96)
    y = layer(x)
    assert torch.equal(y, quant_matmul(x, layer.quant.quant_weight))
    y.square().sum().backward()
    assert torch.equal(layer.lora_beta["default"], torch.zeros(2))
    gradient = layer.lora_beta["default"].grad
    assert float(gradient[0]) == 0
    assert float(gradient[1]) != 0
    assert not layer.lora_A["default"].weight.grad.any()
    assert layer.lora_B["default"].weight.grad.any()


# --- in a layer -------------------------------------------------------------------------------------------------------


def layer_over(weight: QuantWeight, adapter: CodesAdapter, *, dropout: float = 0.0, rank: int = 4) -> nn.Module:
    """An adapted layer, its factors and betas random when `dropout` is on."""
    model = nn.ModuleDict({"proj": QuantLinear.of(weight, None)})
    config = lora_config(adapter, rank=rank, alpha=SCALING * rank, dropout=dropout, target_modules=["proj"])
    config.task_type = None
    layer = get_peft_model(copy.deepcopy(model), config).base_model.model["proj"]
    if dropout:
        nn.init.normal_(layer.lora_B["default"].weight)
        nn.init.normal_(layer.lora_beta["default"])
    return layer


@pytest.mark.parametrize("adapter", [Elastic(), ElasticPooled(form="side")])
def test_connections_see_what_dropout_takes_from_the_factors(adapter: CodesAdapter, quant_weight: Make) -> None:
    weight = quant_weight(Format(bits=4), 24, 96)
    layer = layer_over(weight, adapter, dropout=0.5).double().train()
    x = torch.randn(5, 96).double()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = layer.lora_dropout["default"](x)
    assert not torch.equal(dropped, x)
    A, B, beta = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_beta["default"].tolist()
    P = np.eye(96) if isinstance(adapter, Elastic) else qa_lora_numpy.pooling(96, 32, "sum").T
    added = iec_numpy.branch(
        dropped.numpy() @ P, A.detach().numpy(), B.detach().numpy(), (beta[0], beta[1]), x.numpy() @ P
    )
    want = quant_matmul(x, weight).numpy() + SCALING * added
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-9, atol=1e-9)
    found.sum().backward()
    assert bool(layer.lora_beta["default"].grad.all())
    without = layer.eval()(x)
    assert torch.equal(without, adapter.forward(x, weight, layer.params("default"), SCALING))


def test_dropout_in_the_merged_form_is_refused(quant_weight: Make) -> None:
    with pytest.raises(ConfigError, match="no branch to drop"):
        layer_over(quant_weight(Format(bits=4), 24, 96), ElasticPooled(), dropout=0.1)


def test_what_a_merge_promises(quant_weight: Make) -> None:
    assert (Elastic().exactness, ElasticPooled().exactness) == ("none", "exact")
    assert ElasticPooled(form="side").exactness == "equivalent"
    weight = quant_weight(Format(bits=4), 24, 96)
    with pytest.raises(MergeError, match=r"elastic adapters .*export --format lora.*merge --requantize"):
        Elastic().merge(weight, named(*trained(96, 4, 24)), SCALING)


@pytest.mark.parametrize("adapter", [Elastic(), ElasticPooled(), ElasticPooled(form="side", pooling="mean")])
def test_it_is_known_again_by_its_identity(adapter: CodesAdapter) -> None:
    assert adapter_from(adapter.identity()) == adapter
