"""GGUF files: bit for bit what the model is, read back by readers that are not ours; and what cannot be, listed."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from export_models import quantized, tiny, trained, with_adapter
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from quadapt.errors import ExportError
from quadapt.exporters import gguf as exporter
from quadapt.exporters.gguf import export_gguf
from quadapt.importers.gguf_family import Family
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import Pooled
from quadapt.quant.format import Format, Zero
from quadapt.quant.storage import Storage
from quadapt.quant.weight import QuantWeight


def rows_of(path: Path, name: str) -> tuple[str, np.ndarray]:
    """Type and numbers of a tensor, by the `gguf` package's reader."""
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return tensor.tensor_type.name, dequantize(tensor.data, tensor.tensor_type)


def read_back(path: Path) -> Any:
    """The model, by transformers' reader."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def differing(model: Any, other: Any) -> list[str]:
    """Names of the tensors of the dense `other` that are not those of `model`, bit for bit."""
    ours = {name: value for name, value in model.state_dict().items()}
    for name, layer in quantized_layers(model).items():
        ours[f"{name}.weight"] = layer.quant_weight.dequantize()
    return [name for name, value in other.state_dict().items() if not torch.equal(value, ours[name].float())]


def test_permuted_inputs_leave_as_f32(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny())
    layer = quantized_layers(model)["model.layers.0.self_attn.q_proj"]
    plain = layer.quant_weight
    layout = replace(plain.layout, permuted=True)
    layer.quant_weight = QuantWeight.build(layout, plain.packed, plain.scales, plain.offsets, torch.randperm(64))
    report = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert report.notes[1:] == ("its inputs are permuted: left as F32 (32 bits per weight): blk.0.attn_q.weight",)
    assert differing(model, read_back(tmp_path / "model.gguf")) == []


MODELS = [
    (bits, group, zero) for bits, group in ((2, 32), (3, 64), (4, 32), (4, -1), (5, 32)) for zero in ("none", "float")
]
COSTS = {
    "Q4_0": "symmetric codes of 2, 3 and 4 bits all cost 4.5 bits per weight in Q4_0 blocks",
    "Q4_1": "2-, 3- and 4-bit codes all cost 5.0 bits per weight in Q4_1 blocks",
    "Q5_0": "symmetric 5-bit codes cost 5.5 bits per weight in Q5_0 blocks",
    "Q5_1": "5-bit codes cost 6.0 bits per weight in Q5_1 blocks",
    "Q8_0": "symmetric codes of 6 and 8 bits both cost 8.5 bits per weight in Q8_0 blocks",
}


@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
@pytest.mark.parametrize(("bits", "group_size", "zero"), MODELS)
def test_transformers_reads_the_model_back(
    bits: int, group_size: int, zero: Zero, merged: bool, tokenizer: Any, tmp_path: Path
) -> None:
    model = quantized(tiny(), Format(bits=bits, group_size=group_size, zero=zero))
    if merged:
        before = [layer.quant_weight.offsets for layer in quantized_layers(model).values()]
        model = with_adapter(model, Pooled()).merge_and_unload()
        after = [layer.quant_weight.offsets for layer in quantized_layers(model).values()]
        assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    report = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    (block,) = {row.type for row in report.tensors if row.linear}
    assert block == {False: "Q4_", True: "Q5_"}[bits == 5] + ("0" if zero == "none" and not merged else "1")
    assert report.notes == (COSTS[block],)
    assert f"cost {report.bits_per_weight} bits" in COSTS[block]
    assert metadata(tmp_path / "model.gguf")["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{block}"]
    assert differing(model, read_back(tmp_path / "model.gguf")) == []


def test_holds_one_tensor_at_a_time(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    alive = []
    data = exporter.Entry.data

    def watched(entry: exporter.Entry) -> np.ndarray:
        alive.append(sum(ref() is not None for ref in made))
        rows = data(entry)
        made.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(exporter.Entry, "data", watched)
    report = export_gguf(quantized(tiny()), tokenizer, tmp_path / "model.gguf")
    assert len(alive) == len(report.tensors)
    assert max(alive) == 0


def test_a_name_that_transformers_would_take_for_an_architecture(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny("Mistral"))
    export_gguf(model, tokenizer, tmp_path / "mistral.gguf")
    assert differing(model, read_back(tmp_path / "mistral.gguf")) == []


FAMILIES = [
    ("Mistral", {}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("Llama", {"tie_word_embeddings": True, "head_dim": 32}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("kind", "changes"), FAMILIES, ids=["mistral", "biases", "tied", "qwen2", "qwen3"])
def test_families(kind: str, changes: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(kind, **changes))
    path = tmp_path / "model.gguf"
    report = export_gguf(model, tokenizer, path)
    other = read_back(path)
    names = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    unread = names - set(other.state_dict())  # transformers' reader makes a Llama without biases
    assert differing(model, other) == []
    assert bool(unread) == (kind == "Llama" and "attention_bias" in changes)
    for name in unread:
        block, layer = name.split(".")[2], name.split(".")[-2]
        target = {
            "q_proj": "attn_q",
            "k_proj": "attn_k",
            "v_proj": "attn_v",
            "o_proj": "attn_output",
            "gate_proj": "ffn_gate",
            "up_proj": "ffn_up",
            "down_proj": "ffn_down",
        }[layer]
        bias = model.get_parameter(name).detach()
        if layer in ("q_proj", "k_proj"):  # row 2 i is row i of the head's first half, row 2 i + 1 that of its second
            bias = bias.view(4, 2, 8).transpose(1, 2).flatten()
        np.testing.assert_array_equal(rows_of(path, f"blk.{block}.{target}.bias")[1], bias.numpy())
    assert ("output.weight" in {row.name for row in report.tensors}) != bool(changes.get("tie_word_embeddings"))


def test_without_the_row_order_it_would_be_another_model(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(tiny())
    monkeypatch.setattr(Family, "order", lambda *_: None)
    export_gguf(model, tokenizer, tmp_path / "model.gguf")
    wrong = differing(model, read_back(tmp_path / "model.gguf"))
    assert sorted({name.split(".")[-2] for name in wrong}) == ["k_proj", "q_proj"]


@pytest.mark.parametrize("format", [Format(levels="nf", bits=4), Format(bits=8)], ids=["nf4", "int8"])
def test_what_blocks_cannot_hold_leaves_as_f32_and_is_listed(format: Format, tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(), format, Storage.floating("fp32", format.zero))
    report = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    linear = [row for row in report.tensors if row.linear]
    assert {row.type for row in linear} == {"F32"}
    assert report.bits_per_weight == 32
    assert len(linear) == 14
    assert all(row.name in report.notes[0] for row in linear)
    assert "32 bits per weight" in report.notes[0]
    assert differing(model, read_back(tmp_path / "model.gguf")) == []


def test_dense_weights_can_be_rounded_to_f16(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(), Format(levels="nf", bits=3))
    path = tmp_path / "model.gguf"
    report = export_gguf(model, tokenizer, path, dense="f16")
    assert report.bits_per_weight == 16
    assert "16 bits per weight, rounded" in report.notes[0]
    stored = quantized_layers(model)["model.layers.1.mlp.down_proj"].quant_weight
    kind, numbers = rows_of(path, "blk.1.ffn_down.weight")
    assert kind == "F16"
    np.testing.assert_array_equal(numbers, stored.dequantize(torch.float16).float().numpy())
    assert not np.array_equal(numbers, stored.dequantize().numpy())


def test_layers_that_are_not_quantized_keep_their_type(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny().to(torch.bfloat16), skip=("k_proj",))
    path = tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == kinds["blk.0.attn_k.weight"] == "BF16"
    assert kinds["blk.0.attn_q.weight"] == "Q4_1"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert differing(model, read_back(path)) == []


def test_stories260k_lists_its_172_wide_layers(tmp_path: Path) -> None:
    model, tokenizer = trained("stories260K-hf")
    report = export_gguf(quantized(model, Format(bits=3, group_size=32)), tokenizer, tmp_path / "stories.gguf")
    left = [row.name for row in report.tensors if row.linear and row.type == "F32"]
    assert left == [f"blk.{block}.ffn_down.weight" for block in range(5)]
    why = "172 inputs are not a multiple of 32: left as F32 (32 bits per weight)"
    assert report.notes[1] == f"{why}: {', '.join(left)}"
    assert 5 < report.bits_per_weight < 32
    assert differing(model, read_back(tmp_path / "stories.gguf")) == []


def test_the_report_is_json_and_counts_the_file(tokenizer: Any, tmp_path: Path) -> None:
    seen: list[str] = []

    def progress(names: Any) -> Any:
        for name in names:
            seen.append(name)
            yield name

    report = export_gguf(quantized(tiny()), tokenizer, tmp_path / "model.gguf", progress=progress)
    read = json.loads(json.dumps(report.as_dict()))
    assert read["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert 0 < read["bytes"] - sum(row["nbytes"] for row in read["tensors"]) < 20_000  # metadata
    assert [row["name"] for row in read["tensors"]] == seen
    assert read["tensors"][0] == {
        "name": "token_embd.weight",
        "type": "F32",
        "shape": [320, 64],
        "nbytes": 81920,
        "linear": False,
        "note": "",
    }
    assert read["notes"] == list(report.notes)


def metadata(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_metadata(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ messages }}"
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    model = tiny("Mistral", sliding_window=128, rope_parameters=rope, head_dim=32)
    report = export_gguf(quantized(model), tokenizer, tmp_path / "model.gguf", name="Tiny")
    tokenizer.chat_template = None
    have = metadata(tmp_path / "model.gguf")
    want = {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "general.type": "model",
        "general.file_type": 3,
        "llama.context_length": 128,
        "llama.rope.freq_base": 5000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {name: have.get(name) for name in want} == want
    assert have["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert have["tokenizer.ggml.tokens"][:2] == ["<|endoftext|>", "<|begin|>"]
    assert have["tokenizer.ggml.tokens"][-1] == "[PAD319]"
    assert have["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL
    assert have["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert "last 128 tokens" in report.notes[-1]


def test_metadata_of_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = trained("stories260K-hf")
    export_gguf(model, tokenizer, tmp_path / "model.gguf")
    have, kind = metadata(tmp_path / "model.gguf"), gguf.TokenType
    want = {
        "general.name": "model",
        "general.file_type": 0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
    }
    assert {name: have.get(name) for name in want} == want
    types = have["tokenizer.ggml.token_type"]
    assert types == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *256 * [kind.BYTE], *(512 - 259) * [kind.NORMAL]]
    assert len(have["tokenizer.ggml.scores"]) == len(have["tokenizer.ggml.tokens"]) == 512


@pytest.mark.parametrize("before", [None, b"the file of yesterday"], ids=["new", "replaced"])
def test_a_failure_midway_leaves_things_as_they_were(before: bytes | None, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if before is not None:
        path.write_bytes(before)
    model = tiny()
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ExportError, match=r"output_norm.weight: has values that are infinite or NaN"):
        export_gguf(quantized(model), tokenizer, path)
    assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else ["model.gguf"])
    assert before is None or path.read_bytes() == before


def test_replaces_a_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.gguf"
    model = quantized(tiny())
    first = export_gguf(model, tokenizer, path)
    path.write_bytes(b"damaged")
    assert export_gguf(model, tokenizer, path) == first
    assert differing(model, read_back(path)) == []
