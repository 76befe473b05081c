"""What trains besides the adapters over quantized layers is part of the merged model, or is refused by its name."""

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

from quadapt.errors import MergeError
from quadapt.hf.merge import merge
from quadapt.hf.peft_layer import adapted_layers, lora_config
from quadapt.hf.probe import with_tokens
from quadapt.hf.quantizer import base_config
from quadapt.hf.trained import adapters_off, parts_of, trained_tokens
from quadapt.nn.adapters import LoRA, Pooled
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest

TEXT = torch.tensor([[1, 90, 7, 91, 3, 12, 92, 40]])
PROBE = torch.arange(2, 66).view(4, 16)  # without the tokens from 80 on


@pytest.fixture(scope="module")
def make(quantized_llama: Callable[..., Any]) -> Callable[..., Any]:
    """`make(adapter, tied=, bias=, skip=, **settings)`: a PEFT model in which all that trains has moved."""

    def build(adapter: Any, *, tied: bool = False, bias: bool = False, skip: tuple[str, ...] = (), **more: Any) -> Any:
        base = quantized_llama(Format(bits=4, group_size=32), skip=skip, tie_word_embeddings=tied, attention_bias=bias)
        config = lora_config(adapter, rank=2, alpha=4, target_modules=more.pop("targets", ["q_proj", "down_proj"]))
        for name, value in more.items():
            setattr(config, name, value)
        model = get_peft_model(base, config).eval()
        move(model)
        return model

    return build


def move(model: nn.Module) -> None:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


def logits(model: nn.Module, text: Tensor = TEXT) -> Tensor:
    with torch.no_grad():
        return model(input_ids=text).logits


def kinds(certificate: Any) -> dict[str, str]:
    return {part.name: part.kind for part in certificate.besides}


# --- token rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_token_rows_merge_exactly_and_are_in_every_probe(tied: bool, make: Callable[..., Any], tmp_path: Path) -> None:
    model = make(Pooled(), tied=tied, trainable_token_indices={"embed_tokens": [90, 91, 95]})
    before = logits(model)
    with adapters_off(model):
        assert (logits(model) - before).abs().max() > 0.01
    merged, certificate = merge(model, probe=PROBE, probe_name="mine")
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), before)
    assert certificate.probe == "mine and 3 tokens whose embeddings trained"
    assert kinds(certificate)["model.embed_tokens"] == "3 token rows"
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before)


