"""What stock PEFT makes of our adapters, and we of its: with quadapt imported, and in a process without it."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, MissConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model

import quadapt
from quadapt.errors import CheckpointError, ConfigError
from quadapt.hf.adapter_config import AdapterConfig, identity_of
from quadapt.hf.peft_layer import lora_config
from quadapt.hf.quantizer import base_config
from quadapt.methods import METHODS, method_named
from quadapt.quant.format import Format

FORMAT = Format(bits=3, group_size=16)
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(quantized_llama: Callable[..., Any]) -> Any:
    return quantized_llama(FORMAT)


@pytest.fixture(scope="module")
def other(quantized_llama: Callable[..., Any]) -> Any:
    return quantized_llama(FORMAT, seed=5)


# --- adapters of stock PEFT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_stock_lora_trained_over_codes_names_its_base(task: str | None, base: Any, other: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=TARGETS, task_type=task)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    assert type(config) is LoraConfig  # the caller's own is not touched
    found = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(found, AdapterConfig)
    assert identity_of(found) == {"kind": "lora", "base_fingerprint": base_config(base).fingerprint}
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with pytest.raises(CheckpointError, match="another base"):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)


def test_stock_lora_without_identity_loads_and_that_is_said(
    base: Any, tiny_llama: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["auto_mapping"]) == ("LORA", None)  # over a dense model nothing changes
    PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert "names no base" not in caplog.text
    with caplog.at_level(logging.WARNING, "quadapt"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert "names no base" in caplog.text


def test_what_was_quantized_in_memory_is_named_by_no_folder(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    model = quadapt.prepare(str(tmp_path / "dense"), method="qa-lora", rounding="nearest", rank=2, device="cpu")
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None
    with pytest.raises(CheckpointError, match="names no base, since its base was quantized in memory"):
        quadapt.load(tmp_path / "adapter")


@pytest.mark.parametrize(
    "config",
    [
        MissConfig(r=2, target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        VeraConfig(r=2, target_modules=["q_proj"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_tuners_of_peft_are_refused_over_codes_and_taken_off(config: Any, base: Any) -> None:
    model = copy.deepcopy(base)
    with pytest.raises(ConfigError, match=rf"q_proj: is quantized, and {config.peft_type.value} adapters"):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    config.target_modules = {"lm_head"}  # over a layer that is not quantized they are PEFT's own business
    get_peft_model(model, config)


# --- without quadapt --------------------------------------------------------------------------------------------------

STRANGER = """
import sys
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

dense, *adapters = sys.argv[1:]
for adapter in adapters:
    for load in (
        lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), adapter),
        lambda: AutoModelForCausalLM.from_pretrained(dense).load_adapter(adapter),
        lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
    ):
        try:
            load()
            print("loaded", adapter)
        except Exception as error:
            print(type(error).__name__, error)
assert "quadapt" not in sys.modules
"""


def test_a_stranger_cannot_load_any_of_them(
    base: Any, tiny_llama: Callable[..., Any], run_python: Callable[..., str], tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    kinds = {method.adapter.kind: method.adapter for method in map(method_named, METHODS)}
    assert {"lora", "pooled", "elastic", "scales", "l4q", "qat-lora", "lr-qat"} <= set(kinds)
    for kind, adapter in kinds.items():
        config = lora_config(adapter, rank=2, alpha=4, target_modules=TARGETS)
        over = tiny_llama() if adapter.base == "float" else copy.deepcopy(base)
        if adapter.base in ("float", "codes"):
            get_peft_model(over, config).save_pretrained(tmp_path / kind)
    folders = [str(path.parent) for path in tmp_path.glob("*/adapter_config.json")]
    assert len(folders) >= 6
    printed = run_python(STRANGER, str(tmp_path / "dense"), *folders).splitlines()
    assert [line for line in printed if line.startswith("loaded")] == []
    assert len([line for line in printed if "QUADAPT" in line]) == 3 * len(folders)
