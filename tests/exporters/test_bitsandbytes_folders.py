"""bitsandbytes' folders: loaded by transformers with that library, and by our own importer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import logits, quantized, tiny
from safetensors.torch import load_file

import quadapt
from quadapt.errors import ExportError
from quadapt.exporters.bitsandbytes import BitsAndBytesWriter
from quadapt.exporters.formats import EXPORTERS
from quadapt.exporters.survey import Subject, survey
from quadapt.model.quantize import quantized_layers
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import QuantState, dequantize_4bit

WIDE: dict[str, Any] = {"intermediate_size": 128}
PLAIN, DOUBLE = (Storage(scales=scales, offsets="absent") for scales in ("fp32", "double"))
IDS = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()
CASES = {
    "nf4": (Format(levels="nf-qlora", bits=4, group_size=64), PLAIN),
    "nf4, nested": (Format(levels="nf-qlora", bits=4, group_size=64), DOUBLE),
    "nf4, blocks of 32, float16 scales": (
        Format(levels="nf-qlora", bits=4, group_size=32),
        Storage(scales="fp16", offsets="absent"),
    ),
    "fp4": (Format(levels="fp4", bits=4, group_size=64), PLAIN),
    "fp4, nested": (Format(levels="fp4", bits=4, group_size=32), DOUBLE),
}


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """Each quantized weight as bitsandbytes dequantizes it, in float32."""
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in {key.removesuffix(".weight.absmax") for key in tensors if key.endswith(".weight.absmax")}:
        state = {key.removeprefix(f"{name}.weight."): each for key, each in tensors.items() if f"{name}.weight." in key}
        made = QuantState.from_dict(state, device=torch.device("cpu"))
        made.dtype = torch.float32
        found[name] = dequantize_4bit(tensors[f"{name}.weight"], made)
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_library_reads_the_very_same_weights(
    case: tuple[Format, Storage], dtype: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = quantized(tiny(**WIDE), *case)
    BitsAndBytesWriter(dtype).export(model, tokenizer, tmp_path / "out")
    layers, found = quantized_layers(model), read_back(tmp_path / "out")
    assert set(found) == set(layers)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", device_map="cpu")
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    for name, layer in layers.items():
        weight, loaded = layer.quant_weight, theirs.get_submodule(name).weight
        second = again.get_submodule(name).quant_weight
        assert torch.equal(found[name], weight.dequantize()), name
        kind = getattr(torch, dtype)
        assert torch.equal(dequantize_4bit(loaded.data, loaded.quant_state), weight.dequantize(kind)), name
        assert torch.equal(second.dequantize(), weight.dequantize())
        if case[1].scales != "fp16" and weight.layout.groups > 1:
            assert second.digest() == weight.digest(), name
    if dtype == "float32":
        theirs.train()  # in inference its kernels for the CPU compute in bfloat16
        assert (logits(theirs, IDS) - logits(model, IDS)).abs().max() < 1e-3


def test_nf4_of_the_rule_differs_in_the_seventh_digit_and_says_so(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(**WIDE), Format(levels="nf", bits=4, group_size=64), DOUBLE)
    layers = quantized_layers(model)
    matrices = {name: layer.layout for name, layer in layers.items()}
    (answer,) = survey(Subject(matrices=matrices, model=model, tokenizer=tokenizer), [EXPORTERS["bitsandbytes"]()])
    assert answer.holds == "changed"
    assert "nf-qlora for its very numbers" in answer.words
    BitsAndBytesWriter().export(model, tokenizer, tmp_path / "out")
    for name, weight in read_back(tmp_path / "out").items():
        ours = layers[name].quant_weight.dequantize()
        assert 0 < (weight - ours).abs().max() < 1e-6 * ours.abs().max()


@pytest.mark.parametrize(
    ("format", "told"),
    [
        (Format(bits=4, group_size=32), "int4-g32 has levels that bitsandbytes cannot hold"),
        (Format(levels="nf", bits=3, group_size=32), "nf3-g32 has levels that bitsandbytes cannot hold"),
        (Format(levels="nf-qlora", bits=4, group_size=32, zero="float"), "has offsets"),
        (Format(levels="nf-qlora", bits=4, group_size=48), r"groups of 48 in rows of \d+ inputs"),
        (Format(levels="nf-qlora", bits=4, group_size=128), "groups of 96 in rows of 96 inputs"),
    ],
    ids=["integers", "width", "offsets", "size", "rows"],
)
def test_what_it_cannot_hold_is_refused_by_name(format: Format, told: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"model\.layers\.\d\..*{told}"):
        BitsAndBytesWriter().export(quantized(tiny(), format), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_has_nf4_or_fp4(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(**WIDE), *CASES["nf4"])
    other = quantized(tiny(**WIDE), *CASES["fp4"])
    model.model.layers[1].mlp.up_proj.quant_weight = other.model.layers[1].mlp.up_proj.quant_weight
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj: is fp4, and model\.layers\.0\..* nf4"):
        BitsAndBytesWriter().export(model, tokenizer, tmp_path / "out")


def test_layers_that_stay_dense_are_named(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = quantized(tiny(**WIDE), *CASES["nf4"], skip=("layers.1.mlp.up_proj",))
    BitsAndBytesWriter("float32").export(model, tokenizer, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about["llm_int8_skip_modules"] == ["model.layers.1.mlp.up_proj", "lm_head"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", device_map="cpu")
    theirs.train()  # see above
    assert (logits(theirs, IDS) - logits(model, IDS)).abs().max() < 1e-3
