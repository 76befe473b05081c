"""Adapters over experts go out as PEFT's own over transformers' stacks: the dense model with one answers the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import FAMILIES, logits_of, tiny_of
from peft import PeftModel
from transformers import AutoModelForCausalLM

import quadapt
from quadapt.errors import ExportError
from quadapt.exporters.dense import export_hf
from quadapt.exporters.lora import export_lora

ALIKE = ("DeepseekV2", "DeepseekV3")
"""Families that PEFT translates, with layers beside the experts that have the names of theirs."""


def _tuned(name: str, **settings: Any) -> Any:
    model = quadapt.prepare(tiny_of(name), method="qlora", rounding="nearest", **{"rank": 2, **settings})
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn_like(parameter)
    return model.eval()


def _dense_with(model: Any, tokenizer: Any, folder: Path) -> Any:
    """Logits of `model`, and of its adapter over its dense base, both as others load them."""
    export_lora(model, folder / "lora")
    wanted = logits_of(model)
    export_hf(model.unload(), tokenizer, folder / "dense", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    before = logits_of(dense.eval())
    found = logits_of(PeftModel.from_pretrained(dense, str(folder / "lora")).eval())
    assert (found - before).abs().max() > 0.01
    return wanted, found


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*ALIKE, "Dbrx")])
def test_over_the_dense_model_it_does_the_same(name: str, tokenizer: Any, tmp_path: Path) -> None:
    wanted, found = _dense_with(_tuned(name), tokenizer, tmp_path)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("targets", [["down_proj"], ["experts.1.up_proj", "experts.3"], ["layers.1"]], ids=str)
def test_experts_without_an_adapter_have_zeros(name: str, targets: list[str], tokenizer: Any, tmp_path: Path) -> None:
    wanted, found = _dense_with(_tuned(name, target_modules=targets), tokenizer, tmp_path)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALIKE)
def test_what_peft_would_mistake_for_experts_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has the name of an expert's layer.*--format hf"):
        export_lora(_tuned(name), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_stacks_without_an_axis_for_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"experts\.mlp\.w1: has no axis for experts.*--format hf"):
        export_lora(_tuned("Dbrx"), tmp_path / "lora")
