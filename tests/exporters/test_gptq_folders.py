"""GPTQ's folders: read back by a reader in NumPy and by our own importer, tuned over, merged and written again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_models import SIZES, logits, quantized, tiny
from reference.gptq_pack_numpy import read
from safetensors.torch import load_file

import quadapt
from quadapt.errors import ExportError
from quadapt.exporters.gptq import GPTQWriter
from quadapt.exporters.survey import Subject, survey
from quadapt.exporters.formats import EXPORTERS
from quadapt.model.quantize import quantized_layers
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

FORMATS = [
    *[Format(bits=bits, group_size=32, zero=zero) for bits in (2, 3, 4, 8) for zero in ("integer", "none")],
    Format(bits=4, group_size=-1, zero="integer"),
    Format(bits=8, group_size=-1, zero="none"),
]
IDS = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """Each quantized weight as a reader in NumPy has it, that follows the description of the format alone."""
    tensors = load_file(folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    version = {"gptq": 1, "gptq_v2": 2}[about["checkpoint_format"]]
    found = {}
    for name in {key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}:
        parts = {part: tensors[f"{name}.{part}"].float().numpy() for part in ("scales",)}
        parts |= {part: tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "g_idx")}
        bits = next(
            (each["bits"] for pattern, each in about.get("dynamic", {}).items() if _means(pattern, name) and each),
            about["bits"],
        )
        found[name] = torch.from_numpy(read(parts, bits, version)).float()
    return found


def _means(pattern: str, name: str) -> bool:
    import re

    return pattern.startswith("+:") and re.match(pattern[2:], name) is not None


def without_zeros_of_0(weight: QuantWeight) -> QuantWeight:
    """The same layout with no zero-point of 0."""
    return QuantWeight(weight.layout, {**weight.tensors, "offsets": weight.tensors["offsets"].clamp(min=1)})


@pytest.mark.parametrize("version", ["gptq_v2", "gptq"])
@pytest.mark.parametrize("format", FORMATS, ids=[format.name for format in FORMATS])
def test_two_readers_find_the_very_same_weights(format: Format, version: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(), format, Storage.floating("fp16", format.zero))
    layers = quantized_layers(model)
    if version == "gptq" and format.zero == "integer":
        for layer in layers.values():
            layer.store(without_zeros_of_0(layer.quant_weight))
    report = GPTQWriter("float16", version).export(model, tokenizer, tmp_path / "out")
    found = read_back(tmp_path / "out")
    assert set(found) == set(layers)
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    for name, layer in layers.items():
        assert torch.equal(found[name], layer.quant_weight.dequantize()), name
        assert again.get_submodule(name).quant_weight.digest() == layer.quant_weight.digest(), name
    assert report.bits_per_weight > format.bits
