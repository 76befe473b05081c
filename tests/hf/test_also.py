"""Norms, biases, embeddings and head train beside any adapter: in float32, computed with as stored, merged exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import quadapt
from quadapt.data import Collator
from quadapt.errors import ConfigError
from quadapt.hf.also import ROLES, Narrowing, besides, is_norm, optimized
from quadapt.hf.trained import parts_of
from quadapt.methods import Recipe
from quadapt.train import AdapterTrainer, Run, train

Make = Callable[..., Any]
IDS = torch.arange(2, 66).view(4, 16)
ALL = ("norms", "biases", "embeddings", "head")
FLOAT = (torch.float32, torch.bfloat16)
METHODS: dict[str, dict[str, Any]] = {
    "qa-lora": {"rounding": "nearest", "group_size": 32},
    "l4q": {"group_size": 32},
    "lr-qat": {"group_size": 32},
    "qlora": {},
}


def prepared(model: Any, method: str = "qa-lora", also: Any = ALL, **more: Any) -> Any:
    settings = {**METHODS[method], **more}
    return quadapt.prepare(model, method=method, rank=2, train_also=also, **settings)


def moved(model: Any, steps: int = 2) -> Any:
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def biased(make: Make, **more: Any) -> Any:
    return make(attention_bias=True, mlp_bias=True, **more)


# --- a merge is exact -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_all_of_it_trains_and_what_is_merged_is_what_was_trained(
    method: str, dtype: torch.dtype, tied: bool, tiny_llama: Make, tmp_path: Path
) -> None:
    model = prepared(biased(tiny_llama, dtype=dtype, tie_word_embeddings=tied), method)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all(each.dtype == torch.float32 for each in trained.values())
    before = {name: each.detach().clone() for name, each in trained.items()}
    moved(model)
    assert not [name for name, each in trained.items() if torch.equal(each, before[name])]
    wanted = logits(model)
    assert wanted.dtype == dtype
    merged, certificate = quadapt.merge(model, probe=IDS, requantize=method == "qlora")
    listed = {part.name: part.exact for part in certificate.besides}
    assert all(listed.values())
    assert {"model.norm", "model.layers.0.input_layernorm", "model.layers.1.mlp.up_proj.bias"} < listed.keys()
    assert {"model.embed_tokens", "lm_head"} < listed.keys()
    assert {each.dtype for each in merged.parameters()} == {dtype, torch.uint8}
    assert not any(isinstance(module, Narrowing) for module in merged.modules())
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert tuple(merged.lm_head.weight.shape) == (merged.lm_head.out_features, merged.lm_head.in_features)
    if method == "qlora":  # over codes: a side branch, which only quantizing anew merges
        assert certificate.verdict == "lossy"
        return
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), wanted)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("dtype", FLOAT, ids=str)
def test_what_is_computed_with_is_what_is_stored(dtype: torch.dtype, tiny_llama: Make) -> None:
    """Small steps add up in float32, and show in the model once they make a step of its dtype."""
    model = prepared(tiny_llama(dtype=dtype), also="norms")
    norm = model.get_base_model().model.norm.modules_to_save["default"]
    wide, before = norm.weight, logits(model)
    with torch.no_grad():
        wide.mul_(1 + 2.0**-12)
    assert torch.equal(logits(model), before) == (dtype == torch.bfloat16)
    with torch.no_grad():
        for _ in range(40):
            wide.mul_(1 + 2.0**-12)
    after = logits(model)
    assert not torch.equal(after, before)
    with torch.no_grad():
        wide.copy_(wide.to(dtype))
    assert torch.equal(logits(model), after)


def test_the_gradient_of_a_rounding_goes_straight_through(tiny_llama: Make) -> None:
    dense = biased(tiny_llama, dtype=torch.bfloat16)
    plain = copy.deepcopy(dense).requires_grad_(True)
    model = prepared(dense, group_size=16, bits=8)
    for each in (plain, model.train()):
        each(input_ids=IDS, labels=IDS).loss.backward()
    norm = model.get_base_model().model.norm.modules_to_save["default"].weight
    assert norm.grad.dtype == torch.float32
    theirs = plain.model.norm.weight.grad.float()
    assert torch.nn.functional.cosine_similarity(norm.grad, theirs, dim=0) > 0.98


# --- what there is in a model -----------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {"rotary_pct": 0.5},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    "phi": {"num_key_value_heads": 2},
    "stablelm": {"num_key_value_heads": 2, "use_qkv_bias": True},
}


def family(kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    more = {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **sizes, **more, initializer_range=0.2, **FAMILIES[kind])
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_kind_of_norm_and_bias_is_found_and_merges_exactly(kind: str) -> None:
    """RMSNorm, LayerNorm with bias, norms of queries and keys, norms that add one, embeddings that are scaled."""
    model = family(kind)
    one_axis = {name for name, each in model.named_parameters() if each.ndim == 1}
    found = {
        name
        for each in ROLES["norms"](model)
        for name in (f"{each}.{own}" for own, _ in model.get_submodule(each).named_parameters())
    } | set(ROLES["biases"](model))
    assert found == one_axis
    kinds = [each for each in ALL if ROLES[each](model, "auto") and not (kind == "gpt_neox" and each == "tied")]
    adapted = moved(prepared(model, also=kinds))
    wanted = logits(adapted)
    merged, certificate = quadapt.merge(adapted, probe=IDS)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), wanted)


@pytest.mark.parametrize("kind", ["gpt_neox", "phi", "stablelm"])
def test_biases_alone_train_without_the_weights_beside_them(kind: str, tmp_path: Path) -> None:
    model = family(kind)
    count = len(ROLES["biases"](model))
    adapted = prepared(model, also="biases")
    names = [name for name, each in adapted.named_parameters() if each.requires_grad and "lora_" not in name]
    assert len(names) == count
    assert all(name.endswith(".bias") for name in names)
    wanted = logits(moved(adapted))
    adapted.save_pretrained(tmp_path / "adapter")
    merged, certificate = quadapt.merge(adapted, probe=IDS)
    assert (certificate.verdict, len(certificate.besides)) == ("exact", count)
    assert torch.equal(logits(merged), wanted)


def test_the_tower_for_pictures_stays_as_it_is() -> None:
    """Its biases and norms too, which PEFT would train with the others."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96, attention_bias=True, initializer_range=0.2)
    sight = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=sight, image_token_index=95)
    ).eval()
    adapted = prepared(model)
    trained = [name for name, each in adapted.named_parameters() if each.requires_grad]
    assert {"vision", "projector"}.isdisjoint(part for name in trained for part in name.replace("_", ".").split("."))
    assert any(name.endswith("language_model.norm.modules_to_save.default.weight") for name in trained)
    assert any(name.endswith("layers.0.self_attn.q_proj.base_layer.bias") for name in trained)
    wanted = logits(moved(adapted))
    merged, certificate = quadapt.merge(adapted, probe=IDS)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), wanted)


