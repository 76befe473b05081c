"""Every matrix of a model is selected, or listed with the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_models import tiny_of
from torch import nn

from quadapt.errors import ConfigError, ShapeError
from quadapt.model.select import find_blocks, matches, matching, on_meta, select

Make = Callable[..., Any]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def layer_names(*kinds: str, blocks: tuple[int, ...] = (0, 1)) -> set[str]:
    parents = {kind: "self_attn" if kind in ATTENTION else "mlp" for kind in kinds}
    return {f"model.layers.{block}.{parent}.{kind}" for block in blocks for kind, parent in parents.items()}


def all_matrices(model: nn.Module) -> set[str]:
    return {
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim > 1
    }


# --- what is chosen ---------------------------------------------------------------------------------------------------


def test_all_linear_layers_of_the_blocks_are_chosen(tiny_llama: Make) -> None:
    selection = select(tiny_llama())
    assert set(selection.chosen) == layer_names(*ATTENTION, *MLP)
    assert selection.left == {"model.embed_tokens": "embedding", "lm_head": "output head"}


def test_chosen_are_the_modules_themselves_in_the_models_order(tiny_llama: Make) -> None:
    model = tiny_llama()
    selection = select(model)
    assert all(selection.chosen[name] is model.get_submodule(name) for name in selection.chosen)
    assert list(selection.chosen) == [name for name, _ in model.named_modules() if name in selection.chosen]


@pytest.mark.parametrize(
    "settings",
    [{}, {"skip": ["mlp"]}, {"target_modules": ["q_proj"]}, {"target_modules": ["layers.1"], "skip": ["o_proj"]}],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_matrix_is_chosen_or_listed(settings: dict[str, Any], tied: bool, tiny_llama: Make) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    selection = select(model, **settings)
    assert set(selection.chosen) | set(selection.left) == all_matrices(model)
    assert not set(selection.chosen) & set(selection.left)
    assert all(selection.left.values())


def test_a_head_tied_to_the_embedding_is_left(tiny_llama: Make) -> None:
    selection = select(tiny_llama(tie_word_embeddings=True))
    assert set(selection.chosen) == layer_names(*ATTENTION, *MLP)
    assert set(selection.left) >= {"model.embed_tokens", "lm_head"}


def test_linear_layers_that_share_a_matrix_are_left(tiny_llama: Make) -> None:
    model = tiny_llama()
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    selection = select(model)
    assert {name: why for name, why in selection.left.items() if "up_proj" in name} == {
        "model.layers.0.mlp.up_proj": "tied to another matrix",
        "model.layers.1.mlp.up_proj": "tied to another matrix",
    }


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (["q_proj"], layer_names("q_proj")),
        (["layers.1"], layer_names(*ATTENTION, *MLP, blocks=(1,))),
        (["layers.0.mlp", "v_proj"], layer_names(*MLP, blocks=(0,)) | layer_names("v_proj")),
        (["model.layers.1.self_attn.o_proj"], layer_names("o_proj", blocks=(1,))),
    ],
)
def test_only_targets_are_chosen(targets: list[str], chosen: set[str], tiny_llama: Make) -> None:
    selection = select(tiny_llama(), target_modules=targets)
    assert set(selection.chosen) == chosen
    others = layer_names(*ATTENTION, *MLP) - chosen
    assert {selection.left[name] for name in others} == {"not among target_modules"}


def test_what_is_skipped_is_left_even_if_targeted(tiny_llama: Make) -> None:
    selection = select(tiny_llama(), target_modules=["mlp"], skip=["down_proj", "layers.0"])
    assert set(selection.chosen) == layer_names("gate_proj", "up_proj", blocks=(1,))
    assert selection.left["model.layers.1.mlp.down_proj"] == "listed under skip"


def test_convolutions_are_left_and_said_to_be(tiny_llama: Make) -> None:
    model = tiny_llama()
    model.patches = nn.Conv2d(3, 8, 4)
    assert select(model).left["patches"] == "convolution"


def test_layers_that_are_quantized_already_are_passed_over(quantized_llama: Make) -> None:
    model = quantized_llama(skip=("mlp",))
    selection = select(model)
    assert set(selection.chosen) == layer_names(*MLP)


def test_a_model_of_mere_shapes_is_sorted_out_too(tiny_llama: Make) -> None:
    with torch.device("meta"):
        model = tiny_llama()
    assert on_meta(model)
    assert not on_meta(tiny_llama())
    assert set(select(model).chosen) == layer_names(*ATTENTION, *MLP)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_experts_in_an_unknown_form_are_refused_by_name_with_advice(tiny_llama: Make) -> None:
    class SomeExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.Parameter(torch.zeros(4, 32, 64))

    model = tiny_llama()
    model.model.layers[0].mlp.experts = SomeExperts()
    with pytest.raises(ShapeError, match=r"experts\.matrices: is part of SomeExperts.*--skip matrices"):
        select(model)
    assert select(model, skip=["experts"]).left["model.layers.0.mlp.experts.matrices"] == "listed under skip"


def test_parameters_that_a_models_own_code_computes_with_are_left(tiny_llama: Make) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log = nn.Parameter(torch.zeros(32, 16))

    model = tiny_llama()
    model.model.layers[0].mixer = Mixer()
    why = "a parameter of Mixer, whose own code computes with it"
    assert select(model).left["model.layers.0.mixer.A_log"] == why


def test_experts_that_are_skipped_or_not_targeted_are_left() -> None:
    for settings in ({"skip": ["experts"]}, {"target_modules": ["self_attn"]}):
        model = tiny_of("Mixtral")
        selection = select(model, **settings)  # type: ignore[arg-type]  # of strings
        assert {name.rpartition(".")[2] for name in selection.chosen} == set(ATTENTION)
        assert set(selection.chosen) | set(selection.left) == all_matrices(model)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["qproj"]}, {"skip": ["proj"]}, {"skip": ["q_proj", "nope"]}, {"target_modules": ["layers.2"]}],
    ids=str,
)
def test_a_name_that_matches_nothing_is_refused_with_those_that_exist(
    settings: dict[str, Any], tiny_llama: Make
) -> None:
    with pytest.raises(ConfigError, match=r"matches no layer\. The linear layers are .*q_proj, up_proj, v_proj"):
        select(tiny_llama(), **settings)


@pytest.mark.parametrize(
    "settings", [{"skip": ["model"]}, {"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}], ids=str
)
def test_a_model_with_nothing_left_to_quantize_is_refused(settings: dict[str, Any], tiny_llama: Make) -> None:
    with pytest.raises(ConfigError, match=r"no layer is left to quantize"):
        select(tiny_llama(), **settings)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("q_proj", True),
        ("layers.0", True),
        ("self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", True),
        ("proj", False),
        ("layers.00", False),
        ("q_pro", False),
        ("layers.0.q_proj", False),
        ("", False),
        ("ayers.0", False),
    ],
)
def test_a_pattern_is_a_run_of_whole_parts(pattern: str, found: bool) -> None:
    assert matches("model.layers.0.self_attn.q_proj", pattern) is found


def test_layer_one_is_not_layer_eleven() -> None:
    assert matches("layers.1.mlp", "layers.1")
    assert not matches("layers.11.mlp", "layers.1")


def test_matching_keeps_order_and_refuses_what_matches_nothing() -> None:
    names = ["b.q_proj", "a.q_proj", "a.up_proj"]
    assert matching(names, ["q_proj"]) == ["b.q_proj", "a.q_proj"]
    assert matching(names, []) == names
    with pytest.raises(ConfigError, match=r"'o_proj' matches no quantized layer\. There are q_proj, up_proj"):
        matching(names, ["q_proj", "o_proj"])


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_are_the_decoder_layers_in_order(tiny_llama: Make) -> None:
    model = tiny_llama(num_hidden_layers=11)
    blocks = find_blocks(model)
    assert list(blocks) == [f"model.layers.{index}" for index in range(11)]
    assert all(block is model.model.layers[index] for index, block in enumerate(blocks.values()))


def test_blocks_are_those_that_a_model_names_or_else_all_in_lists_and_of_nested_ones_the_outermost() -> None:
    model = nn.Module()
    model.few = nn.ModuleList([nn.Linear(4, 4)])
    model.empty = nn.ModuleList([nn.GELU()])
    model.many = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.Bilinear(8, 8, 8)])])
    model.stages = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(8, 8)]))])
    assert list(find_blocks(model)) == ["few.0", "many.0.0", "stages.0"]
    model._no_split_modules = ["Bilinear"]  # it holds no linear layer
    assert list(find_blocks(model)) == ["few.0", "many.0.0", "stages.0"]
    model._no_split_modules = ["Linear"]
    assert list(find_blocks(model)) == ["few.0", "many.0.0", "stages.0.0.0"]


def test_both_stacks_of_an_encoder_decoder_are_blocks() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 96, "d_model": 64, "d_ff": 96, "num_heads": 4, "d_kv": 16}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=2, num_decoder_layers=1))
    assert list(find_blocks(model)) == ["encoder.block.0", "encoder.block.1", "decoder.block.0"]


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict({"a": nn.ModuleList([nn.GELU()])})])
def test_a_model_may_have_no_blocks(model: nn.Module) -> None:
    assert not find_blocks(model)
