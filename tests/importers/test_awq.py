"""AWQ folders: the numbers of the file, the logits of the matrices that they mean, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.awq_pack_numpy import read, write
from reference.gptq_pack_numpy import quantized
from torch import nn

import quadapt
from quadapt.errors import CheckpointError
from quadapt.model.quantize import quantized_layers

CASES = {
    "zero-points": {"group_size": 32, "symmetric": False},
    "symmetric": {"group_size": 16, "symmetric": True},
    "whole rows": {"group_size": -1, "symmetric": False},
    "a short group": {"group_size": 64, "symmetric": False},
}

ABOUT = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.fixture
def made(tmp_path: Path, foreign: Callable[..., nn.Module]) -> Callable[..., tuple[Path, nn.Module]]:
    """`made(group_size, symmetric, about)`: a folder, and the dense model that it means."""

    def make(group_size: int, about: dict[str, Any] | None, *, symmetric: bool) -> tuple[Path, nn.Module]:
        def pack(name: str, W: np.ndarray) -> Any:
            if name == "lm_head" or name.endswith("layers.1.mlp.up_proj"):
                return None
            parts = write(quantized(W, 4, group_size, symmetric=symmetric, act_order=False))
            return parts, read(parts, group_size)

        return tmp_path / "awq", foreign(tmp_path / "awq", pack, about)

    return make


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_are_those_of_the_file_and_so_are_logits(case: dict[str, Any], made: Callable[..., Any]) -> None:
    left = {"modules_to_not_convert": ["layers.1.mlp.up_proj"]}
    folder, dense = made(about=ABOUT | left | {"group_size": case["group_size"]}, **case)
    model, _ = quadapt.load(folder, dtype="float32")
    layers = quantized_layers(model)
    assert len(layers) == 13
    for name, layer in layers.items():
        assert torch.equal(layer.quant_weight.dequantize(), dense.get_submodule(name).weight), name
        assert layer.layout.format.zero == ("none" if case["symmetric"] else "integer"), name
    ids = torch.arange(40).view(2, 20)
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)


def test_settings_of_earlier_writers_are_read(made: Callable[..., Any]) -> None:
    folder, dense = made(about=None, group_size=32, symmetric=False)
    earlier = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(earlier))
    ids = torch.arange(20).view(1, 20)
    assert torch.allclose(quadapt.load(folder, dtype="float32")[0](ids).logits, dense(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "gemv"}, "version='gemv' of a checkpoint by awq is not understood"),
        ({"version": "gemv_fast"}, "version='gemv_fast' of a checkpoint by awq"),
        ({"version": "marlin"}, "version='marlin' of a checkpoint by awq .* give the dense model"),
        ({"backend": "llm-awq"}, "backend='llm-awq' of a checkpoint by awq"),
        ({"bits": 8}, "bits=8 of a checkpoint by awq"),
        ({"group_size": 16}, "has 3 groups for 96 inputs, and group_size=16"),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], words: str, made: Callable[..., Any]) -> None:
    folder, _ = made(about=ABOUT | changes, group_size=32, symmetric=False)
    with pytest.raises(CheckpointError, match=words):
        quadapt.load(folder)


def test_codes_of_another_layout_are_refused() -> None:
    from quadapt.importers.awq import AWQ

    parts = write(quantized(np.random.default_rng(0).normal(size=(64, 96)), 4, 32, symmetric=False, act_order=False))
    tensors = {name: torch.from_numpy(each) for name, each in parts.items()}
    tensors["qweight"] = tensors["qweight"].reshape(64, 12)  # [out, in / 8], as gemv has them
    with pytest.raises(CheckpointError, match="qweight: is int32 64 x 12, where int32 96 x 8 belongs"):
        AWQ.of({}).layout(tensors, 64, 96)
