"""Merging, and whether the certificate says the truth about it."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import quadapt
from quadapt.errors import CheckpointError, ConfigError, MergeError
from quadapt.hf.merge import Certificate, merge
from quadapt.hf.peft_layer import QuantLoraLinear, adapted_layers, lora_config
from quadapt.hf.probe import random_probe
from quadapt.hf.quantizer import adopt, base_config
from quadapt.hf.trained import adapters_off
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import Adapter, LoRA, Pooled
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

PROBE = torch.arange(2, 66).view(4, 16)


@pytest.fixture(scope="module")
def base(quantized_llama: Callable[..., Any]) -> Any:
    return quantized_llama(Format(bits=3, group_size=32))


def adapted(base: nn.Module, adapter: Adapter, *, size: float = 0.05, seed: int = 0, **settings: Any) -> PeftModel:
    """A copy of the base with a random adapter, the same for the same seed."""
    torch.manual_seed(seed)
    settings = {"rank": 4, "alpha": 8, "base_fingerprint": base_config(base).fingerprint, **settings}
    model = get_peft_model(copy.deepcopy(base), lora_config(adapter, **settings)).eval()
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=size)
    return model


def logits(model: nn.Module) -> Tensor:
    """Row by row: a batch of another size may round otherwise."""
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None]).logits for row in PROBE])


def weights(model: nn.Module) -> dict[str, QuantWeight]:
    return {name: layer.quant_weight for name, layer in quantized_layers(model).items()}


def cleaned(names: dict[str, Any]) -> dict[str, Any]:
    """By the names that layers have without PEFT's wrapping."""
    return {name.removeprefix("base_model.model.").replace(".base_layer", ""): value for name, value in names.items()}


def measured(model: PeftModel, **settings: Any) -> tuple[Any, Certificate, dict[str, Tensor], dict[str, QuantWeight]]:
    """The merged model, its certificate, logits before (adapted, base) and after (merged), and the base's weights."""
    before = {"adapted": logits(model)}
    with adapters_off(model):
        before["base"] = logits(model)
    originals = cleaned(weights(model))
    merged, certificate = merge(model, probe=PROBE, probe_name="counting", **settings)
    return merged, certificate, {**before, "merged": logits(merged)}, originals


# --- the verdict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_was_trained_in_the_merged_form_merges_exactly(dtype: torch.dtype, base: nn.Module) -> None:
    merged, certificate, found, _ = measured(adapted(base, Pooled()).to(dtype))
    assert torch.equal(found["merged"], found["adapted"])
    assert (certificate.verdict, certificate.logits_equal) == ("exact", True)
    assert (certificate.effect_lost, certificate.kl, certificate.argmax_changed) == (0.0, 0.0, 0.0)
    assert certificate.dtype == str(dtype).removeprefix("torch.")
    assert certificate.perplexity_before == certificate.perplexity_after
    assert all(layer.difference == 0.0 for layer in certificate.layers)
    assert base_config(merged).made["merge"] == "exact"


@pytest.mark.parametrize("offsets", ["fp16", "fp32"])
def test_a_side_branch_merges_to_an_equivalent(offsets: str, base: nn.Module) -> None:
    merged, certificate, found, _ = measured(adapted(base, Pooled(form="side", offsets=offsets)))
    assert not torch.equal(found["merged"], found["adapted"])
    assert (certificate.verdict, certificate.logits_equal) == ("equivalent", False)
    assert 0 < certificate.effect_lost < (0.05 if offsets == "fp16" else 1e-4)
    assert 0 < max(layer.difference for layer in certificate.layers) < 0.1
    assert base_config(merged).made["merge"] == "equivalent"


