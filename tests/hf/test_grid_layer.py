"""Adapters that train the grid, through PEFT: what is trained is what the merge stores, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from quadapt.errors import ConfigError, MergeError
from quadapt.hf.merge import merge
from quadapt.hf.peft_layer import QuantLoraLinear, adapted_layers, lora_config
from quadapt.hf.quantizer import adopt, fingerprint_of
from quadapt.methods import Method, method_named
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.nn.adapters import Adapter
from quadapt.quant.rounding import Nearest

EXACT = ("qa-lora-scales", "peqa", "e2e-qp", "l4q", "lr-qat", "lota-qaf", "code-lora")
Make = Callable[..., Any]


def at(name: str, bits: int) -> Method:
    """A method on a grid that fits tiny layers."""
    method = method_named(name, init_scale=400.0 if name == "code-lora" else None)  # so that codes move in a few steps
    group = -1 if method.format.group_size == -1 else 32
    return method.with_format(replace(method.format, bits=bits, group_size=group))  # type: ignore[arg-type]


def based(method: Method, model: nn.Module) -> nn.Module:
    """What the method's adapter trains over."""
    if method.adapter.base == "float":
        return model
    format, storage, rounding = method.base()
    selection = select(model)
    rounding = rounding.without_data() if rounding.needs else rounding
    quantize_model(model, selection.chosen, Quantization(format=format, storage=storage, rounding=rounding))
    return adopt(model, left=selection.left, made={})


def adapted(adapter: Adapter, model: nn.Module, rank: int = 4) -> Any:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    fingerprint = fingerprint_of(model)
    return get_peft_model(
        model,  # type: ignore[arg-type]
        lora_config(adapter, rank=rank, alpha=rank, target_modules=names, base_fingerprint=fingerprint),
    )


def tokens() -> Tensor:
    return torch.randint(0, 96, (3, 24))


def train(model: Any, steps: int = 8, rate: float = 5e-3) -> list[float]:
    ids = tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("name", EXACT)
def test_the_merged_model_is_the_trained_one_bit_for_bit(
    name: str, bits: int, dtype: torch.dtype, tiny_llama: Make
) -> None:
    method = at(name, bits)
    model = adapted(method.adapter, based(method, tiny_llama(dtype=dtype)))
    losses = train(model, rate=5e-2 if name == "lr-qat" else 5e-3)  # a code moves by 1/16 at least before it flips
    assert losses[-1] < losses[0]
    if name == "lota-qaf":  # a share of the entries as after long training
        for layer in adapted_layers(model).values():
            for param in layer.params("default").values():
                param.data = torch.randint(-1, 2, param.shape).float()
    ids = tokens()
    trained = model.eval()(input_ids=ids).logits
    merged, certificate = merge(model)
    assert torch.equal(merged(input_ids=ids).logits, trained)
    assert certificate.verdict == "exact"
    assert certificate.logits_equal
    layers = quantized_layers(merged)
    assert len(layers) == 14
    assert all(layer.layout.format.bits == bits for layer in layers.values())
    assert not any("lora" in key for key in merged.state_dict())
    moved = sum(layer.codes_changed for layer in certificate.layers)
    assert (moved > 0) == (name in ("l4q", "lr-qat", "lota-qaf", "code-lora"))


@pytest.mark.parametrize("name", [*EXACT, "qat-lora"])
def test_a_saved_adapter_comes_back_bit_for_bit(name: str, tiny_llama: Make, tmp_path: Path) -> None:
    method = at(name, 3)
    model = adapted(method.adapter, based(method, tiny_llama()))
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(based(method, tiny_llama()), tmp_path)
    ids = tokens()
    assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert all(isinstance(layer, QuantLoraLinear) for layer in adapted_layers(again).values())


