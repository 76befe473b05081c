"""LoRA-FA: `A` stays, `B` trains, nothing of the size of the inputs is kept, and the pooled one merges exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import lora_fa_numpy, qa_lora_numpy

import quadapt
from quadapt.nn.adapters import ADAPTERS
from quadapt.quant.format import Format

TOKENS, OUT, IN, RANK, SCALING = 40, 24, 96, 4, 0.5
IDS = torch.arange(2, 34)[None]


@pytest.mark.parametrize("kind", ["lora-fa", "pooled-fa"])
def test_the_gradient_comes_from_what_is_kept_and_that_is_small(kind: str, quant_weight: Callable[..., Any]) -> None:
    weight, adapter = quant_weight(Format(bits=4), OUT, IN), ADAPTERS[kind]()
    about = adapter.params(weight.layout, RANK)
    assert {name: param.trains for name, param in about.items()} == {"A": False, "B": True}
    params = {name: torch.nn.Parameter(0.1 * torch.randn(each.shape), each.trains) for name, each in about.items()}
    x, dy, sizes = torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT), []
    known = {tensor.untyped_storage().data_ptr() for tensor in (*params.values(), *weight.tensors.values())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = adapter.forward(x, weight, params, SCALING)
    assert sum(sizes) <= TOKENS * RANK
    y.backward(dy)
    seen = x.double().numpy()
    if kind == "pooled-fa":
        seen = seen @ qa_lora_numpy.pooling(IN, 32).T
    kept = lora_fa_numpy.kept(seen, params["A"].detach().double().numpy())
    want = lora_fa_numpy.gradient(dy.double().numpy(), kept, SCALING)
    torch.testing.assert_close(params["B"].grad.double(), torch.from_numpy(want), rtol=1e-4, atol=1e-4)
    assert params["A"].grad is None


@pytest.mark.parametrize("method", ["lora-fa", "qa-lora-fa"])
def test_it_tunes_is_saved_and_merges_as_it_promises(
    method: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    about = {"rounding": "nearest", "group_size": 32, "rank": 4, "alpha": 8, "dropout": 0.0}
    model = quadapt.prepare(tiny_llama(), method=method, **about)
    before = {name: tensor.clone() for name, tensor in model.named_parameters() if "lora_" in name}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in model.named_parameters() if name in before and not tensor.equal(before[name])}
    assert moved
    assert all("lora_B" in name for name in moved)
    model.eval()
    trained = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    assert sum("lora_A" in name for name in before) == len(moved)
    merged, certificate = quadapt.merge(model, requantize=method == "lora-fa")
    assert certificate.verdict == ("lossy" if method == "lora-fa" else "exact")
    if method == "qa-lora-fa":
        assert torch.equal(merged(input_ids=IDS).logits, trained)
