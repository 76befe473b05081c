"""Folders that version 0.1.0 wrote (`tests/fixtures`) load, compute and merge as they did there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quadapt.hf.merge import merge
from quadapt.hf.quantizer import base_config, content_of, fingerprint_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
SAID = load_file(FIXTURES / "logits.safetensors")
MARKS = json.loads((FIXTURES / "fingerprints.json").read_text())
ADAPTERS = sorted(folder.name for folder in (FIXTURES / "adapters").iterdir())
IDS = torch.arange(2, 12).view(1, 10)
adapters = pytest.mark.parametrize("name", ADAPTERS)


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(FIXTURES / folder, dtype=torch.float32).eval()


def base_of(name: str) -> Any:
    config = json.loads((FIXTURES / "adapters" / name / "adapter_config.json").read_text())
    return load(f"bases/{config['base_model_name_or_path']}")


def check(model: nn.Module, name: str) -> None:
    """Logits are within 1e-6, where an adapter changes them by far more."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    torch.testing.assert_close(found, SAID[name], rtol=0, atol=1e-6)


def test_every_kind_of_adapter_is_there() -> None:
    configs = [json.loads((FIXTURES / "adapters" / name / "adapter_config.json").read_text()) for name in ADAPTERS]
    kinds = {config["auto_mapping"]["quadapt"]["kind"] for config in configs}
    assert kinds == {"lora", "pooled", "elastic", "elastic-pooled", "scales", "l4q", "qat-lora", "lr-qat"}


def test_the_comparison_would_notice_an_adapter_that_is_left_out() -> None:
    for name in ADAPTERS:
        config = json.loads((FIXTURES / "adapters" / name / "adapter_config.json").read_text())
        assert float((SAID[name] - SAID[config["base_model_name_or_path"]]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["dense", "int4", "nf4", "fixed-point"])
def test_a_base_loads(name: str) -> None:
    model = load(f"bases/{name}")
    check(model, name)
    if name == "dense":
        assert fingerprint_of(model) == MARKS[name]
    else:
        assert base_config(model).fingerprint == content_of(model) == MARKS[name]


def test_a_merged_model_loads() -> None:
    model = load("merged")
    check(model, "pooled.merged")
    assert base_config(model).fingerprint == content_of(model) == MARKS["pooled.merged"]


@adapters
def test_an_adapter_loads_through_peft_and_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    folder = FIXTURES / "adapters" / name
    model = PeftModel.from_pretrained(base_of(name), folder).eval()
    check(model, name)
    if f"{name}.off" in SAID:
        with model.disable_adapter():
            check(model, f"{name}.off")
    model.save_pretrained(str(tmp_path))
    old, new = (load_file(each / "adapter_model.safetensors") for each in (folder, tmp_path))
    assert {key: (value.shape, value.dtype) for key, value in old.items()} == {
        key: (value.shape, value.dtype) for key, value in new.items()
    }
    assert all(torch.equal(old[key], new[key]) for key in old)
    configs = [json.loads((each / "adapter_config.json").read_text()) for each in (folder, tmp_path)]
    assert configs[0]["auto_mapping"] == configs[1]["auto_mapping"]


@adapters
def test_an_adapter_loads_through_transformers(name: str) -> None:
    model = base_of(name)
    model.load_adapter(str(FIXTURES / "adapters" / name))
    check(model.eval(), name)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if f"{name}.merged" in MARKS])
def test_an_adapter_merges_to_the_same_bytes(name: str) -> None:
    merged, certificate = merge(PeftModel.from_pretrained(base_of(name), FIXTURES / "adapters" / name))
    assert certificate.verdict == ("equivalent" if name == "pooled-side" else "exact")
    assert content_of(merged) == MARKS[f"{name}.merged"]
    check(merged, f"{name}.merged")