@pytest.mark.parametrize("name", [*EXACT, "qat-lora"])
def test_all_that_should_train_does_and_nothing_else(name: str, tiny_llama: Make) -> None:
    method = at(name, 3)
    model = adapted(method.adapter, based(method, tiny_llama()))
    for layer in adapted_layers(model).values():  # B starts at zero, and A has no gradient then
        if "B" in layer.params("default"):
            nn.init.normal_(layer.params("default")["B"], std=0.02)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {n.rsplit(".", 3 if "weight" in n else 2)[1] for n, p in model.named_parameters() if p.grad is not None}
    factors = {"lora_A", "lora_B"} if name != "peqa" and name != "e2e-qp" else set()
    shift = {"lora_shift"} if name in ("l4q", "qat-lora") else set()
    rho = {"lora_rho"} if name not in ("lota-qaf", "code-lora") else set()
    assert found == rho | factors | shift
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if p.grad is not None and "shift" not in n)


def test_qat_lora_does_not_merge_and_says_what_to_do(tiny_llama: Make) -> None:
    method = at("qat-lora", 3)
    model = adapted(method.adapter, tiny_llama())
    train(model)
    with pytest.raises(MergeError, match=r"q_proj.*--method l4q.*requantize"):
        merge(model)
    ids = tokens()
    trained = model.eval()(input_ids=ids).logits
    merged, certificate = merge(model, requantize=Nearest())
    assert certificate.verdict == "lossy"
    assert certificate.effect_lost > 0.05
    assert not torch.equal(merged(input_ids=ids).logits, trained)


@pytest.mark.parametrize("name", EXACT)
def test_switched_off_it_is_the_base(name: str, tiny_llama: Make) -> None:
    method = at(name, 4)
    base = based(method, tiny_llama())
    ids = tokens()
    before = base(input_ids=ids).logits
    model = adapted(method.adapter, base)
    train(model, steps=2)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", EXACT)
def test_merging_in_peft_and_unmerging_restores_every_bit(name: str, tiny_llama: Make) -> None:
    method = at(name, 4)
    model = adapted(method.adapter, based(method, tiny_llama()))
    train(model, steps=3)
    ids = tokens()
    trained = model.eval()(input_ids=ids).logits
    model.merge_adapter()
    assert torch.equal(model(input_ids=ids).logits, trained)
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=ids).logits, trained)


