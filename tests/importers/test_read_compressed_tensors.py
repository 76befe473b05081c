"""compressed-tensors' folders: packed by that library, and the weights that it decompresses them to, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

import quadapt
from quadapt.errors import CheckpointError
from quadapt.importers.compressed_tensors import CompressedTensors
from quadapt.model.quantize import quantized_layers
from quadapt.quant.format import Format

CASES = {
    "4 bits": {"num_bits": 4, "group_size": 32, "symmetric": True},
    "4 bits, zero-points": {"num_bits": 4, "group_size": 32, "symmetric": False},
    "4 bits, plain zero-points": {"num_bits": 4, "group_size": 32, "symmetric": False, "plain": True},
    "4 bits, bfloat16": {"num_bits": 4, "group_size": 32, "symmetric": False, "dtype": torch.bfloat16},
    "3 bits, zero-points": {"num_bits": 3, "group_size": 32, "symmetric": False},
    "2 bits, zero-points": {"num_bits": 2, "group_size": 16, "symmetric": False},
    "6 bits": {"num_bits": 6, "group_size": 32, "symmetric": True},
    "8 bits, zero-points": {"num_bits": 8, "group_size": 32, "symmetric": False},
    "whole rows": {"num_bits": 4, "group_size": None, "symmetric": True},
    "8 bits, whole rows": {"num_bits": 8, "group_size": None, "symmetric": False, "dtype": torch.bfloat16},
    "bytes": {"num_bits": 8, "group_size": None, "symmetric": True, "form": "int-quantized"},
    "bytes, zero-points": {"num_bits": 8, "group_size": 32, "symmetric": False, "form": "naive-quantized"},
}


def arguments(num_bits: int, group_size: int | None, *, symmetric: bool, **_: Any) -> dict[str, Any]:
    """What the settings of a group of layers say about their weights."""
    strategy = "channel" if group_size is None else "group"
    return {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": False,
    }


def compress(W: np.ndarray, form: str = "pack-quantized", **case: Any) -> tuple[dict[str, Tensor], np.ndarray]:
    """The tensors of a layer as the library writes them, and the matrix that it reads from them: in float32."""
    args, dtype = QuantizationArgs(**arguments(**case)), case.get("dtype", torch.float16)
    weight, bits = torch.from_numpy(W).float(), case["num_bits"]
    blocks = weight.unflatten(1, (-1, case["group_size"] or weight.shape[1]))
    if case["symmetric"]:
        scale = blocks.abs().amax(-1) / 2 ** (bits - 1)
        zero = torch.zeros(scale.shape, dtype=torch.int8)
    else:
        low, high = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
        scale = (high - low) / (2**bits - 1)
        zero = ((-low / scale).round() - 2 ** (bits - 1)).to(torch.int8)
    scale = scale.to(dtype)
    compressor: Any = BaseCompressor.get_value_from_registry(form)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    whole = {"weight": weight.to(dtype), "weight_scale": scale, "weight_zero_point": zero}
    parts = compressor.compress(whole, scheme)
    wide = {name: each.float() if each.is_floating_point() else each for name, each in parts.items()}
    meant = compressor.decompress(wide, scheme)["weight"]
    if case.get("plain"):
        parts["weight_zero_point"] = zero
    return parts, meant.double().numpy()


def about(form: str = "pack-quantized", **case: Any) -> dict[str, Any]:
    """What the folder says about itself."""
    group = {"targets": ["Linear"], "weights": arguments(**case), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@pytest.fixture
def made(tmp_path: Path, foreign: Callable[..., nn.Module]) -> Callable[..., tuple[Path, nn.Module]]:
    """`made(**case)`: a folder, and the dense model that it means."""

    def make(**case: Any) -> tuple[Path, nn.Module]:
        folder = tmp_path / "ct"
        return folder, foreign(
            folder, lambda name, W: None if name == "lm_head" else compress(W, **case), about(**case)
        )

    return make


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_are_those_that_the_library_decompresses(case: dict[str, Any], made: Callable[..., Any]) -> None:
    folder, dense = made(**case)
    model, _ = quadapt.load(folder, dtype="float32")
    layers = quantized_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.quant_weight.dequantize(), dense.get_submodule(name).weight), name
        assert layer.layout.format.bits == case["num_bits"]
        assert layer.layout.format.zero == ("none" if case["symmetric"] else "integer")
        assert layer.layout.storage.scales == ("fp32" if case.get("dtype") == torch.bfloat16 else "fp16")
    ids = torch.arange(40).view(2, 20)
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_the_dtype_of_the_scales_they_are_the_very_same_too(dtype: torch.dtype) -> None:
    case = {"num_bits": 8, "group_size": 32, "symmetric": False, "dtype": dtype}
    parts, _ = compress(np.random.default_rng(0).normal(size=(32, 64)), **case)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments(**case)))
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    importer = CompressedTensors.of(about(**case))
    weight = importer.weight(parts, importer.layout(parts, 32, 64))
    assert torch.equal(weight.dequantize(dtype), compressor.decompress(dict(parts), scheme)["weight"])


def test_layers_of_several_settings_in_one_folder(tmp_path: Path, foreign: Callable[..., nn.Module]) -> None:
    narrow, wide = CASES["4 bits, zero-points"], CASES["8 bits, whole rows"]

    def pack(name: str, W: np.ndarray) -> Any:
        return None if name == "lm_head" else compress(W, **(wide if "down_proj" in name else narrow))

    said = about(**narrow)
    said["config_groups"]["group_1"] = about(**wide)["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"]}
    dense = foreign(tmp_path / "ct", pack, said)
    for name, layer in quantized_layers(quadapt.load(tmp_path / "ct", dtype="float32")[0]).items():
        assert torch.equal(layer.quant_weight.dequantize(), dense.get_submodule(name).weight), name
        assert layer.layout.format.bits == (8 if "down_proj" in name else 4)


@pytest.mark.parametrize("unused", [False, True])
def test_groups_that_are_not_contiguous(unused: bool) -> None:
    """Packed as if they were, by the library; `weight_g_idx` then names the group of each input."""
    rng = np.random.default_rng(0)
    case = CASES["4 bits, zero-points"]
    parts, meant = compress(rng.normal(size=(32, 64)), **case)
    groups = np.full(64, -1) if unused else rng.permutation(np.arange(64) // 32)
    parts["weight_g_idx"] = torch.from_numpy(groups).int()
    if not unused:
        zero = parts["weight_zero_point"].numpy().view(np.uint32)
        zeros = np.stack([(zero[at // 8] >> (4 * (at % 8)) & 15) for at in range(32)]).astype(np.int64)
        words = parts["weight_packed"].numpy().view(np.uint32)
        codes = np.stack([(words[:, at // 8] >> (4 * (at % 8)) & 15) for at in range(64)], 1).astype(np.int64)
        meant = parts["weight_scale"].double().numpy()[:, groups] * (codes - zeros[:, groups])
    importer = CompressedTensors.of(about(**case))
    layout = importer.layout(parts, 32, 64)
    assert layout.permuted is not unused
    assert np.array_equal(importer.weight(parts, layout).dequantize().double().numpy(), meant)


@pytest.mark.parametrize(
    "format",
    [
        Format(bits=3, group_size=32, zero="integer"),
        Format(bits=4, group_size=32, zero="none"),
        Format(bits=8, group_size=-1, zero="integer"),
    ],
    ids=["int3-zp", "int4-sym", "int8-zp-row"],
)
def test_what_our_own_export_wrote_is_read_back(format: Format, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    from tests.cli.commands import byte_tokenizer
    from tests.exporters.export_models import quantized

    model = quantized(tiny_llama(vocab_size=258, bos_token_id=None, eos_token_id=0), format)
    quadapt.export(model, byte_tokenizer(), tmp_path / "ct", format="compressed-tensors", dtype="float32")
    back = quantized_layers(quadapt.load(tmp_path / "ct")[0])
    for name, layer in quantized_layers(model).items():
        ours, found = layer.quant_weight, back[name].quant_weight
        assert found.format == format
        assert torch.equal(found.codes(), ours.codes())
        assert torch.equal(found.scales, ours.scales)
        assert torch.equal(found.dequantize(), ours.dequantize())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "float-quantized"}, "format='float-quantized' of a checkpoint by compressed-tensors"),
        ({"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized'.*give the dense model"),
        ({"format": "marlin-24"}, "format='marlin-24'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse files cannot be read"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "rotations of activations"),
    ],
)
def test_other_forms_are_refused_by_name(changes: dict[str, Any], words: str, made: Callable[..., Any]) -> None:
    folder, _ = made(**CASES["4 bits"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        quadapt.load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": arguments(8, 32, symmetric=True)}, "are codes of 4 bits, and quantization_config says num_bits=8"),
        ({"weights": arguments(4, 16, symmetric=True)}, "has 3 groups for 96 inputs, and group_size=16"),
        ({"weights": arguments(4, 32, symmetric=False)}, "weight_zero_point: is not in the files"),
        ({"weights": arguments(4, 32, symmetric=True) | {"type": "float"}}, r"weights\.type='float'"),
        ({"weights": arguments(4, 32, symmetric=True) | {"strategy": "block"}}, r"weights\.strategy='block'"),
        ({"input_activations": {"num_bits": 8}}, "input_activations=.*is not understood"),
    ],
)
def test_what_the_folder_says_wrongly_is_named(changes: dict[str, Any], words: str, made: Callable[..., Any]) -> None:
    folder, _ = made(**CASES["4 bits"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        quadapt.load(folder)
