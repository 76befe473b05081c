"""Our one PEFT layer: stock LoRA and our adapters over a quantized model, through PEFT's own doors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quadapt.errors import CheckpointError, ConfigError, MergeError
from quadapt.hf.peft_layer import QuantLoraLinear, adapted_layers, identity_of, lora_config
from quadapt.hf.quantizer import base_config
from quadapt.hf.trained import adapters_off
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import Adapter, Elastic, ElasticPooled, LoRA, Pooled
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.format import Format

ADAPTERS: dict[str, Adapter] = {
    "lora": LoRA(),
    "merged": Pooled(),
    "side": Pooled(form="side", pooling="mean"),
    "fp32": Pooled(offsets="fp32"),
    "elastic": Elastic(),
    "elastic-pooled": ElasticPooled(),
}
IDS = torch.arange(2, 42).view(2, 20)
adapters = pytest.mark.parametrize("kind", ADAPTERS)


@pytest.fixture(scope="module")
def base(quantized_llama: Callable[..., Any]) -> Any:
    return quantized_llama(Format(bits=4, group_size=32))


def logits(model: nn.Module, **settings: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **settings).logits


def digests(model: nn.Module) -> dict[str, str]:
    return {name: layer.quant_weight.digest() for name, layer in quantized_layers(model).items()}


def randomize(model: nn.Module, name: str = "default", *, seed: int = 1) -> None:
    """As if the adapter had been trained."""
    random = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        if name in layer.adapters:
            weight = layer.lora_B[name].weight
            weight.data.copy_(0.05 * torch.randn(weight.shape, generator=random))
        if "beta" in layer.params(name):
            layer.lora_beta[name].data.copy_(torch.tensor([0.3, -0.02]))


def config_of(kind: str, model: nn.Module, **settings: Any) -> LoraConfig:
    return lora_config(ADAPTERS[kind], rank=4, alpha=8, base_fingerprint=base_config(model).fingerprint, **settings)


def adapted(base: nn.Module, kind: str, **settings: Any) -> PeftModel:
    """A copy of the base with a random adapter, always the same one."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config_of(kind, base, **settings)).eval()
    randomize(model)
    return model


# --- training ---------------------------------------------------------------------------------------------------------


@adapters
def test_every_linear_layer_but_the_head_gets_an_adapter(kind: str, base: nn.Module) -> None:
    model = adapted(base, kind)
    assert set(adapted_layers(model)) == set(quantized_layers(base))
    assert len(adapted_layers(model)) == 14
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 28 + 14 * kind.startswith("elastic")
    assert all("lora_" in name for name in trainable)


@adapters
def test_each_factor_gets_a_gradient_and_nothing_else_does(kind: str, base: nn.Module) -> None:
    model = adapted(base, kind).train()
    before = digests(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert bool(torch.isfinite(parameter.grad).all()), name
            assert float(parameter.grad.norm()) > 0, name
        else:
            assert parameter.grad is None, name
    assert digests(model) == before


@adapters
def test_gradient_checkpointing_changes_no_gradient(kind: str, base: nn.Module) -> None:
    grads = []
    for checkpointing in (False, True):
        model = adapted(base, kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@adapters
def test_under_autocast_it_computes_in_bfloat16(kind: str, base: nn.Module) -> None:
    model = adapted(base, kind).train()
    layer = next(iter(adapted_layers(model).values()))
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


def test_rank_stabilized_scaling_is_honoured(base: nn.Module) -> None:
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    layer = next(iter(adapted_layers(get_peft_model(copy.deepcopy(base), config)).values()))
    assert layer.scaling["default"] == 4.0


def test_layers_that_are_not_quantized_keep_pefts_own(quantized_llama: Callable[..., Any]) -> None:
    model = quantized_llama(Format(bits=4), skip=("o_proj",))
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
    kinds = {
        name.rpartition(".")[2]: type(module)
        for name, module in peft_model.named_modules()
        if name.endswith(("q_proj", "o_proj"))
    }
    assert kinds["q_proj"] is QuantLoraLinear
    assert kinds["o_proj"].__module__ == "peft.tuners.lora.layer"


# --- saving and loading -----------------------------------------------------------------------------------------------


@adapters
def test_a_saved_adapter_comes_back_bit_for_bit(kind: str, base: nn.Module, tmp_path: Path) -> None:
    model = adapted(base, kind)
    model.save_pretrained(tmp_path)
    want = logits(model)
    assert not torch.equal(want, logits(base))
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again), want)


