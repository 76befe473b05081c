"""MLX folders: the numbers of the file, and those that MLX itself dequantizes, where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.mlx_pack_numpy import looked_up, read, write
from torch import nn

import quadapt
from quadapt.errors import CheckpointError
from quadapt.hf.loading import load_model
from quadapt.importers.mlx import MLX
from quadapt.model.quantize import quantized_layers

EMBEDDING = "model.embed_tokens"


def packer(bits: int, group_size: int, **single: tuple[int, int]) -> Callable[..., Any]:
    """What packs a layer; `down_proj=(8, 32)` sets another width and group for some."""

    def pack(name: str, W: np.ndarray) -> Any:
        width, size = single.get(name.rpartition(".")[2], (bits, group_size))
        parts = write(W, width, size)
        return parts, looked_up(parts, width, size) if name == EMBEDDING else read(parts, width, size)

    return pack


@pytest.fixture
def made(tmp_path: Path, foreign: Callable[..., nn.Module]) -> Callable[..., tuple[Path, nn.Module]]:
    """`made(bits, group_size)`: a folder whose layers are all quantized, and the dense model that it means."""

    def make(bits: int, group_size: int, *, field: str = "quantization", **changes: Any) -> tuple[Path, nn.Module]:
        about = {"group_size": group_size, "bits": bits, "mode": "affine"}
        sizes = {"intermediate_size": 128, **changes}
        dense = foreign(tmp_path / "mlx", packer(bits, group_size), about, field=field, embeddings=True, **sizes)
        return tmp_path / "mlx", dense

    return make


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights_are_those_of_the_file_and_so_are_logits(bits: int, made: Callable[..., Any]) -> None:
    folder, dense = made(bits, 32)
    model, _ = quadapt.load(folder, dtype="float32")
    layers = quantized_layers(model)
    assert len(layers) == 15  # the head too
    for name, layer in layers.items():
        assert torch.equal(layer.quant_weight.dequantize(), dense.get_submodule(name).weight), name
        assert layer.layout.name == f"int{bits}-g32"
        assert layer.layout.storage.scales == layer.layout.storage.offsets == "fp16"
    embedding: Any = model.get_submodule(EMBEDDING)
    assert torch.equal(embedding.weight, dense.get_submodule(EMBEDDING).weight)
    ids = torch.arange(40).view(2, 20)
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)


def test_a_tied_head_is_dense_like_its_embedding(tmp_path: Path, foreign: Callable[..., nn.Module]) -> None:
    def pack(name: str, W: np.ndarray) -> Any:
        return None if name == "lm_head" else packer(4, 64)(name, W)

    about = {"group_size": 64, "bits": 4}
    sizes = {"intermediate_size": 128, "tie_word_embeddings": True}
    dense = foreign(tmp_path / "mlx", pack, about, field="quantization_config", embeddings=True, **sizes)
    model: Any = quadapt.load(tmp_path / "mlx", dtype="float32")[0]
    assert len(quantized_layers(model)) == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight
    why = "embedding, quantized in the checkpoint and held as its numbers"
    assert model.config.quantization_config.left[EMBEDDING] == why
    ids = torch.arange(20).view(1, 20)
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)
    assert quadapt.load(tmp_path / "mlx")[0].get_submodule(EMBEDDING).weight.dtype == torch.float16  # as stored


def test_nothing_of_the_format_stays_in_the_configuration(made: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = made(4, 32)
    model: Any = quadapt.load(folder)[0]
    assert not hasattr(model.config, "quantization")
    assert (
        load_model(str(folder), device="meta").config.quantization_config.left == model.config.quantization_config.left
    )
    model.save_pretrained(tmp_path / "ours")
    ours = quantized_layers(load_model(str(tmp_path / "ours")))
    for name, layer in quantized_layers(model).items():
        assert ours[name].quant_weight.digest() == layer.quant_weight.digest()


def test_layers_with_settings_of_their_own(tmp_path: Path, foreign: Callable[..., nn.Module]) -> None:
    about = {"group_size": 64, "bits": 4, "lm_head": {"group_size": 32, "bits": 8}, "model.norm": False}
    pack = packer(4, 64, lm_head=(8, 32))
    dense = foreign(tmp_path / "mlx", pack, about, field="quantization", embeddings=True, intermediate_size=128)
    layers = quantized_layers(quadapt.load(tmp_path / "mlx", dtype="float32")[0])
    assert layers["lm_head"].layout.name == "int8-g32"
    for name, layer in layers.items():
        assert torch.equal(layer.quant_weight.dequantize(), dense.get_submodule(name).weight), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_itself_means_the_same_numbers(bits: int, dtype: str) -> None:
    mx = pytest.importorskip("mlx.core", reason="needs mlx (pip install mlx[cpu])")
    mx.set_default_device(mx.cpu)
    kind: Any = getattr(mx, dtype)
    W = mx.array(np.random.default_rng(bits).normal(size=(48, 128)).astype(np.float32)).astype(kind)
    packed = dict(zip(("weight", "scales", "biases"), mx.quantize(W, group_size=32, bits=bits), strict=True))

    def meant(as_kind: Any) -> torch.Tensor:
        scales, biases = packed["scales"].astype(as_kind), packed["biases"].astype(as_kind)
        found = mx.dequantize(packed["weight"], scales, biases, group_size=32, bits=bits)
        return torch.from_numpy(np.array(found.astype(mx.float32)))

    floats = {name: np.array(packed[name].astype(mx.float32)) for name in ("scales", "biases")}
    parts = {name: torch.from_numpy(each).to(getattr(torch, dtype)) for name, each in floats.items()}
    parts["weight"] = torch.from_numpy(np.array(packed["weight"]))
    importer = MLX.of({"group_size": 32, "bits": bits})
    layout = importer.layout(parts, 48, 128)
    assert torch.equal(importer.weight(parts, layout).dequantize(), meant(mx.float32))
    assert torch.equal(importer.dense(parts, 48, 128).float(), meant(kind))
    assert layout.storage.scales == ("fp16" if dtype == "float16" else "fp32")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 8}, "holds codes of 4 bits, and config.json says bits=8"),
        ({"bits": 7}, "bits=7 of a checkpoint by mlx is not understood"),
        ({"group_size": 16}, "has 4 groups for 128 inputs, and group_size=16|has 2 groups for 64 inputs"),
        ({"mode": "mxfp4"}, "mode='mxfp4' of a checkpoint by mlx is not understood.*give the dense model"),
    ],
)
def test_what_the_folder_says_wrongly_is_named(changes: dict[str, Any], words: str, made: Callable[..., Any]) -> None:
    folder, _ = made(4, 32)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        quadapt.load(folder)
