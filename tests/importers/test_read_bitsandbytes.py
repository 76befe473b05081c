"""Folders of bitsandbytes, made by transformers and bitsandbytes, beside the library's own dequantization."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quadapt
from quadapt.errors import CheckpointError, ShapeError
from quadapt.importers.bitsandbytes import BitsAndBytes
from quadapt.model.quantize import quantized_layers

bnb = pytest.importorskip("bitsandbytes")
from bitsandbytes import functional  # noqa: E402 - only where it is installed

FOUR = {"load_in_4bit": True}
EIGHT = {"load_in_8bit": True}
CASES = {
    "nf4": FOUR | {"bnb_4bit_quant_type": "nf4"},
    "nf4, nested": FOUR | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4, nested, bytes called bfloat16": FOUR
    | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "fp4": FOUR | {"bnb_4bit_quant_type": "fp4"},
    "fp4, nested": FOUR | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
}
IDS = torch.arange(40).view(2, 20)


@pytest.fixture
def made(tmp_path: Path, foreign: Callable[..., nn.Module]) -> Callable[..., tuple[Path, nn.Module, nn.Module]]:
    """`made(settings)`: a folder, bitsandbytes' model of it, and the dense one, float32, still without its weights."""

    def make(settings: dict[str, Any], intermediate: int = 128) -> tuple[Path, nn.Module, nn.Module]:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        source, folder = tmp_path / "dense", tmp_path / "bnb"
        dense = foreign(source, lambda *_: None, None, intermediate_size=intermediate)
        config = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float16)
        model.save_pretrained(folder)
        for file in source.glob("*token*"):
            shutil.copy(file, folder)
        return folder, model, dense

    return make


def dequantized(layer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """What bitsandbytes makes of a layer of four bits."""
    state = layer.weight.quant_state
    state.dtype = dtype
    return functional.dequantize_4bit(layer.weight.data, state)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_of_four_bits_are_those_of_the_library_and_so_are_logits(
    case: dict[str, Any], made: Callable[..., Any]
) -> None:
    folder, theirs, dense = made(case)
    model, _ = quadapt.load(str(folder), dtype="float32")
    layers = quantized_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            want = dequantized(theirs.get_submodule(name), dtype)
            assert torch.equal(layer.quant_weight.dequantize(dtype), want), (name, dtype)
        dense.get_submodule(name).weight.data = want
        assert layer.layout.storage.scales == ("double" if "bnb_4bit_use_double_quant" in case else "fp32")
        assert layer.layout.format.levels == {"nf4": "nf-qlora", "fp4": "fp4"}[case["bnb_4bit_quant_type"]]
    assert torch.allclose(model(IDS).logits, dense(IDS).logits, atol=1e-5)
    if case == CASES["nf4"]:
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]["quant_method"]  # as transformers wrote it at first
        (folder / "config.json").write_text(json.dumps(config))
        assert torch.equal(quadapt.load(str(folder), dtype="float32")[0](IDS).logits, model(IDS).logits)