@pytest.mark.parametrize("adapter", [LoRA(), Pooled(), Pooled(form="side")], ids=["lora", "merged", "side"])
@pytest.mark.parametrize("rounding", [Nearest(), GPTQ()], ids=["nearest", "gptq"])
def test_requantizing_is_called_lossy_whatever_it_costs(adapter: Adapter, rounding: Any, base: nn.Module) -> None:
    batches = [torch.randint(3, 96, (4, 32))] if rounding.needs else []
    merged, certificate, _, _ = measured(adapted(base, adapter), requantize=rounding, batches=batches)
    assert certificate.verdict == "lossy"
    if adapter == LoRA():  # (a pooled adapter shifts whole groups, whose codes rounding finds again)
        assert certificate.effect_lost > 0.01
    assert base_config(merged).made["merge"] == "requantized"
    assert {weight.layout.bits_per_weight for weight in weights(merged).values()} == {
        weight.layout.bits_per_weight for weight in weights(base).values()
    }


def test_a_merged_form_that_came_out_unequal_is_not_called_exact(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word follows what was measured."""
    right = Pooled.merge

    def wrong(self: Pooled, weight: QuantWeight, *rest: Any) -> QuantWeight:
        moved = right(self, weight, *rest)
        return moved.with_offsets(moved.offsets + 0.01, "fp16") if merging else moved

    monkeypatch.setattr(Pooled, "merge", wrong)
    merging: list[bool] = []
    real = QuantLoraLinear.merged_weight
    monkeypatch.setattr(QuantLoraLinear, "merged_weight", lambda self: (merging.append(True), real(self))[1])
    _, certificate = merge(adapted(base, Pooled()), probe=PROBE)
    assert certificate.verdict != "exact"
    assert not certificate.logits_equal


# --- its figures ------------------------------------------------------------------------------------------------------


CASES = pytest.mark.parametrize(
    ("adapter", "requantize"),
    [(Pooled(form="side"), None), (Pooled(), None), (LoRA(), Nearest(range="mse")), (LoRA(), GPTQ())],
)


@CASES
def test_its_figures_are_those_of_a_direct_computation(adapter: Adapter, requantize: Any, base: nn.Module) -> None:
    batches = [torch.randint(3, 96, (4, 32))] if requantize is not None and requantize.needs else []
    _, certificate, found, _ = measured(adapted(base, adapter), requantize=requantize, batches=batches)
    was, base_, now = (found[name].double() for name in ("adapted", "base", "merged"))
    assert certificate.effect_lost == pytest.approx(float((now - was).norm() / (was - base_).norm()), rel=1e-4)
    p, q = was.softmax(-1), now.softmax(-1)
    kl = float((p * (p / q).log()).sum(-1).mean())
    assert certificate.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert certificate.argmax_changed == pytest.approx(float((was.argmax(-1) != now.argmax(-1)).double().mean()))
    for values, told in ((was, certificate.perplexity_before), (now, certificate.perplexity_after)):
        losses = [-values[row, at].log_softmax(-1)[PROBE[row, at + 1]] for row in range(4) for at in range(15)]
        assert told == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)
    assert certificate.probe == "counting"


@CASES
def test_its_layers_are_those_of_a_direct_comparison(adapter: Adapter, requantize: Any, base: nn.Module) -> None:
    batches = [torch.randint(3, 96, (4, 32))] if requantize is not None and requantize.needs else []
    model = adapted(base, adapter)
    dense = {name: layer.dense_adapted() for name, layer in adapted_layers(model).items()}
    merged, certificate, _, originals = measured(model, requantize=requantize, batches=batches)
    now = weights(merged)
    assert [layer.name for layer in certificate.layers] == list(dense)
    for layer in certificate.layers:
        changed = int((now[layer.name].codes() != originals[layer.name].codes()).sum())
        assert layer.codes_changed == changed
        assert (changed == 0) == (requantize is None)
        columns = now[layer.name].layout.columns
        steps = now[layer.name].scales.repeat_interleave(32, 1)[:, :columns]
        missed = ((now[layer.name].dequantize() - dense[layer.name]).abs() / steps).max()
        assert layer.difference == pytest.approx(float(missed), rel=1e-6)
        assert (layer.difference > 0.3) == (requantize is not None)


def test_the_dense_weight_of_an_adapted_layer_is_what_it_computes_with(base: nn.Module) -> None:
    for adapter in (LoRA(), Pooled(), Pooled(form="side", pooling="mean")):
        layer = adapted_layers(adapted(base, adapter))["model.layers.0.mlp.down_proj"]
        x = torch.randn(5, 96)
        torch.testing.assert_close(layer(x), x @ layer.dense_adapted().T, rtol=1e-4, atol=1e-4)


def test_its_text_names_the_verdict_and_the_cost(base: nn.Module) -> None:
    _, exact = merge(adapted(base, Pooled()), probe=PROBE, probe_name="counting")
    assert str(exact).startswith("exact: logits bit-equal in float32 on counting;")
    assert "0 codes changed" in str(exact)
    _, lossy = merge(adapted(base, LoRA()), probe=PROBE, requantize=Nearest())
    assert str(lossy).startswith(f"lossy: {lossy.effect_lost:.2%} of the effect lost in float32")
    assert f"{sum(layer.codes_changed for layer in lossy.layers)} codes changed" in str(lossy)
    assert json.loads(json.dumps(lossy.as_dict()))["layers"][0]["name"] == lossy.layers[0].name


def test_without_a_probe_random_tokens_serve(base: nn.Module) -> None:
    _, certificate = merge(adapted(base, Pooled()))
    assert certificate.probe == "128 random tokens"  # two sequences as long as the model's context
    assert tuple(random_probe(96).shape) == (2, 128)
    assert torch.equal(random_probe(96), random_probe(96))
    assert int(random_probe(96).max()) < 96


# --- the merged model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format",
    [
        Format(bits=2, zero="integer"),
        Format(bits=8),
        Format(levels="nf", bits=4),
        Format(bits=4, zero="none", group_size=-1),
    ],
    ids=lambda format: format.name,
)
def test_every_grid_merges_exactly(format: Format, quantized_llama: Callable[..., Any]) -> None:
    merged, certificate, _, originals = measured(adapted(quantized_llama(format), Pooled()))
    assert certificate.verdict == "exact"
    for name, weight in weights(merged).items():
        assert torch.equal(weight.codes(), originals[name].codes())
        assert torch.equal(weight.scales, originals[name].scales)


def test_the_merged_model_is_an_ordinary_one_with_its_own_fingerprint(base: nn.Module) -> None:
    merged, _ = merge(adapted(base, Pooled()))
    assert type(merged) is type(base)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    config = base_config(merged)
    assert config.fingerprint != base_config(base).fingerprint
    assert config.left == base_config(base).left
    assert config.made == {"rounding": "nearest", "merge": "exact"}


def test_the_base_is_not_merged_into(base: nn.Module) -> None:
    before = {name: weight.digest() for name, weight in weights(base).items()}
    merge(adapted(base, Pooled()))
    assert {name: weight.digest() for name, weight in weights(base).items()} == before


def test_two_adapters_merge_exactly_at_once(base: nn.Module) -> None:
    model = adapted(base, Pooled())
    model.add_adapter("second", lora_config(Pooled(offsets="fp32", pooling="mean"), rank=2, alpha=64))
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B["second"].weight, std=0.1)
    model.base_model.set_adapter(["default", "second"])
    _, certificate, found, _ = measured(model)
    assert certificate.verdict == "exact"
    assert torch.equal(found["merged"], found["adapted"])


def test_an_adapter_over_some_layers_leaves_the_others(base: nn.Module) -> None:
    merged, certificate, _, originals = measured(adapted(base, Pooled(), target_modules=["q_proj"]))
    assert [layer.name for layer in certificate.layers] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    changed = {name for name, weight in weights(merged).items() if weight.digest() != originals[name].digest()}
    assert changed == {layer.name for layer in certificate.layers}


def test_an_active_adapter_over_other_layers_than_an_idle_one_merges(base: nn.Module) -> None:
    model = adapted(base, Pooled(), target_modules=["q_proj"])
    model.add_adapter("second", lora_config(Pooled(), rank=2, alpha=4, target_modules=["v_proj"]))
    for name, layer in adapted_layers(model).items():
        if name.endswith("v_proj"):
            nn.init.normal_(layer.lora_B["second"].weight, std=0.1)
    model.set_adapter("second")
    _, certificate, found, _ = measured(model)
    assert certificate.verdict == "exact"
    assert torch.equal(found["merged"], found["adapted"])


def test_layers_keep_grids_of_their_own_when_requantized(quantized_llama: Callable[..., Any]) -> None:
    model = quantized_llama(Format(bits=4))
    layer = model.model.layers[0].mlp.up_proj
    own = Format(levels="nf", bits=3, group_size=64)
    storage = Storage(scales="fp32", offsets="absent")
    layout = Layout(format=own, storage=storage, out=96, columns=64)
    layer.quant_weight = Nearest()(layer.quant_weight.dequantize(), layout)
    adopt(model, left=base_config(model).left, made={})
    for rounding, batches in ((Nearest(), []), (GPTQ(), [torch.randint(3, 96, (4, 32))])):
        merged, _ = merge(adapted(model, LoRA()), requantize=rounding, batches=batches)
        layouts = {name: (weight.format, weight.layout.storage) for name, weight in weights(merged).items()}
        assert layouts.pop("model.layers.0.mlp.up_proj") == (own, storage)
        assert set(layouts.values()) == {(Format(bits=4), Storage())}


def test_requantizing_merged_offsets_lands_near_them(base: nn.Module) -> None:
    """Codes are found anew; still the model is closer to the adapted one than a random guess."""
    model = adapted(base, LoRA(), size=0.2)
    _, certificate, _, _ = measured(model, requantize=Nearest())
    assert 0.01 < certificate.effect_lost < 1.0


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_lora_is_refused_with_advice_and_the_model_goes_on(base: nn.Module) -> None:
    model = adapted(base, LoRA())
    before = logits(model)
    with pytest.raises(MergeError, match=r"model\.layers\.0\.self_attn\.q_proj: .*export --format lora.*--requantize"):
        merge(model)
    assert torch.equal(logits(model), before)
    assert len(adapted_layers(model)) == 14


def test_a_bias_of_an_adapter_is_refused(base: nn.Module) -> None:
    config = lora_config(Pooled(form="side"), rank=4, alpha=8)
    config.lora_bias = True
    model = get_peft_model(copy.deepcopy(base), config)
    with pytest.raises(MergeError, match="'default' has a bias"):
        merge(model)


def test_a_model_without_adapters_is_refused(base: nn.Module) -> None:
    with pytest.raises(MergeError, match="no adapter over a quantized layer"):
        merge(copy.deepcopy(base))


def test_an_adapter_that_diverged_is_refused(base: nn.Module) -> None:
    model = adapted(base, Pooled())
    adapted_layers(model)["model.layers.0.mlp.up_proj"].lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="Training diverged"):
        merge(model)


def test_an_adapter_over_another_base_is_refused_by_its_fingerprint(
    base: nn.Module, tmp_path: Path, quantized_llama: Callable[..., Any]
) -> None:
    adapted(base, Pooled()).save_pretrained(tmp_path)
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    other = quantized_llama(Format(bits=3, group_size=32), seed=1)
    with pytest.raises(CheckpointError, match=r"trained over another base.*--base"):
        PeftModel.from_pretrained(other, tmp_path)
    merged, _ = merge(adapted(base, Pooled()))
    with pytest.raises(CheckpointError, match="trained over another base"):
        PeftModel.from_pretrained(merged, tmp_path)  # merging twice


def test_merging_says_nothing_that_worries(
    base: nn.Module, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    with caplog.at_level(logging.WARNING):
        merge(adapted(base, Pooled()))
    assert not [record for record in caplog.records if record.name.startswith("quadapt")]
    ours = Path(quadapt.__file__).parent
    assert not [warning for warning in recwarn if Path(warning.filename).is_relative_to(ours)]
