"""PEFT's operations on a whole model: merging, adding up, further adapters; the model stays known as what it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quadapt.errors import CheckpointError, ConfigError, MergeError
from quadapt.hf.merge import merge
from quadapt.hf.peft_layer import adapted_layers, lora_config
from quadapt.hf.quantizer import base_config, content_of, fingerprint_of
from quadapt.methods import method_named
from quadapt.nn.adapters import Adapter, Elastic, LoRA, Pooled
from quadapt.quant.format import Format

TEXT = torch.arange(2, 34).view(2, 16)
GRID = ("l4q", "peqa")


@pytest.fixture(scope="module")
def make(quantized_llama: Callable[..., Any], tiny_llama: Callable[..., Any]) -> Callable[..., Any]:
    """`make(adapter)`: a PEFT model over the base that the adapter needs, in which all that trains has moved."""

    def build(adapter: Adapter, **settings: Any) -> PeftModel:
        base = tiny_llama() if adapter.base == "float" else quantized_llama(Format(bits=4, group_size=32))
        config = lora_config(adapter, rank=2, alpha=4, target_modules=["q_proj", "down_proj"], **settings)
        model = get_peft_model(base, config).eval()
        move(model)
        return model

    return build


def move(model: nn.Module, seed: int = 3) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.03 * torch.randn_like(parameter)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TEXT).logits


# --- merging by PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*GRID, "qa-lora"])
def test_what_peft_merges_is_quantized_for_transformers_too_and_a_base_of_its_own(
    method: str, make: Callable[..., Any], tmp_path: Path
) -> None:
    model = make(method_named(method).adapter)
    before, old = logits(model), fingerprint_of(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), before)
    assert base_config(merged).fingerprint == content_of(merged) != old
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), before)
    get_peft_model(again, lora_config(Pooled(), rank=2, alpha=4, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "over"
    )
    base = make(method_named(method).adapter).unload()
    with pytest.raises((CheckpointError, ConfigError), match=r"another base|this layer is dense"):
        PeftModel.from_pretrained(base, tmp_path / "over")


@pytest.mark.parametrize("by_peft", [True, False])
def test_a_merge_that_changes_dense_layers_alone_gives_another_base(
    by_peft: bool, quantized_llama: Callable[..., Any], tmp_path: Path
) -> None:
    over_head = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(quantized_llama(), over_head).eval()
    old = fingerprint_of(model)
    move(model)
    merged: Any = model.merge_and_unload() if by_peft else merge(model)[0]
    assert base_config(merged).fingerprint == content_of(merged) != old
    get_peft_model(merged, lora_config(Pooled(), rank=2, alpha=4)).save_pretrained(tmp_path / "over")
    with pytest.raises(CheckpointError, match="another base"):
        PeftModel.from_pretrained(quantized_llama(), tmp_path / "over")


@pytest.mark.parametrize("method", [*GRID, "qa-lora"])
def test_merging_for_the_time_being_changes_the_fingerprint_for_as_long(method: str, make: Callable[..., Any]) -> None:
    model = make(method_named(method).adapter)
    config, before = copy.deepcopy(model.config.to_dict()), logits(model)
    old = fingerprint_of(model.get_base_model())
    model.merge_adapter()
    base = model.get_base_model()
    assert base_config(base).fingerprint == content_of(base) != old
    with model.disable_adapter():  # computes with the weights from before, and leaves the merged ones where they are
        assert not torch.equal(logits(model), before)
    assert base_config(base).fingerprint == content_of(base) != old
    assert torch.equal(logits(model), before)
    model.unmerge_adapter()
    assert fingerprint_of(base) == old
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), before)


def test_a_merge_by_peft_merges_dense_parts_and_token_rows_or_nothing(make: Callable[..., Any]) -> None:
    model = make(Pooled())
    model.add_adapter(
        "dense",
        LoraConfig(
            r=2, target_modules=["lm_head"], trainable_token_indices={"embed_tokens": [4]}, task_type="CAUSAL_LM"
        ),
    )
    model.base_model.set_adapter(["default", "dense"])
    move(model)
    before = logits(model)
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), before, rtol=1e-4, atol=1e-4)
    lora = make(LoRA())
    state = copy.deepcopy(lora.state_dict())
    for merging in (lora.merge_and_unload, lora.merge_adapter):
        with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj"):
            merging()
    assert all(torch.equal(value, state[name]) for name, value in lora.state_dict().items())


# --- further adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*GRID, "qa-lora"])
def test_an_adapter_given_the_very_config_of_another_starts_as_its_copy(method: str, make: Callable[..., Any]) -> None:
    """As trl's preference trainers make their reference; the merge is of the one that is active."""
    model = make(method_named(method).adapter)
    first = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    assert torch.equal(logits(model), first)
    model.set_adapter("default")
    move(model)
    trained = logits(model)
    model.set_adapter("ref", inference_mode=True)
    assert torch.equal(logits(model), first)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter("default")
    merged, certificate = merge(model)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), trained)
    assert not torch.equal(trained, first)