def test_weights_of_eight_bits_are_those_of_the_library_to_2_to_the_minus_14_of_a_step(
    made: Callable[..., Any],
) -> None:
    folder, theirs, dense = made(EIGHT)
    model, _ = quadapt.load(str(folder), dtype="float32")
    layers = quantized_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        weight, other = layer.quant_weight, theirs.get_submodule(name).weight
        want = functional.int8_vectorwise_dequant(other.data, other.SCB)
        assert torch.equal(weight.codes().int() - 128, other.data.int()), name
        assert float(((weight.dequantize() - want).abs() / weight.scales).max()) < 2**-14, name
        assert torch.equal(
            weight.scales[:, 0], functional.int8_vectorwise_dequant(torch.ones_like(other), other.SCB)[:, 0]
        )
        dense.get_submodule(name).weight.data = want
    assert torch.allclose(model(IDS).logits, dense(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("case", ["nf4, nested", "fp4"])
def test_commands_take_such_a_folder(case: str, tmp_path: Path, made: Callable[..., Any]) -> None:
    from tests.cli.commands import quadapt as command

    folder, own = str(made(CASES[case])[0]), str(tmp_path / "own")
    command("convert", folder, "--output", own)
    assert command("inspect", own, "--verify")["verified"] is True
    first, again = (quadapt.load(name)[0] for name in (folder, own))
    assert torch.equal(first(IDS).logits, again(IDS).logits)
    held, kept = quantized_layers(first), quantized_layers(again)
    assert {name: layer.quant_weight.digest() for name, layer in held.items()} == {
        name: layer.quant_weight.digest() for name, layer in kept.items()
    }


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [32, 128, 256, 512, 1024])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_of_any_size_that_lie_within_rows(kind: str, size: int, *, nested: bool) -> None:
    weight = torch.randn(6, 1024)
    parts = stored(weight, kind, size, nested=nested)
    importer = BitsAndBytes.of(FOUR)
    layout = importer.layout(parts, 6, 1024)
    found = importer.weight(parts, layout)
    assert torch.equal(found.dequantize(), theirs_of(weight, kind, size, nested=nested))
    assert layout.storage.scales == ("double" if nested and size != 512 else "fp32")


def quantized(weight: Tensor, kind: str, size: int, *, nested: bool) -> Any:
    return functional.quantize_4bit(weight, blocksize=size, compress_statistics=nested, quant_type=kind)


def stored(weight: Tensor, kind: str = "nf4", size: int = 64, *, nested: bool = True) -> dict[str, Tensor]:
    """The tensors of a layer as they lie in a file."""
    packed, state = quantized(weight, kind, size, nested=nested)
    return {"weight": packed} | {f"weight.{name}": each for name, each in state.as_dict(packed=True).items()}


def theirs_of(weight: Tensor, kind: str, size: int, *, nested: bool) -> Tensor:
    return functional.dequantize_4bit(*quantized(weight, kind, size, nested=nested))


STATE = "weight.quant_state.bitsandbytes__nf4"


def changed(**fields: Any) -> Callable[[dict[str, Tensor]], None]:
    """What changes the state of a layer."""

    def change(parts: dict[str, Tensor]) -> None:
        state = json.loads(bytes(parts[STATE].tolist())) | fields
        parts[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def nudged(name: str) -> Callable[[dict[str, Tensor]], None]:
    """What changes one level of a table."""
    return lambda parts: parts.update({name: parts[name].index_add(0, torch.tensor([3]), torch.tensor([1e-7]))})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(shape=[64, 128]), "is 64 x 128 by its quant_state, and the model has 32 x 256"),
        (changed(quant_type="nf3"), "quant_type='nf3' is not understood"),
        (changed(nested_blocksize=128), "nested_blocksize=128 is not understood"),
        (changed(nested_offset=None), "contradicts weight.nested_absmax"),
        (changed(blocksize=0), "blocks of 0"),
        (nudged("weight.quant_map"), "weight.quant_map: has other levels .* Give the dense model"),
        (nudged("weight.nested_quant_map"), "weight.nested_quant_map: has other levels"),
        (lambda parts: parts.update({"weight.absmax": parts["weight.absmax"][1:]}), "weight.absmax: is uint8 127"),
        (lambda parts: parts.pop(STATE), "is not in the files. The copy is incomplete"),
        (lambda parts: parts.update({STATE: parts[STATE][:-1]}), "its text=.* is not understood"),
        (lambda parts: parts.update({"weight": parts["weight"][1:]}), "has 4095 bytes, where 32 x 256 codes take 4096"),
    ],
)
def test_what_contradicts_itself_is_refused(change: Callable[[dict[str, Tensor]], Any], words: str) -> None:
    parts, importer = stored(torch.randn(32, 256)), BitsAndBytes.of(FOUR)
    change(parts)
    with pytest.raises((CheckpointError, ShapeError), match=words):
        importer.weight(parts, importer.layout(parts, 32, 256))


def test_blocks_that_cross_rows_are_refused(made: Callable[..., Any]) -> None:
    folder, _, _ = made(CASES["nf4"], intermediate=96)
    with pytest.raises(
        ShapeError, match=r"down_proj: has rows of 96 inputs and blocks of 64, so that blocks cross rows"
    ):
        quadapt.load(str(folder))


def test_codes_in_the_order_of_a_gpu_are_refused(made: Callable[..., Any]) -> None:
    folder, _, _ = made(EIGHT)
    state = load_file(folder / "model.safetensors")
    state = {name: each + 1 if name.endswith("weight_format") else each for name, each in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weight_format: is that of one kind of GPU"):
        quadapt.load(str(folder))
