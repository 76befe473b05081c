"""GPTQ folders: the numbers of the file, the logits of the matrices that they mean, and tuning over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.gptq_pack_numpy import quantized, read, write
from torch import nn

import quadapt
from quadapt.errors import CheckpointError
from quadapt.model.quantize import quantized_layers

CASES = {
    "4 bits, version 1": {"bits": 4, "group_size": 32, "sym": True},
    "4 bits, zero-points": {"bits": 4, "group_size": 32, "sym": False},
    "4 bits, act-order": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    "version 2": {"bits": 4, "group_size": 32, "sym": False, "version": 2},
    "3 bits": {"bits": 3, "group_size": 32, "sym": False},
    "3 bits, act-order, version 2": {"bits": 3, "group_size": 16, "sym": False, "desc_act": True, "version": 2},
    "2 bits": {"bits": 2, "group_size": 16, "sym": False},
    "8 bits": {"bits": 8, "group_size": 32, "sym": True},
    "8 bits, whole rows": {"bits": 8, "group_size": -1, "sym": False, "version": 2},
    "whole rows, act-order": {"bits": 4, "group_size": -1, "sym": True, "desc_act": True},
    "a short group": {"bits": 4, "group_size": 64, "sym": False},
}


def packer(bits: int, group_size: int, *, sym: bool, desc_act: bool = False, version: int = 1) -> Callable[..., Any]:
    """What packs a layer; the head stays dense."""

    def pack(name: str, W: np.ndarray) -> Any:
        if name == "lm_head":
            return None
        parts = write(
            quantized(W, bits, group_size, symmetric=sym, act_order=desc_act and group_size != -1), bits, version
        )
        return parts, read(parts, bits, version)

    return pack


def about(bits: int, group_size: int, *, sym: bool, desc_act: bool = False, version: int = 1) -> dict[str, Any]:
    """What the folder says about itself."""
    form = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act, **form}


@pytest.fixture
def made(tmp_path: Path, foreign: Callable[..., nn.Module]) -> Callable[..., tuple[Path, nn.Module]]:
    """`made(**case)`: a folder, and the dense model that it means."""

    def make(**case: Any) -> tuple[Path, nn.Module]:
        changes = case.pop("changes", {})
        return tmp_path / "gptq", foreign(tmp_path / "gptq", packer(**case), about(**case), **changes)

    return make


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_are_those_of_the_file_and_so_are_logits(case: dict[str, Any], made: Callable[..., Any]) -> None:
    folder, dense = made(**case)
    model, _ = quadapt.load(folder, dtype="float32")
    layers = quantized_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.quant_weight.dequantize(), dense.get_submodule(name).weight), name
        assert layer.layout.format.bits == case["bits"]
        assert layer.layout.permuted == (case.get("desc_act", False) and case["group_size"] != -1), name
    ids = torch.arange(40).view(2, 20)
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)


def test_shards_pickles_tied_heads_and_biases(made: Callable[..., Any]) -> None:
    from safetensors.torch import load_file, save_file

    case = CASES["4 bits, act-order"]
    folder, dense = made(**case, changes={"tie_word_embeddings": True, "attention_bias": True})
    state = load_file(folder / "model.safetensors")
    state |= {f"model.layers.{at}.mlp.down_proj.bias": torch.zeros(64).half() for at in range(2)}  # as AutoGPTQ did
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    shards = {f"model-0000{at + 1}-of-00003.safetensors": names[at::3] for at in range(3)}
    for shard, part in shards.items():
        save_file({name: state[name] for name in part}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = torch.arange(20).view(1, 20)
    sharded = quadapt.load(folder, dtype="float32")[0]
    assert torch.allclose(sharded(ids).logits, dense(ids).logits, atol=1e-4)
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(quadapt.load(folder, dtype="float32")[0](ids).logits, sharded(ids).logits)
    state["model.layers.0.mlp.down_proj.bias"][3] = 1
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj: has a bias"):
        quadapt.load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 8}, "holds codes of 4 bits, and quantization_config says bits=8"),
        ({"bits": 5}, "bits=5 of a checkpoint by gptq is not understood"),
        ({"group_size": 16}, "has 3 groups for 96 inputs, and group_size=16"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' of a checkpoint by gptq"),
    ],
)
def test_what_the_folder_says_wrongly_is_named(changes: dict[str, Any], words: str, made: Callable[..., Any]) -> None:
    folder, _ = made(**CASES["4 bits, version 1"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        quadapt.load(folder)


def test_what_the_folder_does_not_say_is_read_off_its_tensors(made: Callable[..., Any]) -> None:
    folder, dense = made(**CASES["3 bits"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.arange(20).view(1, 20)
    first = quadapt.load(folder, dtype="float32")[0](ids).logits
    assert torch.allclose(first, dense(ids).logits, atol=1e-4)
    del config["quantization_config"]  # as AutoGPTQ wrote it at first
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 3, "group_size": 32, "desc_act": False}))
    assert torch.equal(quadapt.load(folder, dtype="float32")[0](ids).logits, first)


def test_a_zero_point_that_is_stored_as_the_largest_code_is_one_more_in_version_1() -> None:
    """Zero less one wraps to 15; readers of version 1 add one to it without a mask, and so do we."""
    case = {"bits": 4, "group_size": 32, "sym": False}
    parts = quantized(np.abs(np.random.default_rng(0).normal(size=(64, 64))), 4, 32, symmetric=False, act_order=False)
    assert (parts["zeros"] == 0).all()
    from quadapt.importers.gptq import GPTQ

    tensors = {name: torch.from_numpy(each) for name, each in write(parts, 4, 1).items()}
    importer = GPTQ.of(about(**case))
    layout = importer.layout(tensors, 64, 64)
    weight = importer.weight(tensors, layout)
    assert set(weight.tensors["offsets"].flatten().tolist()) == {16}
    assert np.array_equal(weight.dequantize().double().numpy(), read({k: v.numpy() for k, v in tensors.items()}, 4, 1))


@pytest.mark.parametrize("wide", [512, 1024])
def test_wide_groups_are_held_as_several_with_one_scale(wide: int) -> None:
    from quadapt.importers.gptq import GPTQ

    W = np.random.default_rng(0).normal(size=(32, 1280))
    for act_order in (False, True):
        parts = write(quantized(W, 4, wide, symmetric=False, act_order=act_order), 4, 2)
        tensors = {name: torch.from_numpy(each) for name, each in parts.items()}
        importer = GPTQ.of({"bits": 4, "group_size": wide, "checkpoint_format": "gptq_v2"})
        layout = importer.layout(tensors, 32, 1280)
        assert layout.format.group_size == 256
        assert layout.groups == 5
        assert np.array_equal(importer.weight(tensors, layout).dequantize().double().numpy(), read(parts, 4, 2))