def test_a_norm_is_told_by_its_class_and_what_it_holds() -> None:
    class Odd(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(shape))

    kinds = {name: type(name, (Odd,), {}) for name in ("MyRMSNorm", "RMSNormGated", "NormHead", "Router")}
    assert is_norm(kinds["MyRMSNorm"](4))
    assert is_norm(kinds["MyRMSNorm"](2, 4))  # one scale for each head
    assert is_norm(kinds["RMSNormGated"](4))
    assert not is_norm(kinds["NormHead"](4, 4))
    assert not is_norm(kinds["Router"](4))
    assert not is_norm(nn.LayerNorm(4, elementwise_affine=False))


@pytest.mark.parametrize(
    ("also", "more", "words"),
    [
        (("biases",), {}, r"train_also='biases': LlamaForCausalLM has no biases. It has norms, embeddings, head"),
        (("norm",), {}, r"train_also.*input should be 'norms', 'biases', 'embeddings' or 'head'. Did you mean norms"),
        (("head",), {"train_tokens": ("5",)}, "all of them. Leave one out"),
        ((), {"also_learning_rate": 1e-3}, "for what train_also names, which is nothing. Leave it out"),
    ],
    ids=["none", "typo", "twice", "rate"],
)
def test_what_cannot_be_is_refused_with_advice(also: Any, more: Any, words: str, tiny_llama: Make) -> None:
    with pytest.raises(ConfigError, match=words):
        prepared(tiny_llama(), also=also, **more)


