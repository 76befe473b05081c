"""GPTQ's folders: read back by a reader in NumPy and by our own importer, tuned over, merged and written again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_models import logits, quantized, tiny
from reference.gptq_pack_numpy import read
from safetensors.torch import load_file

import quadapt
from quadapt.errors import ExportError
from quadapt.exporters.formats import EXPORTERS
from quadapt.exporters.gptq import GPTQWriter
from quadapt.exporters.survey import Subject, survey
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
            layer.quant_weight = without_zeros_of_0(layer.quant_weight)
    report = GPTQWriter("float16", version).export(model, tokenizer, tmp_path / "out")
    found = read_back(tmp_path / "out")
    assert set(found) == set(layers)
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    for name, layer in layers.items():
        assert torch.equal(found[name], layer.quant_weight.dequantize()), name
        assert again.get_submodule(name).quant_weight.digest() == layer.quant_weight.digest(), name
    assert report.bits_per_weight > format.bits


def test_inputs_in_another_order_keep_it(tokenizer: Any, tmp_path: Path) -> None:
    """`g_idx` says the group of each input; codes lie in the layer's own order."""
    model = quantized(tiny(), Format(bits=3, group_size=32, zero="integer"), Storage.floating("fp16", "integer"))
    layers = quantized_layers(model)
    for seed, layer in enumerate(layers.values()):
        weight = layer.quant_weight
        order = torch.randperm(weight.layout.columns, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
        layer.quant_weight = QuantWeight(replace(weight.layout, permuted=True), {**weight.tensors, "perm": order})
    GPTQWriter().export(model, tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    found = read_back(tmp_path / "out")
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    GPTQWriter().export(again, tokenizer, tmp_path / "again")  # where inputs of one group are in their own order
    third, _ = quadapt.load(tmp_path / "again", dtype="float32")
    for name, layer in layers.items():
        second = again.get_submodule(name).quant_weight
        assert torch.equal(found[name], layer.quant_weight.dequantize()), name
        assert torch.equal(second.dequantize(), layer.quant_weight.dequantize()), name
        assert third.get_submodule(name).quant_weight.digest() == second.digest(), name


def test_layers_that_differ_are_named_one_by_one(tokenizer: Any, tmp_path: Path) -> None:
    """Other widths and groups, a layer that stays dense, and biases."""
    model = tiny("Qwen2")
    coarse = quantized(tiny("Qwen2"), Format(bits=8, group_size=16, zero="none"), Storage.floating("fp16", "none"))
    quantized(model, Format(bits=4, group_size=32, zero="none"), skip=("layers.1.mlp.up_proj",))
    model.model.layers[0].mlp.down_proj.quant_weight = coarse.model.layers[0].mlp.down_proj.quant_weight
    GPTQWriter().export(model, tokenizer, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "dynamic": {
            r"-:^model\.layers\.1\.mlp\.up_proj$": {},
            r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": 16},
        },
    }
    found = read_back(tmp_path / "out")
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    for name, layer in quantized_layers(model).items():
        assert torch.equal(found[name], layer.quant_weight.dequantize()), name
        assert again.get_submodule(name).quant_weight.digest() == layer.quant_weight.digest(), name
    assert (logits(again, IDS) - logits(model, IDS)).abs().max() < 5e-2  # norms and biases are rounded to float16


@pytest.mark.parametrize(
    ("format", "sizes", "told"),
    [
        (Format(bits=4, group_size=32), {}, r"offsets that gptq cannot hold.*code-lora.*--no-shift-offsets"),
        (Format(levels="nf", bits=4, group_size=32), {}, "levels that gptq cannot hold"),
        (Format(bits=4, group_size=80, zero="integer"), {}, "inputs end in a short group"),
        (Format(bits=5, group_size=32, zero="none"), {}, "has codes of 5 bits, and gptq knows 2, 3, 4 and 8"),
        (
            Format(bits=3, group_size=16, zero="none"),
            {"intermediate_size": 80},
            "80 (in|out)puts of 3 bits fill no whole words",
        ),
    ],
    ids=["float offsets", "normal float", "short group", "width", "words"],
)
def test_what_it_cannot_hold_is_refused_by_name(
    format: Format, sizes: dict[str, int], told: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=rf"model\.layers\.0\..*{told}"):
        GPTQWriter().export(quantized(tiny(**sizes), format), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_zero_points_at_the_ends_of_what_is_stored() -> None:
    """Version 1 has no zero-point of 0, and version 2 none of 16; a reader would take it for another."""
    layout = Layout(
        format=Format(bits=4, group_size=32, zero="integer"),
        storage=Storage.floating("fp16", "integer"),
        out=8,
        columns=32,
    )
    scales, packed = torch.ones(8, 1), torch.zeros(8, 16, dtype=torch.uint8)
    says = {}
    for zero in (0, 1, 15, 16, 17):
        weight = QuantWeight.build(layout, packed, scales, torch.full((8, 1), zero))
        for version in ("gptq", "gptq_v2"):
            exporter = EXPORTERS["gptq"].made(checkpoint_format=version)
            (answer,) = survey(Subject(matrices={"one": lambda weight=weight: weight}), [exporter])
            says[version, zero] = answer
            if answer.holds == "exactly":
                parts = {key: each.numpy() for key, each in GPTQWriter("float16", version).parts(weight).items()}
                mean = read(parts, 4, 1 if version == "gptq" else 2)
                assert np.array_equal(mean, weight.dequantize().double().numpy())
    assert {key for key, answer in says.items() if answer.holds == "exactly"} == {
        *(("gptq", zero) for zero in (1, 15, 16)),
        *(("gptq_v2", zero) for zero in (0, 1, 15)),
    }
    assert "--checkpoint-format gptq_v2" in says["gptq", 0].words
    assert "zero-point of 16, which 4 bits do not hold" in says["gptq_v2", 16].words
    assert "it may have a zero-point of 0" in str(EXPORTERS["gptq"].made(checkpoint_format="gptq").accepts(layout))
