"""The public config: an adapter of a method wherever PEFT takes a `LoraConfig`, and what it refuses by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model

import quadapt
from quadapt.errors import ConfigError
from quadapt.hf.adapter_config import adapter_of, identity_of
from quadapt.hf.peft_layer import adapted_layers
from quadapt.methods import METHODS, lr_qat, method_named, qa_lora
from quadapt.nn.adapters import LoRA, Pooled
from quadapt.quant.rounding import ROUNDINGS

IDS = torch.arange(2, 42).view(2, 20)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def test_it_is_what_peft_and_trainers_take(quantized_llama: Callable[..., Any], tmp_path: Path) -> None:
    config = quadapt.AdapterConfig("qa-lora", r=4, lora_alpha=8, pooling="mean", form="side", task_type="CAUSAL_LM")
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, method_named("qa-lora").recipe.dropout)
    assert adapter_of(config) == Pooled(form="side", pooling="mean")
    base = quantized_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config)
    assert len(adapted_layers(model)) == 14  # all-linear: every layer but the head
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    trained = logits(model)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "QUADAPT"
    again = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert isinstance(again, quadapt.AdapterConfig)
    assert identity_of(again)["pooling"] == "mean"
    by_name = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert isinstance(by_name, PeftModel)
    assert torch.equal(logits(by_name), trained)


def test_a_method_brings_its_paper_s_rank_and_alpha() -> None:
    config = quadapt.AdapterConfig("qa-lora")
    recipe = method_named("qa-lora").recipe
    assert (config.r, config.lora_alpha, config.target_modules) == (recipe.rank, recipe.alpha, "all-linear")
    chosen = quadapt.AdapterConfig(qa_lora(pooling="mean"), rank=3, target_modules=["q_proj"])
    assert (chosen.r, chosen.target_modules) == (3, {"q_proj"})
    assert adapter_of(chosen) == Pooled(pooling="mean")


def test_without_a_method_it_is_stock_lora() -> None:
    config = quadapt.AdapterConfig(r=3, target_modules=["q_proj"])
    assert adapter_of(config) == LoRA()
    assert replace(config, r=5).r == 5


def test_adapters_that_quantize_take_their_grid(tiny_llama: Callable[..., Any]) -> None:
    model = get_peft_model(tiny_llama(), quadapt.AdapterConfig("l4q", bits=3, group_size=32, r=2))
    adapted = logits(model)
    merged, certificate = quadapt.merge(model)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), adapted)
    layouts = merged.config.quantization_config.layouts.values()
    assert {(each.format.bits, each.format.group_size) for each in layouts} == {(3, 32)}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_one_or_says_why_not(name: str, quantized_llama: Callable[..., Any]) -> None:
    method = method_named(name)
    if method.start.name != "zero" or method.tune_first.tunes:
        with pytest.raises(ConfigError, match=rf"method='{name}' is more than its adapter.* quadapt\.prepare"):
            quadapt.AdapterConfig(name)
        return
    config = quadapt.AdapterConfig(name, r=2)
    if method.adapter.base == "codes":
        get_peft_model(quantized_llama(), config)
    assert adapter_of(config) == method.adapter


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("qa-lora", {"bits": 3}, r"bits is no setting .* The grid is that of the quantized model"),
        ("qa-lora", {"learning_rate": 1e-3}, r"learning_rate is no setting .* Leave it out"),
        ("qa-lora", {"rank": 4, "r": 4}, r"rank and r are the same. Give one"),
        ("qlora", {"pooling": "sum"}, r"pooling is no setting .* adapter of qlora, which has"),
        ("l4q", {"dense_steps": 3}, r"dense_steps is no setting"),
        ("qa-lore", {}, r"qa-lore"),
    ],
)
def test_what_has_no_meaning_is_refused(method: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        quadapt.AdapterConfig(method, **settings)


def test_what_begins_with_a_rounding_is_not_an_adapter_alone() -> None:
    with pytest.raises(ConfigError, match=r"begins with the codes of a rounding \(gptq\)"):
        quadapt.AdapterConfig(method_named("l4q").having(rounding="gptq"))
    assert quadapt.AdapterConfig(lr_qat()).r == method_named("lr-qat").recipe.rank
    assert "gptq" in ROUNDINGS


# --- PEFT's settings over every kind of adapter -----------------------------------------------------------------------


def trained(model: Any) -> Any:
    """The model, as if its adapters had been trained."""
    random = torch.Generator().manual_seed(1)
    for layer in adapted_layers(model).values():
        for name, values in layer.params("default").items():
            if name == "B":
                values.data.copy_(0.05 * torch.randn(values.shape, generator=random))
    return model


def ranks(model: Any) -> dict[str, int]:
    return {name: len(layer.params("default")["A"]) for name, layer in adapted_layers(model).items()}


@pytest.mark.parametrize("kind", ["qa-lora", "l4q"])
@pytest.mark.parametrize(
    ("settings", "check"),
    [
        ({"rank_pattern": {"q_proj": 5}}, lambda m: {n[-6:]: r for n, r in ranks(m).items()}["q_proj"] == 5),
        ({"rank_pattern": {r"layers\.1\..*": 3}}, lambda m: sorted(ranks(m).values()) == [2] * 7 + [3] * 7),
        (
            {"alpha_pattern": {"o_proj": 7}},
            lambda m: {x.scaling["default"] for x in adapted_layers(m).values()} > {3.5},
        ),
        ({"use_rslora": True}, lambda m: {x.scaling["default"] for x in adapted_layers(m).values()} == {4 / 2**0.5}),
        ({"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}, lambda m: len(ranks(m)) == 2),
        ({"exclude_modules": ["q_proj"]}, lambda m: len(ranks(m)) == 12),
        ({"exclude_modules": r".*\.0\..*"}, lambda m: len(ranks(m)) == 7),
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, lambda m: len(ranks(m)) == 2),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_peft_s_settings_hold_and_merge_exactly(
    kind: str,
    settings: dict[str, Any],
    check: Callable[[Any], bool],
    quantized_llama: Callable[..., Any],
    tiny_llama: Callable[..., Any],
    tmp_path: Path,
) -> None:
    base = quantized_llama() if kind == "qa-lora" else tiny_llama()
    config = quadapt.AdapterConfig(kind, **{"r": 2, "lora_alpha": 4, **settings})
    model = trained(get_peft_model(base, config))
    assert check(model)
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    base = quantized_llama() if kind == "qa-lora" else tiny_llama()
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again), adapted)
    merged, certificate = quadapt.merge(again)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), adapted)
