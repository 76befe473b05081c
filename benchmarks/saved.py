"""Bytes that one adapted layer keeps for backward, beyond its own parameters.

Limit: no tensor of a weight's size. The dense weight is never among them; a pooled adapter keeps its inputs summed over
groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.measure import store, table
from quadapt.hf.peft_layer import lora_config
from quadapt.nn.adapters import Adapter, LoRA, Pooled
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout

OUT, IN, TOKENS = 2816, 1024, 512


def saved_by(model: nn.Module, x: torch.Tensor) -> list[int]:
    """Sizes of the tensors kept for backward that are neither parameters nor the inputs themselves."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), x]}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return sorted(sizes.values(), reverse=True)


def quantized(format: Format) -> nn.Module:
    """A model of one quantized layer."""
    layout = Layout(format=format, storage=Storage.default(format), out=OUT, columns=IN)
    return nn.Sequential(QuantLinear.of(Nearest()(torch.randn(OUT, IN), layout)))


def ours(adapter: Adapter) -> LoraConfig:
    """PEFT's config of one of our adapters, for a model that is no language model."""
    return replace(lora_config(adapter, rank=16, alpha=16, target_modules=["0"]), task_type=None)


def main() -> dict[str, Any]:
    """Measure, print and store."""
    x = torch.randn(1, TOKENS, IN, dtype=torch.bfloat16, requires_grad=True)
    stock = LoraConfig(r=16, target_modules=["0"])
    candidates = {
        "QA-LoRA int4": get_peft_model(quantized(Format()), ours(Pooled())),
        "QLoRA nf4": get_peft_model(quantized(Format(levels="nf", group_size=64)), ours(LoRA())),
        "PEFT LoRA, bf16": get_peft_model(nn.Sequential(nn.Linear(IN, OUT, bias=False).to(torch.bfloat16)), stock),
    }
    weight = OUT * IN * 2
    rows = [
        (name, sum(sizes), max(sizes, default=0) / weight)
        for name, model in candidates.items()
        for sizes in [saved_by(model, x)]
    ]
    table(
        f"kept for backward by a {OUT} x {IN} layer, {TOKENS} tokens (inputs and parameters not counted)",
        ("layer", "bytes", "largest, of a bf16 weight"),
        rows,
    )
    figures = {
        "limit": "no tensor of a weight's size",
        "rows": [{"layer": name, "bytes": size, "largest_of_weight": part} for name, size, part in rows],
    }
    store("saved", figures)
    return figures