@adapters
def test_transformers_loads_the_adapter_too(kind: str, base: nn.Module, tmp_path: Path) -> None:
    model = adapted(base, kind)
    model.save_pretrained(tmp_path)
    plain = copy.deepcopy(base)
    plain.load_adapter(tmp_path)
    assert torch.equal(logits(plain.eval()), logits(model))


@adapters
def test_what_the_adapter_is_survives_in_its_config(kind: str, base: nn.Module, tmp_path: Path) -> None:
    adapted(base, kind).save_pretrained(tmp_path)
    want = {**ADAPTERS[kind].identity(), "base_fingerprint": base_config(base).fingerprint}
    written = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]["quadapt"]
    assert len(written.pop("digest")) == 64
    assert written == want
    assert identity_of(PeftConfig.from_pretrained(tmp_path)) == want
    assert len(want["base_fingerprint"]) == 64


def test_stock_lora_is_known_as_lora() -> None:
    assert identity_of(LoraConfig(r=4)) == {"kind": "lora"}


def test_the_files_of_a_lora_are_those_that_peft_writes_over_a_dense_model(
    base: nn.Module, tmp_path: Path, tiny_llama: Callable[..., Any]
) -> None:
    from safetensors.torch import load_file

    adapted(base, "lora").save_pretrained(tmp_path / "ours")
    stock = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), stock).save_pretrained(tmp_path / "stock")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock"))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


# --- several adapters -------------------------------------------------------------------------------------------------


@pytest.fixture
def double(base: nn.Module) -> PeftModel:
    """A pooled adapter "default", and a LoRA "second", over the same layers."""
    model = adapted(base, "merged")
    model.add_adapter("second", config_of("lora", base))
    randomize(model, "second", seed=2)
    return model.eval()


def test_two_adapters_are_switched_between(double: PeftModel, base: nn.Module) -> None:
    first = logits(double)
    double.set_adapter("second")
    second = logits(double)
    alone = get_peft_model(copy.deepcopy(base), config_of("lora", base)).eval()
    for mine, theirs in zip(adapted_layers(alone).values(), adapted_layers(double).values(), strict=True):
        mine.lora_A["default"].load_state_dict(theirs.lora_A["second"].state_dict())
        mine.lora_B["default"].load_state_dict(theirs.lora_B["second"].state_dict())
    assert torch.equal(second, logits(alone))
    assert not torch.equal(first, second)
    double.set_adapter("default")
    assert torch.equal(logits(double), first)


def test_adapters_switched_off_leave_the_base(double: PeftModel, base: nn.Module) -> None:
    first = logits(double)
    with double.disable_adapter():
        assert torch.equal(logits(double), logits(base))
    with adapters_off(double):
        assert torch.equal(logits(double), logits(base))
    assert torch.equal(logits(double), first)


def test_adapters_that_are_off_stay_off(double: PeftModel, base: nn.Module) -> None:
    with double.disable_adapter():
        with adapters_off(double):
            pass
        assert torch.equal(logits(double), logits(base))


def test_two_adapters_at_once_add_up(double: PeftModel) -> None:
    x = torch.randn(3, 64)
    layer = next(iter(adapted_layers(double).values()))
    quant = layer.quant.quant_weight.dequantize(torch.float64)
    changes = [layer.get_delta_weight(name).double() for name in ("default", "second")]
    double.base_model.set_adapter(["default", "second"])
    want = x.double() @ (quant + changes[0] + changes[1]).T
    found = layer(x)
    assert float((found - want).norm() / want.norm()) < 1e-3  # offsets are rounded to fp16
    assert float((found - x.double() @ quant.T).norm() / want.norm()) > 0.05


def test_a_deleted_adapter_is_gone(double: PeftModel) -> None:
    double.set_adapter("second")
    double.delete_adapter("default")
    assert all(set(layer.adapters) == {"second"} for layer in adapted_layers(double).values())
    assert not any("default" in name for name, _ in double.named_parameters())


def test_a_batch_that_mixes_adapters_is_refused(double: PeftModel) -> None:
    with pytest.raises(ConfigError, match="one batch per adapter"):
        logits(double, adapter_names=["default", "second"])


