"""QAT-LoRA's two parts: what its quantizer gives as the base in a GGUF file, and its branch as a LoRA beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import logits, tiny

from quadapt import prepare
from quadapt.exporters.gguf import export_gguf
from quadapt.exporters.gguf_lora import export_gguf_lora
from quadapt.exporters.llama_cpp import differences
from quadapt.hf.peft_layer import adapted_layers
from quadapt.hf.settled import settle_quantizers
from quadapt.hf.trained import parts_of
from quadapt.methods.l4q import qat_lora
from quadapt.model.quantize import quantized_layers

IDS = torch.randint(2, 300, (60,), generator=torch.Generator().manual_seed(3)).tolist()


def trained(**settings: Any) -> Any:
    """A model that has made some steps, so that scales, offsets and the branch have all moved."""
    model = tiny(hidden_size=256, intermediate_size=512, num_hidden_layers=1, initializer_range=0.05)
    model = prepare(model, method=qat_lora(bits=4).having(group_size=32, rank=4, **settings))
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    for _ in range(4):
        model.train()(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("zero", ["float", "integer", "none"])
def test_the_model_computes_the_same(zero: str) -> None:
    model = trained(zero=zero)
    before = logits(model, IDS)
    settle_quantizers(model)
    assert len(quantized_layers(model)) == len(adapted_layers(model)) == 7
    assert parts_of(model) == []
    names = {name.rpartition(".lora_")[2].split(".")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert names == {"A", "B"}
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-4)
    settle_quantizers(model)  # nothing is left to do
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-4)


def test_llama_cpp_serves_the_two(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (pip install 'quadapt[demo]')")
    model, base, lora = trained(), tmp_path / "base.gguf", tmp_path / "lora.gguf"
    twin = trained()
    settle_quantizers(model)
    export_gguf_lora(model, lora)
    report = export_gguf(model.unload(), tokenizer, base)
    assert {row.type for row in report.tensors if row.linear} == {"Q4_1"}
    apart, without = differences(base, twin, IDS, lora=lora), differences(base, twin, IDS)
    print(f"with the adapter {apart.max():.3f} at most, {apart.mean():.4f} on average; without it {without.max():.2f}")
    assert apart.max() < 0.3
    assert apart.mean() < 0.04
    assert without.mean() > 2 * apart.mean()
