"""The linear form computes what the model of transformers does, from the same memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from expert_models import FAMILIES, IDS, logits_of, tiny_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quadapt.errors import ConfigError
from quadapt.model.linear_form import linear_form, turned
from quadapt.model.select import select
from quadapt.nn.experts import Experts, Stack, routed


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str) -> None:
    model = tiny_of(name)
    wanted, found = logits_of(model), logits_of(linear_form(copy.deepcopy(model)))
    if name == "GPT2":  # the same product of the same operands
        assert torch.equal(found, wanted)
    # gate and up are two products here; a library may sum the columns of one of another width in another order
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_transformers(name: str) -> None:
    model = tiny_of(name)
    other = linear_form(copy.deepcopy(model))
    for each in (model, other):
        each(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    first = model.get_input_embeddings().weight.grad
    torch.testing.assert_close(other.get_input_embeddings().weight.grad, first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_weight_is_copied(name: str) -> None:
    model = tiny_of(name)
    before = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in linear_form(model).parameters()} <= before


@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_can_be_quantized_is_chosen_and_routers_are_left(name: str) -> None:
    model = tiny_of(name)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    selection = select(model)
    left = sum(model.get_submodule(each).weight.numel() for each in selection.left)
    tied = model.get_output_embeddings().weight.numel() if model.config.tie_word_embeddings else 0
    biases = sum(p.numel() for path, p in model.named_parameters() if "experts" in path and path.endswith("bias"))
    assert sum(layer.weight.numel() for layer in selection.chosen.values()) + left - tied + biases == weights
    routers = [why for path, why in selection.left.items() if {"gate", "router"} & {*path.split(".")}]
    assert len(routers) == sum(isinstance(module, Experts) for module in model.modules())
    assert all("outer" in why for why in routers)


def test_a_second_time_changes_nothing() -> None:
    model = linear_form(tiny_of("Mixtral"))
    names = [name for name, _ in model.named_modules()]
    assert [name for name, _ in linear_form(model).named_modules()] == names
    assert turned(linear_form(linear_form(tiny_of("GPT2"))))[0] == "transformer.h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("name", "path"), [("Mixtral", "model.layers.1.mlp.experts"), ("GPT2", "transformer.h.1.mlp.c_fc")]
)
def test_a_forward_of_others_is_not_lost_in_silence(name: str, path: str) -> None:
    model = tiny_of(name)
    module = model.get_submodule(path)
    module.forward = module.forward  # as accelerate's hooks do
    with pytest.raises(ConfigError, match=rf"{path}: something else has put a forward.*one device"):
        linear_form(model)


def test_experts_are_reached_by_number() -> None:
    experts: Any = linear_form(tiny_of("Mixtral")).model.layers[0].mlp.experts  # type: ignore[union-attr]
    assert len(experts) == 4
    assert experts[-1].down_proj is experts[3].down_proj
    assert isinstance(experts[0].gate_proj, nn.Linear)
    with pytest.raises(IndexError):
        experts[4]


def test_other_models_with_transposed_layers_are_brought_into_it_too() -> None:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        assert torch.equal(linear_form(model)(input_ids=IDS).logits, wanted)
    assert len(turned(model)) == 8


# --- stacks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("parts", [("up_proj",), ("gate_proj", "up_proj")], ids=len)
def test_a_stack_is_taken_apart_and_put_together(parts: tuple[str, ...], interleaved: bool, transposed: bool) -> None:
    stack, rows, columns = Stack(parts, transposed, interleaved), 6 * len(parts), 5
    whole = torch.randn(3, columns, rows) if transposed else torch.randn(3, rows, columns)
    biases = torch.randn(3, rows)
    pieces = [[stack.matrix(whole, expert, part) for expert in range(3)] for part in parts]
    assert torch.equal(stack.stacked(pieces), whole)
    assert all(piece.shape == (6, columns) for each in pieces for piece in each)
    ends = [[stack.bias(biases, expert, part) for expert in range(3)] for part in parts]
    assert torch.equal(stack.stacked(ends), biases)
    x = torch.randn(4, columns)
    wanted = x @ (whole[1] if transposed else whole[1].T) + biases[1]
    found = [x @ pieces[at][1].T + ends[at][1] for at in range(len(parts))]
    torch.testing.assert_close(stack.whole([each.T for each in found]).T, wanted)


# --- routing ----------------------------------------------------------------------------------------------------------


def _routed(chosen: Tensor, count: int) -> dict[int, set[tuple[int, int]]]:
    found = routed(chosen, count)
    return {expert: set(zip(tokens.tolist(), places.tolist(), strict=True)) for expert, tokens, places in found}


def test_tokens_go_where_they_are_sent_and_nowhere_else() -> None:
    chosen = torch.tensor([[2, 0], [0, 3], [2, 5]])  # 5 is nobody, as expert parallelism has it
    assert _routed(chosen, 5) == {0: {(0, 1), (1, 0)}, 2: {(0, 0), (2, 0)}, 3: {(1, 1)}}
    assert _routed(torch.zeros(0, 2, dtype=torch.long), 5) == {}


@pytest.mark.parametrize(("tokens", "sizes"), [(7, [4, 4, 3, 3]), (1, [1, 1])], ids=str)
def test_of_fake_tensors_tokens_go_everywhere(tokens: int, sizes: list[int]) -> None:
    with FakeTensorMode():
        found = [len(each) for _, each, _ in routed(torch.zeros(tokens, 2, dtype=torch.long), 4)]
    assert found == sizes