# --- merging through PEFT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["merged", "fp32", "elastic-pooled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merged_model_is_the_trained_one_bit_for_bit(kind: str, dtype: torch.dtype, base: nn.Module) -> None:
    model = adapted(base, kind).to(dtype)
    trained = logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, QuantLoraLinear) for module in merged.modules())
    assert sum(isinstance(module, QuantLinear) for module in merged.modules()) == 14
    assert torch.equal(logits(merged), trained)
    assert not torch.equal(trained, logits(copy.deepcopy(base).to(dtype)))


@pytest.mark.parametrize("kind", ["merged", "side", "fp32", "elastic-pooled"])
def test_unmerging_restores_every_bit(kind: str, base: nn.Module) -> None:
    model = adapted(base, kind)
    before, trained = digests(model), logits(model)
    model.merge_adapter()
    assert all(digests(model)[name] != digest for name, digest in before.items())
    model.unmerge_adapter()
    assert digests(model) == before
    assert torch.equal(logits(model), trained)


def test_merging_one_after_the_other_and_unmerging_restores_every_bit(base: nn.Module) -> None:
    model = adapted(base, "merged")
    model.add_adapter("second", config_of("fp32", base))
    randomize(model, "second", seed=2)
    before = digests(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert digests(model) == before


def test_merged_adapters_are_not_counted_twice(base: nn.Module) -> None:
    model = adapted(base, "merged")
    trained = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), trained)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("kind", ["lora", "elastic"])
def test_lora_is_not_merged_and_nothing_is_changed(kind: str, base: nn.Module) -> None:
    model = adapted(base, kind)
    before, trained = digests(model), logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(MergeError, match=r"export --format lora.*qa-lora.*merge --requantize"):
            merge()
    assert digests(model) == before
    assert torch.equal(logits(model), trained)


@adapters
def test_the_delta_is_what_the_adapter_adds(kind: str, base: nn.Module) -> None:
    model = adapted(base, kind)
    layer = next(iter(adapted_layers(model).values()))
    x = torch.randn(40, 64)
    with torch.no_grad():
        adapted_output = layer(x)
    effect = adapted_output - x @ layer.quant.quant_weight.dequantize().T
    want = x @ layer.get_delta_weight("default").T
    assert float((effect - want).norm() / want.norm()) < (5e-3 if kind in ("merged", "elastic-pooled") else 1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_qalora": True, "qalora_group_size": 32}, "qa-lora, which merges"),
        *[
            ({"init_lora_weights": kind}, "needs the dense weight")
            for kind in ("pissa", "olora", "orthogonal", "corda")
        ],
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
    ],
)
def test_variants_without_meaning_over_codes_are_refused(settings: dict[str, Any], told: str, base: nn.Module) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    model = copy.deepcopy(base)
    with pytest.raises(ConfigError, match=told):
        get_peft_model(model, config)
    assert digests(model) == digests(base)


def test_dropout_in_the_merged_form_is_refused_by_layer(base: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"q_proj: dropout=0\.1 has no meaning in the merged form"):
        get_peft_model(copy.deepcopy(base), config_of("merged", base, dropout=0.1, target_modules=["q_proj"]))


def test_an_adapter_of_a_newer_kind_is_refused(base: nn.Module, tmp_path: Path) -> None:
    adapted(base, "merged").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["auto_mapping"]["quadapt"]["kind"] = "l5q"
    config["peft_type"] = "LORA"  # as earlier versions wrote it, without a digest
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'l5q' is unknown"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_a_pooled_adapter_over_a_dense_model_is_refused(
    base: nn.Module, tmp_path: Path, tiny_llama: Callable[..., Any]
) -> None:
    """Stock layers know nothing of pooling, and would compute something else."""
    adapted(base, "merged").save_pretrained(tmp_path)
    with pytest.raises((ConfigError, CheckpointError, RuntimeError)):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_gaussian_factors_are_gaussian_under_pooling_too(base: nn.Module) -> None:
    config = config_of("merged", base)
    config.init_lora_weights = "gaussian"
    layers = adapted_layers(get_peft_model(copy.deepcopy(base), config)).values()
    assert not any(bool(layer.lora_B["default"].weight.any()) for layer in layers)
    drawn = torch.cat([layer.lora_A["default"].weight.flatten() for layer in layers])
    assert float(drawn.std()) == pytest.approx(1 / 4, rel=0.25)


def test_a_model_saved_after_merging_is_an_ordinary_checkpoint(base: nn.Module, tmp_path: Path) -> None:
    from quadapt.hf.merge import merge

    merged, _ = merge(adapted(base, "merged"))
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(merged))
