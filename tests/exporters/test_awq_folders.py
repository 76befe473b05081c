"""AWQ's folders: read back by a reader in NumPy and by our own importer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import quantized, tiny
from reference.awq_pack_numpy import read
from safetensors.torch import load_file

import quadapt
from quadapt.errors import ExportError
from quadapt.exporters.awq import AWQWriter
from quadapt.exporters.formats import EXPORTERS
from quadapt.exporters.survey import Subject, survey
from quadapt.model.quantize import quantized_layers
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """Each quantized weight as a reader in NumPy has it, that follows the description of the format alone."""
    tensors = load_file(folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = {}
    for name in {key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}:
        parts = {part: tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros")}
        parts["scales"] = tensors[f"{name}.scales"].float().numpy()
        found[name] = torch.from_numpy(read(parts, about["group_size"])).float()
    return found


@pytest.mark.parametrize("zero", ["integer", "none"])
@pytest.mark.parametrize("size", [16, 32, -1])
def test_two_readers_find_the_very_same_weights(size: int, zero: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny("Qwen2"), Format(bits=4, group_size=size, zero=zero), Storage.floating("fp16", zero))
    AWQWriter().export(model, tokenizer, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": size,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    found, layers = read_back(tmp_path / "out"), quantized_layers(model)
    assert set(found) == set(layers)
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    for name, layer in layers.items():
        assert torch.equal(found[name], layer.quant_weight.dequantize()), name
        assert again.get_submodule(name).quant_weight.digest() == layer.quant_weight.digest(), name


@pytest.mark.parametrize(
    ("format", "sizes", "told"),
    [
        (Format(bits=4, group_size=32), {}, r"offsets that awq cannot hold.*code-lora.*--no-shift-offsets"),
        (Format(bits=8, group_size=32, zero="none"), {}, "has codes of 8 bits, and awq knows 4"),
        (Format(bits=4, group_size=80, zero="integer"), {}, "inputs end in a short group"),
        (Format(bits=4, group_size=16, zero="none"), {"intermediate_size": 100}, "100 (in|out)puts"),
    ],
    ids=["float offsets", "width", "short group", "words"],
)
def test_what_it_cannot_hold_is_refused_by_name(
    format: Format, sizes: dict[str, int], told: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=rf"model\.layers\.0\..*{told}"):
        AWQWriter().export(quantized(tiny(**sizes), format), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_layers_of_two_group_sizes_are_refused_beforehand(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(), Format(bits=4, group_size=32, zero="none"))
    rows = quantized(tiny(), Format(bits=4, group_size=-1, zero="none"))
    model.model.layers[1].mlp.up_proj.quant_weight = rows.model.layers[1].mlp.up_proj.quant_weight
    told = r"layers\.1\.mlp\.up_proj: has groups of whole rows, and model\.layers\.0\..* of 32 inputs"
    with pytest.raises(ExportError, match=told):
        AWQWriter().export(model, tokenizer, tmp_path / "out")
    matrices = {name: layer.layout for name, layer in quantized_layers(model).items()}
    (answer,) = survey(Subject(matrices=matrices, model=model, tokenizer=tokenizer), [EXPORTERS["awq"]()])
    assert answer.holds == "no"
    assert "a folder of awq has one group size" in answer.words
