"""compressed-tensors' folders, read back by that library and by transformers through it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from export_models import quantized, tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quadapt.errors import ExportError
from quadapt.exporters.compressed_tensors import CompressedTensorsWriter
from quadapt.hf.merge import merge
from quadapt.hf.peft_layer import lora_config
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import L4Q
from quadapt.quant.format import Format, Zero

FORMATS = [
    *[Format(bits=bits, group_size=32, zero=zero) for bits in (2, 3, 4, 5, 6, 8) for zero in ("integer", "none")],
    Format(bits=4, group_size=-1, zero="integer"),
    Format(bits=8, group_size=-1, zero="none"),
]
IDS = torch.randint(2, 300, (1, 40), generator=torch.Generator().manual_seed(0))


def read_back(folder: Path, *, wide: bool = False) -> dict[str, torch.Tensor]:
    """Each quantized weight as the library decompresses it: in the dtype of its scales, or `wide`, in float32."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {key: each.float() if wide and each.is_floating_point() else each for key, each in tensors.items()}
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig(**{name: value for name, value in about.items() if name != "quant_method"})
    (scheme,) = config.config_groups.values()
    found = {}
    for name in {key.rpartition(".")[0] for key in tensors if key.endswith(".weight_packed")}:
        parts = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
        found[name] = BaseCompressor.get_value_from_registry("pack-quantized").decompress(parts, scheme)["weight"]
    return found


@pytest.mark.parametrize("format", FORMATS, ids=[format.name for format in FORMATS])
def test_the_library_reads_the_very_same_weights(format: Format, tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(), format)
    report = CompressedTensorsWriter("float32").export(model, tokenizer, tmp_path / "ct")
    found = read_back(tmp_path / "ct")
    layers = quantized_layers(model)
    assert set(found) == set(layers)
    for name, layer in layers.items():
        ours = layer.quant_weight.dequantize()
        if layer.layout.storage.scales == "fp16":
            assert torch.equal(found[name], ours), name
        else:  # scale times (code - zero-point) in float32, against scale times code, plus offset
            torch.testing.assert_close(found[name], ours, rtol=0, atol=2**-23 * float(ours.abs().max() * 2))
    assert report.bits_per_weight > format.bits


@pytest.mark.parametrize("zero", ["none", "integer"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_transformers_loads_it_and_answers_alike(bits: int, zero: Zero, tokenizer: Any, tmp_path: Path) -> None:
    """Symmetric ones as codes; with zero-points, whose shape transformers mistakes, as dense ones. LoRA fits both."""
    model = quantized(tiny(), Format(bits=bits, group_size=32, zero=zero))
    CompressedTensorsWriter("float32").export(model, tokenizer, tmp_path / "ct")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    adapted = get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(each.grad is not None for each in adapted.parameters() if each.requires_grad)


def test_l4q_with_whole_zero_points_goes_out_exactly(tokenizer: Any, tmp_path: Path) -> None:
    """Zero-points that train straight through their rounding, for the servers that need them whole."""
    model = tiny()
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    adapter = L4Q(bits=4, group_size=32, offsets="integer", scales="fp16")
    adapted = get_peft_model(model, lora_config(adapter, rank=4, alpha=4, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged, certificate = merge(adapted)
    assert certificate.verdict == "exact"
    CompressedTensorsWriter("float32").export(merged, tokenizer, tmp_path / "ct")
    found = read_back(tmp_path / "ct")
    for name, layer in quantized_layers(merged).items():
        assert torch.equal(found[name], layer.quant_weight.dequantize())


@pytest.mark.parametrize(
    ("format", "told"),
    [
        (Format(bits=4, group_size=32), r"offsets that compressed-tensors cannot hold.*zero integer"),
        (Format(levels="nf", bits=4, group_size=32), r"levels that compressed-tensors cannot hold"),
        (Format(bits=4, group_size=80, zero="integer"), r"inputs end in a short group"),
    ],
    ids=["float offsets", "normal float", "short group"],
)
def test_what_it_cannot_hold_is_refused_by_name(format: Format, told: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"model\.layers\.0\..*{told}"):
        CompressedTensorsWriter().export(quantized(tiny(), format), tokenizer, tmp_path / "ct")
    assert not list(tmp_path.iterdir())


def test_scales_that_the_dtype_cannot_hold_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(), Format(bits=4, group_size=32, zero="integer"))
    with pytest.raises(ExportError, match=r"scales are not exact in torch\.bfloat16"):
        CompressedTensorsWriter("bfloat16").export(model, tokenizer, tmp_path / "ct")


@pytest.mark.parametrize(
    ("bits", "zero", "said"), [(4, "integer", 0), (8, "none", 0), (3, "none", 1), (2, "integer", 1)]
)
def test_widths_that_servers_refuse_are_named(bits: int, zero: Zero, said: int, tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(), Format(bits=bits, group_size=32, zero=zero))
    report = CompressedTensorsWriter("float32").export(model, tokenizer, tmp_path / "ct")
    notes = [note for note in report.notes if "SGLang" in note]
    assert len(notes) == said
    assert all(f"codes of {bits} bits" in note for note in notes)
    assert all(("zero-points since 0.32" in note) == (zero == "integer") for note in notes)
