"""Folders of torchao, made by transformers and torchao, beside the library's own dequantization."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quadapt
from quadapt.errors import CheckpointError
from quadapt.importers.torchao import TorchAO
from quadapt.model.quantize import quantized_layers

pytest.importorskip("torchao")
from torchao import quantization as ao
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType, dequantize_affine

ASYMMETRIC = MappingType.ASYMMETRIC
CASES: dict[str, tuple[Callable[[], Any], int, torch.dtype]] = {
    f"int{bits}, {kind.name.lower()}, {'rows' if granularity is PerAxis else 'groups'}": (
        lambda bits=bits, kind=kind, granularity=granularity: ao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=granularity(0) if granularity is PerAxis else granularity(32),
            mapping_type=kind,
        ),
        bits,
        torch.bfloat16,
    )
    for bits, kind, granularity in [
        (2, MappingType.SYMMETRIC, PerGroup),
        (3, ASYMMETRIC, PerAxis),
        (4, MappingType.SYMMETRIC, PerGroup),
        (4, ASYMMETRIC, PerGroup),
        (5, ASYMMETRIC, PerGroup),
        (6, MappingType.SYMMETRIC, PerAxis),
        (8, ASYMMETRIC, PerGroup),
    ]
}
CASES["int4 of a model in float32"] = (
    lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=ASYMMETRIC),
    4,
    torch.float32,
)
CASES["Int8WeightOnly"] = (ao.Int8WeightOnlyConfig, 8, torch.bfloat16)


@pytest.fixture
def made(tmp_path: Path, foreign: Callable[..., nn.Module]) -> Callable[..., tuple[Path, nn.Module, nn.Module]]:
    """`made(config, dtype)`: a folder, torchao's model of it, and the dense one, float32, still without its weights."""

    def make(config: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, nn.Module, nn.Module]:
        from transformers import AutoModelForCausalLM, TorchAoConfig

        source, folder = tmp_path / "dense", tmp_path / "ao"
        dense = foreign(source, lambda *_: None, None)
        how = TorchAoConfig(config)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=how, dtype=dtype)
        model.save_pretrained(folder)
        for file in source.glob("*token*"):
            shutil.copy(file, folder)
        kept = model.state_dict()
        for name, parameter in dense.named_parameters():
            if not name.endswith("_proj.weight"):
                parameter.data = kept[name].float()
        return folder, model, dense

    return make


@pytest.mark.parametrize(("config", "bits", "dtype"), CASES.values(), ids=CASES)
def test_weights_are_those_of_the_library_and_so_are_logits(
    config: Callable[[], Any], bits: int, dtype: torch.dtype, made: Callable[..., Any]
) -> None:
    folder, theirs, dense = made(config(), dtype)
    model, _ = quadapt.load(str(folder), dtype="float32")
    layers = quantized_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        weight, other = layer.quant_weight, theirs.get_submodule(name).weight
        want = dequantize_affine(other.qdata, other.block_size, other.scale, other.zero_point, torch.int8)
        if other.scale.dtype == torch.float32:
            steps = (weight.dequantize() - want).abs() / weight.scales.repeat_interleave(other.block_size[1], 1)
            assert float(steps.max()) < (2**-14 if bits == 8 else 2**-18), name
        else:
            assert torch.equal(weight.dequantize(), want), name
            assert torch.equal(weight.dequantize(torch.bfloat16), other.dequantize()), name
        assert layer.layout.format.bits == bits
        assert layer.layout.format.zero == ("integer" if bool((other.zero_point != 0).any()) else "none")
        dense.get_submodule(name).weight.data = want
    ids = torch.arange(40).view(2, 20)
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)


def intx(**changes: Any) -> dict[str, Any]:
    settings = {
        "weight_dtype": {"_data": "int4", "_type": "torch.dtype"},
        "intx_packing_format": {"_data": "UNPACKED_TO_INT8", "_type": "IntxPackingFormat"},
    }
    return {"default": {"_type": "IntxWeightOnlyConfig", "_data": settings | changes}}


@pytest.mark.parametrize(
    ("quant_type", "words"),
    [
        ({"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}, "Int4WeightOnlyConfig is not read"),
        ({"default": {"_type": "Float8WeightOnlyConfig", "_data": {}}}, "Float8WeightOnlyConfig is not read"),
        ({"default": {"_type": "FqnToConfig", "_data": {}}}, "FqnToConfig is not read"),
        ("int4_weight_only", "settings of one kind for all layers, written as safetensors"),
        (intx(weight_dtype={"_data": "int7"}), "Input should be 2, 3, 4, 5, 6 or 8"),
        (intx(intx_packing_format={"_data": "OPAQUE_ATEN_KLEIDIAI"}), "packed as OPAQUE_ATEN_KLEIDIAI"),
    ],
)
def test_what_cannot_be_read_is_named(quant_type: Any, words: str, made: Callable[..., Any]) -> None:
    folder, _, _ = made(CASES["int4, symmetric, groups"][0]())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_type"] = quant_type
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"quant_type=.* of a checkpoint by torchao .*{words}.* give the dense"):
        quadapt.load(str(folder))


def test_what_contradicts_itself_is_refused() -> None:
    parts = {"_weight_qdata": torch.full((16, 64), 8, dtype=torch.int8), "_weight_scale": torch.ones(16, 2)}
    importer = TorchAO.of({"quant_type": intx()})
    layout = importer.layout(parts, 16, 64)
    with pytest.raises(CheckpointError, match="has codes of more than 4 bits"):
        importer.weight(parts, layout)
    parts["_weight_zero_point"] = torch.full((16, 2), -9, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="_weight_zero_point: lies outside of 4 bits"):
        importer.layout(parts, 16, 64)
    with pytest.raises(CheckpointError, match="_weight_act_pre_scale: scales inputs"):
        importer.layout(parts | {"_weight_act_pre_scale": torch.ones(64)}, 16, 64)