# --- training, saving, going on ---------------------------------------------------------------------------------------


def rows(count: int = 12) -> list[dict[str, list[int]]]:
    made = [
        torch.randint(3, 96, (10 + at % 3,), generator=torch.Generator().manual_seed(at)).tolist()
        for at in range(count)
    ]
    return [{"input_ids": row, "labels": row} for row in made]


def run(**more: Any) -> Run:
    recipe = Recipe(learning_rate=1e-3, rank=2, also_learning_rate=4e-3, weight_decay=0.1, schedule="linear")
    return Run(recipe=recipe, batch_size=2, gradient_accumulation=1, max_steps=6, save_steps=3, **more)


def test_each_has_its_group_of_the_optimizer(tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = prepared(biased(tiny_llama), "l4q"), []
    real = AdapterTrainer.create_optimizer

    def spy(self: Any, whole: Any = None) -> Any:
        found = real(self, whole)
        groups.extend(dict(group) for group in found.param_groups)  # with the rates from before the schedule
        return found

    monkeypatch.setattr(AdapterTrainer, "create_optimizer", spy)
    train(model, rows(), run(), tmp_path, collate=Collator(0))
    where = {id(each): group for group in groups for each in group["params"]}
    held = [each for each in model.parameters() if each.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(where) == len(held)
    for owner, name, parameter in besides(model):
        group = where[id(parameter)]
        assert group["lr"] == 4e-3
        assert group["weight_decay"] == (0.0 if name == "bias" or is_norm(owner) else 0.1)
    assert {group["lr"] for key, group in where.items() if key not in optimized(model)} == {1e-3}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", ["qa-lora", "l4q"])
def test_a_resumed_run_is_the_uninterrupted_one(
    method: str, tied: bool, tiny_llama: Make, tmp_path: Path, interrupted_at: Make
) -> None:
    """To the last bit of what trains in float32, which the dtype of the model would not hold."""

    def make() -> Any:
        torch.manual_seed(0)
        return prepared(biased(tiny_llama, dtype=torch.bfloat16, tie_word_embeddings=tied), method)

    whole = make()
    train(whole, rows(), run(), tmp_path / "whole", collate=Collator(0))
    steps = interrupted_at(5)
    with pytest.raises(KeyboardInterrupt):
        train(make(), rows(), run(), tmp_path / "halves", collate=Collator(0))
    halves = make()
    train(halves, rows(), run(), tmp_path / "halves", collate=Collator(0))
    assert len(steps) == 5 + 3
    for (name, one), (_, other) in zip(whole.named_parameters(), halves.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_is_loaded_with_all_of_it(method: str, tied: bool, tiny_llama: Make, tmp_path: Path) -> None:
    """By PEFT's own loader, over a copy of the base; and is off, all but the biases, when adapters are."""
    model = prepared(biased(tiny_llama, dtype=torch.bfloat16, tie_word_embeddings=tied), method)
    base = copy.deepcopy(model).unload()
    assert not any(isinstance(module, Narrowing) for module in base.modules())
    wanted = logits(moved(model))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(again), wanted)
    assert {part.name for part in parts_of(again)} == {part.name for part in parts_of(model)}
    if method != "qlora":
        merged, certificate = quadapt.merge(again, probe=IDS)
        assert certificate.verdict == "exact"
        assert torch.equal(logits(merged), wanted)
