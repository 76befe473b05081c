"""t-SignSGD: the paper's steps over many of them, beside AdamW's own, and what training makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import sign_sgd_numpy
from torch import Tensor, nn

import quadapt
from quadapt.errors import ConfigError
from quadapt.hf.peft_layer import declared_params
from quadapt.train import AdapterTrainer, TernaryAdamW
from quadapt.train.sign_sgd import order, sigma


def tensors(shapes: list[tuple[int, ...]], seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randint(-1, 2, shape, generator=generator).float()) for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 70)), min_size=1, max_size=3),
    steps=st.integers(1, 30),
    size=st.sampled_from([1e-10, 0.01, 0.5, 3.0]),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_steps_are_the_papers(shapes: list[tuple[int, int]], steps: int, size: float, ties: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = tensors(shapes, seed)
    want = [each.detach().double().numpy() for each in params]
    optimizer = TernaryAdamW([{"params": params, "ternary": True}], steps=steps)
    for step in range(1, steps + 1):
        for each in params:
            grad = size * torch.randn(each.shape, generator=generator)
            each.grad = size * (grad / size).round() if ties else grad
        grads = [each.grad.double().numpy() for each in params if each.grad is not None]
        want = sign_sgd_numpy.stepped(want, grads, step, steps)
        optimizer.step()
        assert all(np.array_equal(each.detach().numpy(), one) for each, one in zip(params, want, strict=True))


def test_the_schedule_is_the_papers() -> None:
    for steps in (1, 2, 5, 300):
        for step in range(1, steps + 1):
            assert sigma(step, steps) == pytest.approx(sign_sgd_numpy.sigma(step, steps), abs=1e-12)
    assert sigma(301, 300) == sigma(300, 300) == 0.9999


def test_a_quantile_is_exact_and_tensors_may_be_large() -> None:
    numbers = torch.arange(-8_500_000.0, 8_500_000.0).roll(12_345)
    low, high = order(numbers, 0.999)
    assert (int(low), int(high)) == (8_482_999, 8_483_000)


@pytest.mark.parametrize("late", [False, True])
def test_huge_gradients_of_late_steps_are_cut(late: bool) -> None:
    (param,) = tensors([(300, 300)], 0)
    optimizer = TernaryAdamW([{"params": [param], "ternary": True}], steps=10)
    optimizer.param_groups[0]["done"] = 8 if late else 4
    grad = torch.arange(1.0, 90_001).view(300, 300)
    before, param.grad = param.detach().clone(), grad
    with torch.no_grad():
        param.clamp_(min=0)
        before.clamp_(min=0)
    optimizer.step()
    moved = (param != before).flatten()
    assert bool(moved.any())
    assert bool(moved[-4:].any()) != late
    param.grad = 1e-7 * grad  # of a norm below 10
    with torch.no_grad():
        param.fill_(1)
    optimizer.step()
    assert bool((param != 1).flatten()[-4:].all())


def test_other_groups_step_as_adamw_does_and_all_is_resumed() -> None:
    def made() -> tuple[list[nn.Parameter], Any]:
        params = tensors([(8, 9), (7,)], 3)
        groups = [{"params": params[1:], "lr": 0.1, "weight_decay": 0.02}, {"params": params[:1], "ternary": True}]
        return params, TernaryAdamW(groups, steps=20, betas=(0.8, 0.9))

    grads = [[torch.randn(8, 9), torch.randn(7)] for _ in range(20)]

    def run(params: list[nn.Parameter], optimizer: Any, some: list[list[Tensor]]) -> None:
        for each in some:
            for param, grad in zip(params, each, strict=True):
                param.grad = grad
            optimizer.step()

    params, optimizer = made()
    run(params, optimizer, grads)
    plain = tensors([(8, 9), (7,)], 3)[1]
    adamw = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.02, betas=(0.8, 0.9))
    run([plain], adamw, [each[1:] for each in grads])
    assert torch.equal(params[1], plain)

    halves, first = made()
    run(halves, first, grads[:13])
    state = copy.deepcopy(first.state_dict())
    again, second = made()
    second.load_state_dict(state)
    for one, other in zip(again, halves, strict=True):
        one.data.copy_(other)
    run(again, second, grads[13:])
    assert all(torch.equal(one, other) for one, other in zip(again, params, strict=True))


def test_a_run_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="Give at least 1"):
        TernaryAdamW(tensors([(2, 2)], 0), steps=0)


@pytest.fixture
def trainer(tiny_llama: Callable[..., Any], tmp_path: Any) -> Callable[..., Any]:
    """`trainer(**arguments)`: of a lota-qaf model in which biases of norms train as well."""
    from transformers import TrainingArguments

    def make(**arguments: Any) -> Any:
        model = quadapt.prepare(tiny_llama(), method="lota-qaf", rounding="nearest", rank=4)
        next(each for name, each in model.named_parameters() if "norm" in name).requires_grad_(True)
        about = {"max_steps": 5, "use_cpu": True, "report_to": [], "learning_rate": 0.01, **arguments}
        return AdapterTrainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), **about))

    return make


def test_one_optimizer_for_ternary_and_others(trainer: Callable[..., Any]) -> None:
    made = trainer(max_grad_norm=0.5)
    optimizer = made.create_optimizer()
    assert isinstance(optimizer, TernaryAdamW)
    ternary = {id(p) for group in optimizer.param_groups if group["ternary"] for p in group["params"]}
    assert ternary == {id(p) for p, declared in declared_params(made.model) if declared.group == "ternary"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(ternary) + 1
    trained = [p for p in made.model.parameters() if p.requires_grad]
    for each in trained:
        each.grad = torch.ones_like(each)
    norm = made._clip_grad_norm(made.model)
    assert float(norm) == pytest.approx(sum(each.numel() for each in trained) ** 0.5, rel=1e-5)
    for each in trained:  # the others to the norm that was asked for, ternary ones not at all
        assert float(each.grad.norm()) == pytest.approx(each.numel() ** 0.5 if id(each) in ternary else 0.5, rel=1e-4)


@pytest.mark.parametrize("arguments", [{"optim": "sgd"}, {"max_steps": -1}])
def test_an_optimizer_that_cannot_do_it_is_refused(trainer: Callable[..., Any], arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"ternary adapters train by t-SignSGD.* Use optim='adamw_torch'"):
        trainer(**arguments).create_optimizer()


def test_no_other_values_than_ternary_ones_are_begun_with(tiny_llama: Callable[..., Any]) -> None:
    from peft import get_peft_model

    from quadapt.hf.adapter_config import lora_config
    from quadapt.methods import lota_qaf

    base = quadapt.prepare(tiny_llama(), method="lota-qaf", rounding="nearest", rank=4).unload()
    config = lora_config(lota_qaf().adapter, rank=4, alpha=4)
    config.init_lora_weights = "gaussian"
    with pytest.raises(ConfigError, match=r"init_lora_weights='gaussian': A holds -1, 0 and 1 alone"):
        get_peft_model(base, config)