def test_a_fresh_config_gives_a_fresh_adapter(make: Callable[..., Any]) -> None:
    model = make(method_named("l4q").adapter)
    trained = logits(model)
    model.add_adapter("second", lora_config(method_named("l4q").adapter, rank=2, alpha=4, target_modules=["q_proj"]))
    model.set_adapter("second")
    assert not torch.equal(logits(model), trained)
    layers = adapted_layers(model)
    assert not layers["model.layers.0.mlp.down_proj"].active()
    assert not layers["model.layers.0.self_attn.q_proj"].lora_rho["second"].any()
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), trained)


# --- what PEFT would do wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "how", "why"),
    [
        (Elastic(), "cat", "trains more"),
        (method_named("peqa").adapter, "cat", "trains more"),
        (method_named("lota-qaf").adapter, "cat", "what does not add"),
        (Pooled(), "svd", "Use 'cat'"),
    ],
    ids=["elastic", "peqa", "lota", "pooled"],
)
def test_adapters_that_do_not_add_up_are_refused(
    adapter: Adapter, how: str, why: str, make: Callable[..., Any]
) -> None:
    model = make(adapter)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    with pytest.raises(ConfigError, match=why):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type=how)


def test_pooled_adapters_add_up_by_concatenation(make: Callable[..., Any]) -> None:
    model = make(Pooled(form="side"))
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    before = logits(model)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [LoRA(), Pooled(offsets="fp32")], ids=["lora", "pooled"])
@pytest.mark.parametrize("how", ["cat", "svd", "linear", "ties", "dare_linear", "magnitude_prune", "ties_svd"])
def test_a_weighted_sum_is_one_or_is_refused_or_said_to_be_none(
    kind: Adapter, how: str, make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = make(kind)
    model.add_adapter("second", lora_config(kind, rank=2, alpha=6, target_modules=["q_proj", "down_proj"]))
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B["second"].weight, std=0.05)
    density = {} if how in ("cat", "svd", "linear") else {"density": 1.0}

    def add() -> None:
        model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "sum", how, svd_rank=4, **density)

    if how.endswith("svd") and isinstance(kind, Pooled):
        with pytest.raises(ConfigError, match=rf"combination_type='{how}' makes factors over all inputs.*Use 'cat'"):
            add()
        return
    add()
    for layer in adapted_layers(model).values():
        want = 0.7 * layer.get_delta_weight("default") + 0.4 * layer.get_delta_weight("second")
        equal = torch.allclose(layer.get_delta_weight("sum"), want, atol=1e-6)
        assert equal == (how in ("cat", "svd"))
    assert ("is not the weighted sum" in caplog.text) == (how not in ("cat", "svd", "ties_svd"))


def test_mixed_kinds_over_one_base_stay_apart(make: Callable[..., Any], tmp_path: Path) -> None:
    """Pooled, over all inputs, with elastic connections: each computes and loads as it did alone."""
    kinds: dict[str, Adapter] = {"pooled": Pooled(), "lora": LoRA(), "elastic": Elastic()}
    alone = {}
    for at, (name, kind) in enumerate(kinds.items()):
        single = make(kind)
        move(single, seed=10 + at)
        alone[name] = logits(single)
        single.save_pretrained(tmp_path / name)
    base = make(Pooled()).unload()
    names = list(kinds)
    model = PeftModel.from_pretrained(base, tmp_path / names[0], adapter_name=names[0]).eval()
    for name in names[1:]:
        model.load_adapter(str(tmp_path / name), name)
    for name in (*names, *reversed(names)):
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[name])
    model.base_model.set_adapter(["pooled", "lora"])
    both = logits(model)
    assert not torch.equal(both, alone["pooled"])
    model.delete_adapter("elastic")
    assert torch.equal(logits(model), both)


def test_hot_swapping_puts_another_adapter_of_the_kind_into_the_place(make: Callable[..., Any], tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    other = make(Pooled())
    move(other, seed=21)
    wanted = logits(other)
    other.save_pretrained(tmp_path / "other")
    model = make(Pooled())
    assert not torch.equal(logits(model), wanted)
    hotswap_adapter(model, str(tmp_path / "other"), "default")
    assert torch.equal(logits(model), wanted)
