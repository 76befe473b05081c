"""GGUF files: layers in their blocks, bit for bit what the gguf package and transformers read, and what is not held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from tests.exporters.export_models import TEXT, byte_level, quantized, tiny
from tests.exporters.gguf_models import MODELS
from tokenizers import Regex, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM

import quadapt
from quadapt.errors import CheckpointError
from quadapt.exporters.gguf import export_gguf
from quadapt.hf.loading import load_model, load_tokenizer
from quadapt.importers.gguf_families import FAMILIES
from quadapt.importers.gguf_splits import QWEN2
from quadapt.model.quantize import quantized_layers
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage

IDS = torch.arange(40).view(2, 20) + 5

GRIDS = {
    "Q4_0": (Format(bits=4, group_size=32, zero="none"), "fp16"),
    "Q4_1": (Format(bits=4, group_size=32), "fp16"),
    "Q5_0": (Format(bits=5, group_size=32, zero="none"), "fp16"),
    "Q5_1": (Format(bits=5, group_size=32), "fp16"),
    "Q8_0": (Format(bits=8, group_size=32, zero="none"), "fp16"),
    "Q2_K": (Format(bits=2, group_size=16), "q2_k"),
    "Q3_K": (Format(bits=3, group_size=16, zero="none"), "q3_k"),
    "Q4_K": (Format(bits=4, group_size=32), "q4_k"),
    "Q5_K": (Format(bits=5, group_size=32), "q4_k"),
    "Q6_K": (Format(bits=6, group_size=16, zero="none"), "q6_k"),
}


def by_transformers(file: Path) -> nn.Module:
    """The dense model that transformers makes of a file."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def requantized(
    source: Path, target: Path, kind: Callable[[str], str | None], said: dict[str, str] | None = None
) -> Path:
    """A file with its matrices quantized by the gguf package: to the type that `kind(name)` gives, None leaves one.

    It has the fields `said` instead of those that it had, and besides.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in {"general.architecture", *(said or {})}:
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for key, value in (said or {}).items():
        writer.add_string(key, value)
    for each in reader.tensors:
        new = kind(each.name) if len(each.shape) > 1 else None
        if new is None:
            writer.add_tensor(each.name, np.array(each.data), raw_dtype=each.tensor_type)
        else:
            wanted = gguf.GGMLQuantizationType[new]
            writer.add_tensor(each.name, quantize(np.array(each.data, np.float32), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def alike(file: Path, layers: int = 14) -> nn.Module:
    """The model of a file, after a comparison with the one that transformers makes of it."""
    model, _ = quadapt.load(file)
    dense = by_transformers(file)
    found = quantized_layers(model)
    assert len(found) == layers
    for name, tensor in dense.state_dict().items():
        layer = name.removesuffix(".weight")
        ours = found[layer].quant_weight.dequantize() if layer in found else model.state_dict()[name]
        assert torch.equal(ours, tensor), name
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    return model


@pytest.mark.parametrize("kind", GRIDS)
def test_what_our_own_export_wrote_is_read_back(kind: str, tmp_path: Path) -> None:
    format, scales = GRIDS[kind]
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    model = quantized(tiny(**sizes), format, Storage.floating(scales, format.zero))
    report = export_gguf(model, byte_level(), tmp_path / "model.gguf")
    assert {row.type for row in report.tensors if row.linear} == {kind}
    back = quantized_layers(alike(tmp_path / "model.gguf"))
    for name, layer in quantized_layers(model).items():
        assert back[name].quant_weight.digest() == layer.quant_weight.digest(), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_gguf_package_quantized_with_embedding_and_head(kind: str, tmp_path: Path) -> None:
    export_gguf(tiny(), byte_level(), tmp_path / "dense.gguf")
    model: Any = alike(requantized(tmp_path / "dense.gguf", tmp_path / "new.gguf", lambda _: kind))
    assert model.config.quantization_config.made == {"imported": "gguf"}
    assert model.model.embed_tokens.weight.dtype == model.lm_head.weight.dtype == torch.float32
    assert {"model.embed_tokens", "lm_head"} == set(model.config.quantization_config.left)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_every_family_with_types_that_differ_and_a_tied_head(family: str, tmp_path: Path) -> None:
    export_gguf(tiny(family, tie_word_embeddings=True), byte_level(), tmp_path / "dense.gguf", name=family.lower())

    def kind(name: str) -> str | None:
        return None if "attn_k" in name else "F16" if "ffn_up" in name else "Q8_0" if "ffn_down" in name else "Q4_0"

    model = alike(requantized(tmp_path / "dense.gguf", tmp_path / "new.gguf", kind), 10)
    arch = "Llama" if family == "Mistral" else family  # llama.cpp's architecture of both
    assert type(model).__name__ == f"{arch}ForCausalLM"


CLASSES = {name.removesuffix("ForCausalLM").removesuffix("LMHeadModel"): family for name, family in FAMILIES.items()}
READ = [name for name, (kind, _) in MODELS.items() if CLASSES[kind].read]


@pytest.mark.parametrize("dense", [False, True], ids=["codes", "dense"])
@pytest.mark.parametrize("name", READ)
def test_a_model_that_was_exported_computes_the_same(name: str, dense: bool, tmp_path: Path) -> None:
    """Sizes, windows, caps and rotary embeddings come out of the file as they went in."""
    kind, changes = MODELS[name]
    model = tiny(kind, **changes) if dense else quantized(tiny(kind, **changes))
    export_gguf(model, byte_level(), tmp_path / "model.gguf")
    if dense and (kind == "Mixtral" or changes.get("qk_layernorm")):  # transformers' own reader does not know them
        with pytest.raises(CheckpointError, match=r"mixtral|norms"):
            quadapt.load(tmp_path / "model.gguf")
        return
    again: Any = quadapt.load(tmp_path / "model.gguf")[0]
    assert bool(quantized_layers(again)) != dense
    ids = torch.randint(2, 300, (1, 100), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_scaling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    export_gguf(tiny("Qwen2"), byte_level(), tmp_path / "plain.gguf")
    file = requantized(
        tmp_path / "plain.gguf", tmp_path / "new.gguf", lambda _: "Q4_0", {"qwen2.rope.scaling.type": "ntk"}
    )
    with pytest.raises(CheckpointError, match="type is ntk, with nothing more; known are none, linear, yarn, longrope"):
        load_model(str(file))


def test_the_scaling_of_llama_3_is_found_again(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model: Any = quantized(tiny(hidden_size=256, rope_parameters=rope), GRIDS["Q4_1"][0])
    export_gguf(model, byte_level(), tmp_path / "model.gguf")
    again: Any = quadapt.load(tmp_path / "model.gguf")[0]
    assert again.config.rope_parameters == model.config.rope_parameters
    ids = torch.randint(2, 300, (1, 200))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_stablelm_2_cuts_texts_as_qwen2_does(tmp_path: Path) -> None:
    """llama.cpp's own converter has a name for it that transformers does not know."""
    steps = [
        pre_tokenizers.Split(Regex(QWEN2), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer = byte_level(pre_tokenizers.Sequence(steps))
    export_gguf(tiny("StableLm"), tokenizer, tmp_path / "plain.gguf")
    requantized(tmp_path / "plain.gguf", tmp_path / "new.gguf", lambda _: "Q4_0", {"tokenizer.ggml.pre": "stablelm2"})
    again = load_tokenizer(str(tmp_path / "new.gguf"))
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    cut = again.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1823")
    assert [text for text, _ in cut] == ["in", "Ġ", "1", "8", "2", "3"]


def test_a_folder_of_one_file_and_names_of_several(tmp_path: Path) -> None:
    export_gguf(quantized(tiny(), GRIDS["Q4_1"][0]), byte_level(), tmp_path / "model.gguf")
    model, tokenizer = quadapt.load(tmp_path)
    assert len(quantized_layers(model)) == 14
    assert tokenizer("the fox")["input_ids"]
    (tmp_path / "other.gguf").write_bytes((tmp_path / "model.gguf").read_bytes())
    with pytest.raises(CheckpointError, match=r"neither config\.json"):
        quadapt.load(tmp_path)
    assert len(quantized_layers(load_model(str(tmp_path / "other.gguf"), device="meta"))) == 14


def test_an_adapter_may_have_a_file_as_its_base(tmp_path: Path) -> None:
    from tests.exporters.export_models import with_adapter

    from quadapt.nn.adapters import LoRA

    export_gguf(quantized(tiny(), GRIDS["Q4_0"][0]), byte_level(), tmp_path / "model.gguf")
    adapted = with_adapter(load_model(str(tmp_path / "model.gguf")), LoRA())
    adapted.save_pretrained(tmp_path / "adapter")
    again, _ = quadapt.load(tmp_path / "adapter", base=str(tmp_path / "model.gguf"))
    torch.testing.assert_close(again(IDS).logits, adapted(IDS).logits)
    assert not torch.equal(again(IDS).logits, quadapt.load(tmp_path / "model.gguf")[0](IDS).logits)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (lambda name: "TQ2_0" if "ffn_up" in name else "Q8_0", r"ffn_up\.weight: is TQ2_0, and Q4_0, .*can be held"),
        (lambda _: None, "is not quantized"),
    ],
    ids=["a type that is not held", "dense"],
)
def test_what_cannot_be_held_is_loaded_as_dense_numbers(kind: Any, told: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    export_gguf(tiny(**sizes), byte_level(), tmp_path / "dense.gguf")
    file = requantized(tmp_path / "dense.gguf", tmp_path / "new.gguf", kind)
    alike(file, 0)
    with pytest.raises(CheckpointError, match=told):
        load_model(str(file))


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4, 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"is of mamba, and GGUF files of Llama, .*dense numbers"):
        load_model(str(tmp_path / "other.gguf"))
