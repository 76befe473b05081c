"""One table for all methods: what each promises, whatever its grid, start and adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from quadapt import merge, prepare
from quadapt.errors import ConfigError, MergeError
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


WIDE = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 1}
"""Whole super-blocks in all matrices but `down_proj`, which takes the plain block that llama.cpp takes."""


ONE_GRID = ("ir-qlora",)
"""Methods that refuse rows which are no whole super-blocks: their range shifts groups."""


@pytest.mark.parametrize(("method", "start", "bits"), CASES)
def test_every_method(
    method: str, start: str | None, bits: int, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"bits": bits, "start": start, **MORE.get(method, {})}
    check(method, settings, tiny_llama(initializer_range=0.1), tmp_path)


def in_super_blocks() -> list[tuple[str, int]]:
    """Methods with the widths at which they train over K-quants, by turns; each at one at least."""
    found = []
    for at, name in enumerate(METHODS):
        levels = {} if method_named(name).format.levels == "int" else {"levels": "int"}
        fits = []
        for bits in (4, 6, 2, 3, 5):
            with suppress(ConfigError):
                method_named(name, bits=bits, scales="k-quant", **levels).check()
                fits.append(bits)
        found += [(name, bits) for bits in fits[at % 2 :: 3]]
    return found


@pytest.mark.parametrize(("method", "bits"), in_super_blocks())
def test_every_method_over_k_quants(method: str, bits: int, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    integers = {} if method_named(method).format.levels == "int" else {"levels": "int"}
    settings = {"bits": bits, "scales": "k-quant", **integers, **MORE.get(method, {})}
    if method in ONE_GRID:
        with pytest.raises(ConfigError, match=r"down_proj: .*Use "):
            prepare(tiny_llama(initializer_range=0.05, **WIDE), method=method, calibration=TEXT, **settings)
    sizes = {**WIDE, "intermediate_size": 512} if method in ONE_GRID else WIDE
    check(method, settings, tiny_llama(initializer_range=0.05, **sizes), tmp_path)


def check(method: str, settings: dict[str, Any], dense: nn.Module, tmp_path: Path) -> None:
    """Train a step; save and load; merge as exactly as the adapter promises."""
    settings = {"rank": 4, "alpha": 4, "dropout": 0.0, "calibration": TEXT, **settings}
    model = prepare(dense, method=method, tune_first="none", **settings)
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
