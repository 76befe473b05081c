"""Adapters over experts and over Conv1D: trained, kept in folders, loaded by every door, and merged bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import FAMILIES, IDS, logits_of, tiny_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

import quadapt
from quadapt.errors import ConfigError
from quadapt.hf.peft_layer import adapted_layers
from quadapt.model.quantize import quantized_layers

SETTINGS: dict[str, dict[str, Any]] = {
    "qa-lora": {"rounding": "nearest", "rank": 2},
    "l4q": {"rank": 2},
    "lr-qat": {"rank": 2},
    "qlora": {"rounding": "nearest", "rank": 2},
}


def _prepared(name: str, method: str) -> Any:
    return quadapt.prepare(tiny_of(name), method=method, **SETTINGS[method])


def _train(model: Any, steps: int = 3) -> Any:
    """Some steps, after which answers are others."""
    before = logits_of(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(logits_of(model.eval()), before)
    return model


def _base(name: str, method: str) -> Any:
    """The base that an adapter of a method lies over: for l4q transformers' own dense model, as it comes."""
    return tiny_of(name) if method == "l4q" else _prepared(name, method).unload()


CASES = [(name, method) for method in ("qa-lora", "l4q") for name in FAMILIES]
CASES += [(name, "lr-qat") for name in ("GPT2", "Mixtral", "GptOss")]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_merged_is_trained_bit_for_bit(name: str, method: str, tmp_path: Path) -> None:
    model = _train(_prepared(name, method))
    wanted = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(_base(name, method), str(tmp_path / "adapter"))
    assert torch.equal(logits_of(again), wanted)
    merged, certificate = quadapt.merge(model)
    assert certificate.verdict == "exact"
    assert torch.equal(logits_of(merged), wanted)
    merged.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    assert torch.equal(logits_of(type(merged).from_pretrained(tmp_path / "merged")), wanted)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_lies_over_each_quantized_layer_and_comes_back(name: str, tmp_path: Path) -> None:
    model = _train(_prepared(name, "qlora"))
    assert adapted_layers(model).keys() == {
        key.removeprefix("base_model.model.").removesuffix(".base_layer") for key in quantized_layers(model)
    }
    model.save_pretrained(tmp_path / "adapter")
    base = _base(name, "qlora")
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, str(tmp_path / "adapter"))), logits_of(model))


@pytest.mark.parametrize("name", ["GPT2", "Mixtral", "Qwen2Moe", "GptOss"])
def test_transformers_own_loader_takes_the_adapter(name: str, tmp_path: Path) -> None:
    model = _train(_prepared(name, "qa-lora"))
    model.save_pretrained(tmp_path / "adapter")
    base = _base(name, "qa-lora")
    base.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(base), logits_of(model))


@pytest.mark.parametrize("name", ["Qwen2Moe", "DeepseekV3"])
def test_shared_experts_get_adapters_too(name: str) -> None:
    names = adapted_layers(_prepared(name, "qa-lora")).keys()
    shared = "shared_expert" if name == "Qwen2Moe" else "shared_experts"
    assert {f"model.layers.1.mlp.{shared}.{part}_proj" for part in ("gate", "up", "down")} <= names


@pytest.mark.parametrize("method", ["qa-lora", "l4q"])
def test_gradient_checkpointing_changes_nothing(method: str) -> None:
    models = [_prepared("Mixtral", method) for _ in range(2)]
    models[1].gradient_checkpointing_enable()
    models[1].enable_input_require_grads()
    for model in models:
        model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    first, second = ([each.grad for each in model.parameters() if each.grad is not None] for model in models)
    assert len(first) == len(second) > 0
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.deep
def test_a_compiled_model_computes_the_same() -> None:
    model = _prepared("Mixtral", "qa-lora")
    wanted = logits_of(model)
    torch.testing.assert_close(logits_of(torch.compile(model, backend="eager")), wanted)


# --- PEFT's own words for experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_target_parameters_name_the_layers_that_are_views_of_them(name: str) -> None:
    base = _prepared(name, "qlora").unload()
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    names = set(adapted_layers(get_peft_model(base, config)))
    paths = [f"model.layers.{layer}.mlp.experts.{at}" for layer in range(2) for at in range(4)]
    wanted = {f"{path}.{part}" for path in paths for part in ("gate_proj", "up_proj")}
    assert names == wanted | {f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_parameters": ["mlp.experts.w1"]}, r"'mlp.experts.w1' is no stack of experts.*experts.down_proj"),
        (
            {"target_parameters": ["experts.down_proj"], "target_modules": ".*q_proj"},
            r"give the layers beside the experts as a list",
        ),
    ],
    ids=["unknown", "beside a pattern"],
)
def test_target_parameters_that_cannot_be_had_are_refused(settings: dict[str, Any], words: str) -> None:
    base = _prepared("Mixtral", "qlora").unload()
    with pytest.raises(ConfigError, match=words):
        get_peft_model(base, LoraConfig(r=2, **settings))


def test_names_of_single_experts_are_names_of_layers() -> None:
    """PEFT would make stacks of them, as they are in transformers."""
    base = _prepared("Qwen3Moe", "qlora").unload()
    names = set(adapted_layers(get_peft_model(base, LoraConfig(r=2, target_modules=["experts.3.gate_proj"]))))
    assert names == {f"model.layers.{layer}.mlp.experts.3.gate_proj" for layer in range(2)}


def test_dense_models_of_transformers_are_left_to_peft() -> None:
    model = tiny_of("Mixtral")
    found = get_peft_model(model, LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"]))
    assert any(isinstance(module, ParamWrapper) for module in found.modules())
