"""torchao's folders: loaded by transformers with that library, and by our own importer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import tiny_of
from export_models import check_in_steps, logits, quantized, story, tiny, trained, with_adapter
from torch import nn

import quadapt
from quadapt.errors import ExportError
from quadapt.exporters import codes
from quadapt.exporters.formats import EXPORTERS
from quadapt.exporters.torchao import TorchAOWriter
from quadapt.hf.merge import merge
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import Pooled
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import QuantWeight

pytest.importorskip("torchao", reason="needs torchao (pip install 'quadapt[torchao]')")

IDS = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()
INT4, WIDE = Format(bits=4, group_size=32), Storage(scales="fp32", offsets="fp32")


def theirs(folder: Path) -> Any:
    """The model as transformers loads it with torchao."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """Each quantized weight as torchao dequantizes it, in float32."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    found = {}
    for name, layer in theirs(folder).named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, IntxUnpackedToInt8Tensor):
            found[name] = weight.to(torch.float32).dequantize()
    return found


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("zero", ["float", "none", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_library_and_our_importer_read_the_weights(
    bits: int, zero: Any, dtype: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = quantized(tiny(), Format(bits=bits, group_size=32, zero=zero), Storage.floating("fp16", zero))
    report = TorchAOWriter(dtype).export(model, tokenizer, tmp_path / "out")
    assert any("vLLM" in note for note in report.notes) == (zero == "float")
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    check_in_steps(read_back(tmp_path / "out"), again, model)
    if dtype == "float32":
        far = logits(theirs(tmp_path / "out"), IDS) - logits(model, IDS)
        assert far.norm() <= (1e-5 if zero == "float" else 1e-6) * logits(model, IDS).norm()
        assert torch.equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.parametrize("size", [80, 48, 128, 256, -1])
def test_groups_of_other_sizes(size: int, tokenizer: Any, tmp_path: Path) -> None:
    """A short last group cuts all of them: 96 inputs in groups of 80 are six of 16."""
    model = quantized(tiny(intermediate_size=176), Format(bits=4, group_size=size, zero="integer"))
    TorchAOWriter().export(model, tokenizer, tmp_path / "out")
    found = read_back(tmp_path / "out")
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    for name, layer in quantized_layers(model).items():
        assert torch.equal(found[name], layer.quant_weight.dequantize()), name
        assert torch.equal(again.get_submodule(name).quant_weight.dequantize(), layer.quant_weight.dequantize()), name


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_was_tuned_and_merged_is_what_transformers_runs(bits: int, tokenizer: Any, tmp_path: Path) -> None:
    model = with_adapter(quantized(tiny(), Format(bits=bits, group_size=32)), Pooled())
    tuned = logits(model, IDS)
    merged, _ = merge(model)
    EXPORTERS["torchao"].made(dtype="float32").write(merged, tokenizer, tmp_path / "out")
    assert (logits(theirs(tmp_path / "out"), IDS) - tuned).norm() < 1e-5 * tuned.norm()
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    assert torch.equal(logits(again, IDS), tuned)


@pytest.mark.parametrize("zero", ["float", "none", "integer"])
def test_its_packed_codes_for_cpus_mean_the_very_weights_and_have_no_safetensors(zero: Any) -> None:
    """What the guide says: once torchao can write them, they are worth a format."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = quantized(tiny(), Format(bits=4, group_size=32, zero=zero))
    weight = model.model.layers[0].mlp.up_proj.quant_weight
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes().int(), 1)
    constants = torch.stack([weight.scales.T, (weight.offsets + 8 * weight.scales).T], -1).contiguous()
    theirs = Int4OpaqueTensor(codes, constants, [1, 32], torch.Size((weight.layout.out, weight.layout.columns)))
    unit = torch.eye(weight.layout.columns)
    assert torch.equal(nn.functional.linear(unit, theirs).T, weight.dequantize())
    with pytest.raises(ValueError, match="Unsupported tensor type"):
        flatten_tensor_state_dict({"weight": theirs})


def test_a_real_model_goes_on_with_a_story(tmp_path: Path) -> None:
    model, tokenizer = trained("stories260K-hf")
    ids = story(tokenizer, 64)
    model = quantized(model, Format(bits=4, group_size=16), WIDE, skip=("down_proj",))  # rows of 172 inputs
    EXPORTERS["torchao"].made(dtype="float32").write(model, tokenizer, tmp_path / "out")
    other = theirs(tmp_path / "out")
    assert (logits(other, ids) - logits(model, ids)).norm() < 1e-5 * logits(model, ids).norm()
    said = [each.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False) for each in (model, other)]
    assert torch.equal(*said)


@pytest.mark.parametrize("tied", [False, True])
def test_dense_layers_stay_as_they_are(tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny("Qwen2", tie_word_embeddings=tied), INT4, WIDE, skip=("layers.1.mlp.up_proj",))
    TorchAOWriter("float32").export(model, tokenizer, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about["modules_to_not_convert"] == ["model.layers.1.mlp.up_proj", "lm_head"]
    other = theirs(tmp_path / "out")
    assert type(other.model.layers[1].mlp.up_proj.weight) is torch.nn.Parameter
    assert (logits(other, IDS) - logits(model, IDS)).norm() < 1e-5 * logits(model, IDS).norm()


def test_large_models_are_written_in_several_files(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "SHARD", 30_000)
    model = quantized(tiny(), Format(bits=4, group_size=32, zero="integer"))
    TorchAOWriter("float32").export(model, tokenizer, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert (logits(theirs(tmp_path / "out"), IDS) - logits(model, IDS)).norm() <= 1e-6 * logits(model, IDS).norm()
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    assert torch.equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.parametrize(
    ("format", "storage", "told"),
    [
        (Format(levels="nf", bits=4, group_size=32), None, "nf4-g32 has levels that torchao cannot hold"),
        (INT4, WIDE, r"its scales are not exact in float16\. Use --dtype float32"),
        (Format(bits=4, group_size=32, zero="none"), Storage.floating("fp32", "none"), "its scales are not exact in"),
    ],
    ids=["levels", "floats", "symmetric"],
)
def test_what_it_cannot_hold_is_refused_by_name(
    format: Format, storage: Storage | None, told: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=rf"model\.layers\.\d\..*{told}"):
        TorchAOWriter().export(quantized(tiny(), format, storage), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_models_that_it_would_load_otherwise_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    def told(model: Any) -> str:
        with pytest.raises(ExportError) as refused:
            TorchAOWriter("float32").export(model, tokenizer, tmp_path / "out")
        return str(refused.value)

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    assert "c_attn: is a Conv1D in transformers, of which" in told(quantized(tiny("GPT2", **sizes)))
    assert "experts: is a stack of experts in" in told(quantized(tiny_of("Mixtral", vocab_size=320), INT4))
    model, other = quantized(tiny(), INT4), quantized(tiny(), Format(bits=3, group_size=32))
    model.model.layers[1].mlp.up_proj.quant_weight = other.model.layers[1].mlp.up_proj.quant_weight
    assert r"layers.1.mlp.up_proj: has 3 bits, and model.layers.0.self_attn.q_proj 4" in told(model)
    model = quantized(tiny(), INT4)
    weight = model.model.layers[0].mlp.up_proj.quant_weight
    none = torch.zeros_like(weight.tensors["scales"])
    model.model.layers[0].mlp.up_proj.quant_weight = QuantWeight(weight.layout, {**weight.tensors, "scales": none})
    assert "layers.0.mlp.up_proj: it has a scale of zero with an offset" in told(model)