def test_a_merge_that_loses_token_rows_is_not_called_exact(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe holds them, so that the logits show it."""
    monkeypatch.setattr("quadapt.hf.merge.merge_parts", lambda _: None)
    _, certificate = merge(make(Pooled(), trainable_token_indices={"embed_tokens": [90]}), probe=PROBE)
    assert certificate.verdict == "equivalent"
    assert certificate.effect_lost > 0.01


def test_a_probe_is_lengthened_by_whole_sequences_of_the_tokens() -> None:
    assert torch.equal(with_tokens(PROBE, []), PROBE)
    found = with_tokens(PROBE, list(range(70, 90)))
    assert found.shape == (6, 16)
    assert torch.equal(found[:4], PROBE)
    assert set(found[4:].flatten().tolist()) == set(range(70, 90))


def test_tokens_of_a_matrix_that_trained_whole_are_those_that_moved(make: Callable[..., Any]) -> None:
    model = make(Pooled(), modules_to_save=["embed_tokens"])
    wrapper = model.get_base_model().get_input_embeddings()
    wrapper.modules_to_save["default"].weight.data.copy_(wrapper.original_module.weight)
    wrapper.modules_to_save["default"].weight.data[[5, 94]] += 1
    assert trained_tokens(model) == [5, 94]


# --- whole modules, and LoRA over dense weights -----------------------------------------------------------------------


def test_whole_modules_are_kept(make: Callable[..., Any], tmp_path: Path) -> None:
    model = make(Pooled(), modules_to_save=["lm_head", "model.norm"])
    before = logits(model)
    merged, certificate = merge(model, probe=PROBE)
    assert certificate.verdict == "exact"
    assert kinds(certificate) == dict.fromkeys(["lm_head", "model.norm"], "a whole module")
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("how", ["lora", "whole"])
def test_tied_embeddings_come_apart_where_one_of_them_trained(
    target: str, how: str, make: Callable[..., Any], tmp_path: Path
) -> None:
    more = {"modules_to_save": [target]} if how == "whole" else {"targets": ["q_proj", target]}
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = make(LoRA(), tied=True, **more)
    before = logits(model)
    merged, certificate = merge(model, requantize=Nearest())
    (part,) = certificate.besides
    assert part.untied
    assert "untied" in str(certificate)
    assert merged.config.tie_word_embeddings is False
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged))
    assert (logits(again) - before).norm() < 0.5 * before.norm()


def test_lora_over_the_head_and_a_skipped_layer_is_merged_and_no_merge_of_it_is_called_exact(
    make: Callable[..., Any],
) -> None:
    model = make(Pooled(), skip=("down_proj",), targets=["q_proj"])
    model.add_adapter("dense", LoraConfig(r=2, target_modules=["down_proj", "lm_head"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "dense"])
    move(model)
    before = logits(model)
    merged, certificate = merge(model, probe=PROBE)
    assert set(kinds(certificate)) == {"lm_head", *(f"model.layers.{at}.mlp.down_proj" for at in (0, 1))}
    assert set(kinds(certificate).values()) == {"LoRA over a dense weight"}
    assert certificate.verdict == "equivalent"
    assert 0 <= certificate.effect_lost < 1e-4
    assert base_config(merged).made["merge"] == "equivalent"
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


def test_a_model_that_trained_dense_parts_alone_merges(make: Callable[..., Any]) -> None:
    model = make(LoRA(), targets=["lm_head"])
    before = logits(model)
    merged, certificate = merge(model)
    assert certificate.layers == ()
    assert str(certificate).startswith("equivalent")
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


# --- biases -----------------------------------------------------------------------------------------------------------


def test_biases_of_the_base_that_trained_are_kept(make: Callable[..., Any]) -> None:
    model = make(Pooled(), bias=True)  # set at the injection, as a user does
    again = get_peft_model(model.unload(), LoraConfig(r=2, bias="all", target_modules=["q_proj"]))
    move(again)
    before = logits(again)
    merged, certificate = merge(again, requantize=Nearest())
    assert "model.layers.0.self_attn.k_proj.bias" in kinds(certificate)
    assert (logits(merged) - before).norm() < 0.2 * before.norm()
    bias = merged.model.layers[1].self_attn.o_proj.bias
    assert torch.equal(bias, dict(again.named_parameters())["base_model.model.model.layers.1.self_attn.o_proj.bias"])


@pytest.mark.parametrize("requantize", [None, Nearest()])
def test_biases_of_adapters_merge_into_those_of_the_base(requantize: Any, make: Callable[..., Any]) -> None:
    adapter = Pooled(form="side") if requantize is None else LoRA()
    model = make(adapter, bias=True, targets=["q_proj"], lora_bias=True)
    layer = adapted_layers(model)["model.layers.0.self_attn.q_proj"]
    wanted = layer.get_base_layer().bias + 2 * layer.lora_B["default"].bias
    before = logits(model)
    merged, certificate = merge(model, requantize=requantize)
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.bias, wanted)
    assert certificate.effect_lost < 0.05 if requantize is None else certificate.verdict == "lossy"
    assert (logits(merged) - before).norm() < 0.2 * before.norm()


@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize("requantize", [None, Nearest()])
def test_a_bias_where_the_base_has_none_is_refused_by_name(requantize: Any, make: Callable[..., Any]) -> None:
    model = make(Pooled(form="side"), lora_bias=True)
    with pytest.raises(MergeError, match=r"model\.layers\.0\.self_attn\.q_proj: .*'default' has a bias"):
        merge(model, requantize=requantize)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_peft_cannot_merge_leaves_everything_as_it_was(make: Callable[..., Any]) -> None:
    model = make(Pooled(), skip=("down_proj",), targets=["q_proj"], trainable_token_indices={"embed_tokens": [90]})
    model.add_adapter("dense", LoraConfig(r=2, target_modules=["down_proj", "lm_head"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "dense"])
    move(model)
    before, state = logits(model), copy.deepcopy(model.state_dict())
    head = model.get_base_model().lm_head
    head.get_delta_weight = lambda _: torch.full_like(head.weight, float("nan"))
    with pytest.raises(MergeError, match="lm_head: cannot merge: NaNs detected"):
        merge(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_adapters_that_are_merged_or_switched_off_are_refused(make: Callable[..., Any]) -> None:
    model = make(Pooled())
    model.merge_adapter()
    with pytest.raises(MergeError, match=r"q_proj: default is merged already .*unmerge_adapter"):
        merge(model)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(MergeError, match="switched off"):
        merge(model)
    model.base_model.enable_adapter_layers()
    assert merge(model)[1].verdict == "exact"


def test_adapters_that_transformers_has_loaded_are_refused_with_advice(
    make: Callable[..., Any], tmp_path: Path, quantized_llama: Callable[..., Any]
) -> None:
    make(Pooled()).save_pretrained(tmp_path)
    model = quantized_llama(Format(bits=4, group_size=32))
    model.load_adapter(str(tmp_path))
    with pytest.raises(MergeError, match=r"is no PeftModel.*PeftModel\.from_pretrained"):
        merge(model)


def test_nothing_but_what_trained_is_listed(make: Callable[..., Any], tmp_path: Path) -> None:
    model = make(Pooled())
    assert parts_of(model) == []
    model.save_pretrained(tmp_path)
    assert parts_of(PeftModel.from_pretrained(model.unload(), tmp_path)) == []
