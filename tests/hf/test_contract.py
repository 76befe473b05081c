"""One table for all methods: what each promises, whatever its grid, start and adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from quadapt import merge, prepare
from quadapt.errors import MergeError
from quadapt.methods import METHODS, method_named

IDS = torch.arange(2, 50).view(2, 24)
TEXT = list(torch.randint(3, 96, (16, 32), generator=torch.Generator().manual_seed(5)).split(4))
MORE: dict[str, dict[str, Any]] = {"code-lora": {"init_scale": 2000.0}}  # no code moves in a step otherwise
STARTS = [(name, start) for name in ("gptq-lora", "qa-lora", "ir-qlora") for start in ("loftq", "lq", "quailora")]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model: PeftModel) -> None:
    """One step along the gradient, and that all which trains gets one."""
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert wanted
    for name, parameter in wanted.items():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
    for parameter in wanted.values():
        size = float(parameter.grad.norm()) if parameter.grad is not None else 0.0
        if size:
            parameter.data -= 0.05 * max(1.0, float(parameter.norm())) / size * parameter.grad
        else:  # the factor before one that is zero
            parameter.data += 0.01
    model.eval()


CASES = [
    *((name, start, bits) for name, start in [*((name, None) for name in METHODS), *STARTS] for bits in (2, 4)),
    *((name, None, (5, 6)[at % 2]) for at, name in enumerate(METHODS) if method_named(name).format.levels == "int"),
]
"""Integers of 5 and 6 bits too, by turns; there is no NormalFloat of so many."""


@pytest.mark.parametrize(("method", "start", "bits"), CASES)
def test_every_method(
    method: str, start: str | None, bits: int, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"rank": 4, "alpha": 4, "dropout": 0.0, "calibration": TEXT, "bits": bits, "start": start}
    settings |= MORE.get(method, {})
    model = prepare(tiny_llama(initializer_range=0.1), method=method, **settings)
    base = copy.deepcopy(model.eval()).unload()
    adapter, first = method_named(method).adapter, logits(model)

    trained(model)
    adapted = logits(model)
    assert bool(torch.isfinite(adapted).all())
    assert not torch.equal(adapted, first)

    model.save_pretrained(str(tmp_path))  # PEFT's own saving and loading
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(logits(again), adapted)
    if adapter.base == "codes" and adapter.exactness != "exact":
        with again.disable_adapter():  # the model from before training
            torch.testing.assert_close(logits(again), first, rtol=1e-5, atol=1e-5)

    if adapter.exactness == "none":
        with pytest.raises(MergeError):
            merge(copy.deepcopy(model))
        merged, certificate = merge(model, requantize=True)
        assert certificate.verdict == "lossy"
        assert bool(torch.isfinite(logits(merged)).all())
    else:
        merged, certificate = merge(model)
        assert certificate.verdict == "exact"
        assert torch.equal(logits(merged), adapted)