def test_before_the_first_step_l4q_is_the_rounded_model(tiny_llama: Make) -> None:
    """Its first grid is that of rounding to nearest, symmetric: no weight is clipped."""
    method = at("l4q", 4)
    model = adapted(replace(method.adapter, offsets="none", scales="fp32"), tiny_llama())  # type: ignore[call-arg]
    plain = tiny_llama()
    format = replace(method.format, zero="none")
    plan = Quantization(
        format=format, storage=replace(method.storage, scales="fp32", offsets="absent"), rounding=Nearest()
    )
    quantize_model(plain, select(plain).chosen, plan)
    ids = tokens()
    assert torch.equal(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_l4q_starts_with_nothing_clipped(tiny_llama: Make) -> None:
    """So offsets have no gradient at first (it is the sum over clamped weights), whatever scales are rounded to."""
    for scales in ("fp16", "fp32"):
        method = at("l4q", 4)
        model = adapted(replace(method.adapter, scales=scales), tiny_llama())  # type: ignore[call-arg]
        ids = tokens()
        model(input_ids=ids, labels=ids).loss.backward()
        assert not any(bool(p.grad.any()) for n, p in model.named_parameters() if "lora_shift" in n)


@pytest.mark.parametrize("init", ["l4q", "lsq+", "symmetric", "asymmetric"])
def test_first_scales_are_the_papers(init: str) -> None:
    method = at("l4q", 3)
    adapter = replace(method.adapter, init=init, scales="fp32")  # type: ignore[call-arg]
    weight = torch.randn(5, 80)
    scales, shifts = adapter.start(weight)  # type: ignore[attr-defined]
    for group, columns in enumerate((slice(0, 32), slice(32, 64), slice(64, 80))):
        w = weight[:, columns].double()
        low, high = w.amin(1), w.amax(1)
        want = {
            "l4q": torch.maximum((low / -4).abs(), (high / 3).abs()),
            "lsq+": torch.maximum(
                (w.mean(1) - 3 * w.std(1, correction=0)).abs(), (w.mean(1) + 3 * w.std(1, correction=0)).abs()
            )
            / 4,
            "symmetric": w.abs().amax(1) / 4,
            "asymmetric": (high - low) / 7,
        }[init]
        torch.testing.assert_close(scales[:, group].double(), want, rtol=1e-6, atol=0)
        shift = high - 3 * want if init == "asymmetric" else torch.zeros_like(want)
        torch.testing.assert_close(shifts[:, group].double(), shift, rtol=1e-5, atol=1e-6)


def test_integral_zero_points_stay_whole(tiny_llama: Make) -> None:
    method = at("l4q", 4)
    model = adapted(replace(method.adapter, offsets="integer"), tiny_llama())  # type: ignore[call-arg]
    train(model)
    ids = tokens()
    trained = model.eval()(input_ids=ids).logits
    merged, certificate = merge(model)
    assert certificate.verdict == "exact"
    assert torch.equal(merged(input_ids=ids).logits, trained)
    for layer in quantized_layers(merged).values():
        assert layer.layout.storage.offsets == "integer"
        zeros = -layer.quant_weight.offsets / layer.quant_weight.scales
        torch.testing.assert_close(zeros, zeros.round(), rtol=0, atol=1e-4)


def test_peqa_is_lr_qat_with_a_and_b_frozen(tiny_llama: Make) -> None:
    """Both fall out of one engine: over codes without a low-rank term, the gradient of the scales is PEQA's."""
    lr_qat, peqa = at("lr-qat", 4), method_named("peqa")
    model = adapted(replace(lr_qat.adapter, scales="fp32"), based(lr_qat, tiny_llama()))  # type: ignore[call-arg]
    plain = tiny_llama()
    weights = {name: layer.first_weight() for name, layer in adapted_layers(model).items()}
    quantize_model(
        plain, select(plain).chosen, Quantization(format=lr_qat.format, storage=lr_qat.storage, rounding=Nearest())
    )
    for name, layer in quantized_layers(plain).items():
        layer.quant_weight = weights[name]
    scales = adapted(peqa.adapter, adopt(plain, left={}, made={}))
    ids = tokens()
    gradients = []
    for each in (model, scales):
        each(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if "lora_rho" in n})
    assert list(gradients[0]) == list(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


def test_the_dense_matrix_is_wanted_or_not(tiny_llama: Make) -> None:
    quantized = based(at("peqa", 4), tiny_llama())
    with pytest.raises(ConfigError, match=r"q_proj.*l4q.*quantized.*dense model"):
        adapted(at("l4q", 4).adapter, quantized)
    with pytest.raises(ConfigError, match=r"q_proj.*scales.*dense.*quantized"):
        adapted(method_named("peqa").adapter, tiny_llama())
    with pytest.raises(ConfigError, match=r"8-bit fixed point"):
        adapted(at("lr-qat", 4).adapter, copy.deepcopy(quantized))


def test_one_adapter_is_active_at_a_time(tiny_llama: Make) -> None:
    model = adapted(at("l4q", 4).adapter, tiny_llama())
    model.add_adapter("other", lora_config(at("l4q", 4).adapter, rank=4, alpha=4))
    with pytest.raises(ConfigError, match="default, other each train the grid"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="trained by default, other; a further adapter must"):
        model.add_adapter("third", lora_config(method_named("qa-lora").adapter, rank=4, alpha=4))


def test_a_bias_of_the_adapter_is_refused(tiny_llama: Make) -> None:
    config = lora_config(at("l4q", 4).adapter, rank=4, alpha=4, target_modules=["q_proj"])
    config.lora_bias = True
    with pytest.raises(ConfigError, match="lora_bias"):
        get_peft_model(tiny_llama(), config)
