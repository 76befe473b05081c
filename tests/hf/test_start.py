"""An adapter that starts from more than zero, through PEFT: at first, trained, switched off, loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from quadapt import prepare
from quadapt.errors import ConfigError
from quadapt.hf.peft_layer import adapted_layers, lora_config
from quadapt.hf.start import read_start, set_start, write_start
from quadapt.nn.adapters import LoRA
from quadapt.quant.format import Format

IDS = torch.arange(2, 42).view(2, 20)
RANK = 4


@pytest.fixture(scope="module")
def base(quantized_llama: Callable[..., Any]) -> Any:
    return quantized_llama(Format(levels="nf", bits=4, group_size=64))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def begun(
    base: nn.Module, alpha: float = 8, *, train_start: bool = True
) -> tuple[PeftModel, dict[str, tuple[Tensor, Tensor]]]:
    """A copy of the base with a random start, the same for every alpha."""
    settings = lora_config(LoRA(train_start=train_start), rank=RANK, alpha=alpha, start="quailora")
    model = get_peft_model(copy.deepcopy(base), settings).eval()
    random = torch.Generator().manual_seed(3)
    factors = {
        name: (
            0.1 * torch.randn(layer.out_features, RANK, generator=random),
            torch.randn(RANK, layer.in_features, generator=random),
        )
        for name, layer in adapted_layers(model).items()
    }
    set_start(model, factors)
    return model, factors


def train_a_little(model: PeftModel) -> None:
    random = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)


@pytest.mark.parametrize("alpha", [1, 4, 16])
@pytest.mark.parametrize("train_start", [True, False])
def test_the_factors_absorb_the_scaling(train_start: bool, alpha: float, base: nn.Module) -> None:
    model, factors = begun(base, alpha, train_start=train_start)
    for name, layer in adapted_layers(model).items():
        up, down = factors[name]
        torch.testing.assert_close(layer.get_delta_weight("default"), up @ down, rtol=1e-5, atol=1e-6)


both = pytest.mark.parametrize("train_start", [True, False])


@both
def test_switched_off_it_is_the_model_from_before_training(train_start: bool, base: nn.Module) -> None:
    """DPO's reference: not the quantized matrix alone, which never was the model."""
    model, _ = begun(base, train_start=train_start)
    first = logits(model)
    assert not torch.allclose(first, logits(base), atol=1e-2)
    train_a_little(model)
    assert not torch.allclose(first, logits(model), atol=1e-2)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), first, rtol=1e-5, atol=1e-5)


@both
def test_first_factors_do_not_train(train_start: bool, base: nn.Module) -> None:
    model, factors = begun(base, train_start=train_start)
    model.train()
    model.set_adapter("default")
    frozen = {name for name, parameter in model.named_parameters() if ".lora_first_" in name}
    assert len(frozen) == 2 * len(factors)
    assert not any(dict(model.named_parameters())[name].requires_grad for name in frozen)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name
    }


@both
def test_it_comes_back_from_disk_with_its_start(train_start: bool, base: nn.Module, tmp_path: Path) -> None:
    model, _ = begun(base, train_start=train_start)
    first = logits(model)
    train_a_little(model)
    model.save_pretrained(str(tmp_path))
    found = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(logits(found), logits(model))
    with found.disable_adapter():
        torch.testing.assert_close(logits(found), first, rtol=1e-5, atol=1e-5)


def test_factors_wait_on_disk_unchanged(tmp_path: Path) -> None:
    factors = {"a.b": (torch.randn(3, 2), torch.randn(5, 2).T), "c": (torch.randn(1, 2), torch.randn(2, 7))}
    write_start(tmp_path / "start.safetensors", factors)
    found = read_start(tmp_path / "start.safetensors")
    assert set(found) == set(factors)
    for name, pair in factors.items():
        assert all(torch.equal(*both) for both in zip(found[name], pair, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["start.safetensors"]


@pytest.mark.parametrize("start", ["loftq", "quailora", "cloq", "qera"])
def test_from_python(start: str, tiny_llama: Callable[..., Any]) -> None:
    """Nearer to the dense model than the quantized one is, before any step."""
    random = torch.Generator().manual_seed(5)
    text = list(torch.randint(3, 96, (32, 32), generator=random).split(8))
    dense = logits(tiny_llama())
    far = {}
    for each in ("zero", start):
        settings = {"method": "qlora", "bits": 3, "rank": 8, "alpha": 8, "dropout": 0, "start": each}
        model = prepare(tiny_llama(), calibration=text, **settings).eval()
        far[each] = float((logits(model) - dense).norm())
    assert far[start] < far["zero"]


def test_a_pooled_adapters_start_lies_in_the_base(tiny_llama: Callable[..., Any]) -> None:
    text = list(torch.randint(3, 96, (32, 32), generator=torch.Generator().manual_seed(5)).split(8))
    dense = logits(tiny_llama())
    settings = {"method": "qa-lora", "bits": 2, "rank": 2, "rounding": "nearest"}
    plain, begun = (
        prepare(tiny_llama(), calibration=text, start=start, **settings).eval() for start in ("zero", "quailora")
    )
    assert float((logits(begun) - dense).norm()) < float((logits(plain) - dense).norm())
    with begun.disable_adapter():
        off = logits(begun)
    assert torch.equal(off, logits(begun))  # the adapter itself starts at zero
    assert not any("lora_first" in name for name, _ in begun.named_parameters())


def test_refusals(base: nn.Module, tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="start='quailora' fits what quantization changes"):
        prepare(copy.deepcopy(base), method="quailora")
    with pytest.raises(ConfigError, match=r"start='quailora' needs text to calibrate on\. .*, or start='zero'"):
        prepare(tiny_llama(), method="quailora")
    with pytest.raises(ConfigError, match="start='cloq': the scales adapter of method='peqa' has nothing"):
        prepare(tiny_llama(), method="peqa", start="cloq")
    with pytest.raises(ConfigError, match="start='loftq' is folded into float offsets, and these are absent"):
        prepare(tiny_llama(), method="qa-lora", zero="none", start="loftq")
    with pytest.raises(ConfigError, match="start='quailora' fits what rounding changed"):
        prepare(tiny_llama(), method="gptq-lora", rounding="block-ap", start="quailora", calibration=[IDS])


def test_elastic_connections_start_from_a_fit_too(tiny_llama: Callable[..., Any]) -> None:
    """Betas are zero at first, so the factors alone decide."""
    text = list(torch.randint(3, 96, (32, 32), generator=torch.Generator().manual_seed(5)).split(8))
    dense = logits(tiny_llama())
    settings = {"method": "ir-qlora", "bits": 3, "rank": 8, "alpha": 8, "dropout": 0}
    plain, begun = (
        prepare(tiny_llama(), calibration=text, start=start, **settings).eval() for start in ("zero", "quailora")
    )
    assert float((logits(begun) - dense).norm()) < float((logits(plain) - dense).norm())
    first = logits(begun)
    for layer in adapted_layers(begun).values():
        layer.lora_beta["default"].data.fill_(0.5)
    with begun.disable_adapter():
        assert torch.equal(logits(begun), first)
