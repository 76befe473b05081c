"""Mixtures of experts that others have quantized: each matrix of each expert is read as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import logits_of, tiny_of
from safetensors import safe_open

import quadapt
from quadapt.hf.quantizer import adopt
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage

SIZES = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 264, "bos_token_id": 0, "eos_token_id": 0}


def _quantized(name: str) -> Any:
    more = {} if name == "GPT2" else {"moe_intermediate_size": 64, "pad_token_id": 0, **SIZES}
    model = tiny_of(name, **{**more, "vocab_size": 264, "bos_token_id": 0, "eos_token_id": 0})
    format = Format(bits=4, group_size=32, zero="integer")
    plan = Quantization(format=format, storage=Storage.default(format), rounding=Nearest())
    selection = select(model)
    quantize_model(model, selection.chosen, plan)
    return adopt(model, left=selection.left, made={})


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize(
    ("name", "expert"),
    [("Mixtral", "block_sparse_moe.experts.3.w1"), ("Qwen3Moe", "mlp.experts.3.gate_proj")],
    ids=["Mixtral", "Qwen3Moe"],
)
def test_what_is_written_for_others_has_their_names_and_comes_back(
    name: str, expert: str, format: str, tmp_path: Path
) -> None:
    from tests.cli.commands import byte_tokenizer

    model = _quantized(name)
    quadapt.export(model, byte_tokenizer(), tmp_path / "out", format=format)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert any(each.startswith(f"model.layers.0.{expert}.") for each in names)
    found, _ = quadapt.load(tmp_path / "out", dtype="float32")
    wanted, read = quantized_layers(model), quantized_layers(found)
    assert read.keys() == wanted.keys()
    for path, layer in wanted.items():
        moved = (read[path].quant_weight.dequantize() - layer.quant_weight.dequantize()).abs().max()
        assert moved < 2e-3 * layer.quant_weight.dequantize().abs().max(), path  # scales are held in 16 bits there
    torch.testing.assert_close(logits_of(found), logits_of(model), rtol=0.05, atol=0.05)
