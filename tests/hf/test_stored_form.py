"""Models in the linear form are read from transformers' checkpoints and written as such; quantized ones come back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import FAMILIES, IDS, logits_of, tensors_in, tiny_of
from torch import nn

import quadapt
from quadapt.hf.loading import load_model
from quadapt.hf.quantizer import adopt
from quadapt.model.layer import Quantization
from quadapt.model.linear_form import linear_form
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage

FORMAT = Format(bits=4, group_size=16)


def _quantized(model: nn.Module, **settings: Any) -> Any:
    plan = Quantization(format=FORMAT, storage=Storage.default(FORMAT), rounding=Nearest())
    selection = select(model, **settings)
    quantize_model(model, selection.chosen, plan)
    return adopt(model, left=selection.left, made={})


def _same(one: Path, other: Path) -> bool:
    first, second = tensors_in(one), tensors_in(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dense_folder_is_read_and_written_as_it_is(name: str, tmp_path: Path) -> None:
    model = tiny_of(name)
    model.save_pretrained(tmp_path / "dense")
    loaded: Any = load_model(str(tmp_path / "dense"))
    assert torch.equal(logits_of(loaded), logits_of(linear_form(model)))
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "in_place")  # of a model that was brought into the linear form in memory
    assert _same(tmp_path / "dense", tmp_path / "again")
    assert _same(tmp_path / "dense", tmp_path / "in_place")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_quantized_folder_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = tiny_of(name)
    model.save_pretrained(tmp_path / "dense")
    model = _quantized(model)
    wanted = logits_of(model)
    for folder in ("first", "second"):  # what was loaded is saved once more
        model.save_pretrained(tmp_path / folder)
        model = type(model).from_pretrained(tmp_path / folder, device_map="auto")
        assert torch.equal(logits_of(model), wanted)
    dense = model.dequantize(dtype=torch.float32)
    dense.save_pretrained(tmp_path / "dequantized")
    shapes = [
        {key: each.shape for key, each in tensors_in(tmp_path / folder).items()} for folder in ("dense", "dequantized")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_quantizing_on_loading_gives_the_same_model(name: str, tmp_path: Path) -> None:
    model = tiny_of(name)
    model.save_pretrained(tmp_path / "dense")
    skipped = [{"GPT2": "c_fc", "Dbrx": "out_proj"}.get(name, "o_proj")]
    wish = quadapt.QuadaptConfig(bits=4, group_size=16, skip=skipped)
    found = type(model).from_pretrained(tmp_path / "dense", quantization_config=wish)
    assert torch.equal(logits_of(found), logits_of(_quantized(model, skip=skipped)))


@pytest.mark.parametrize("name", ["GPT2", "Mixtral", "GptOss"])
def test_what_is_skipped_comes_back_too(name: str, tmp_path: Path) -> None:
    model = _quantized(tiny_of(name), skip=["c_fc"] if name == "GPT2" else ["experts.1", "experts.2.down_proj"])
    model.save_pretrained(tmp_path / "quantized")
    found = type(model).from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits_of(found), logits_of(model))
    assert quantized_layers(found).keys() == quantized_layers(model).keys()


def test_weights_stay_mapped_from_their_files(tmp_path: Path) -> None:
    for name in ("GPT2", "Mixtral", "GptOss"):
        tiny_of(name).save_pretrained(tmp_path / name)
        loaded = load_model(str(tmp_path / name))
        file = (tmp_path / name / "model.safetensors").stat().st_size
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in loaded.parameters()}
        assert all(size <= file for size in storages.values())
        assert _mapped(loaded, tmp_path / name), name


def _mapped(model: nn.Module, folder: Path) -> bool:
    """Whether all matrices that are quantized lie in memory that is mapped from a file of the folder."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, end = line.split()[0].split("-")
            ranges.append((int(start, 16), int(end, 16)))
    places = [layer.weight.data_ptr() for layer in select(model).chosen.values()]
    return all(any(start <= place < end for start, end in ranges) for place in places)


@pytest.mark.parametrize("name", ["GPT2", "Qwen2Moe"])
def test_another_process_loads_it_with_transformers(name: str, tmp_path: Path) -> None:
    model = _quantized(tiny_of(name))
    model.save_pretrained(tmp_path / "quantized")
    torch.save(logits_of(model), tmp_path / "logits.pt")
    code = (
        "import sys, torch, quadapt, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        f"with torch.no_grad(): logits = model(input_ids=torch.tensor({IDS.tolist()})).logits\n"
        "assert torch.equal(logits, torch.load(sys.argv[2]))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "quantized"), str(tmp_path / "logits.pt")], check=True)
