"""MLX's folders: read bit by bit in NumPy, by our own importer, and run by mlx-lm where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expert_models import tiny_of
from export_models import logits, quantized, story, tiny, trained, with_adapter
from reference.mlx_pack_numpy import looked_up
from safetensors.torch import load_file
from torch import nn

import quadapt
from quadapt.errors import ExportError
from quadapt.exporters import codes
from quadapt.exporters.formats import EXPORTERS
from quadapt.exporters.mlx import FAMILIES, MLXWriter
from quadapt.hf.merge import merge
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import Pooled
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage

IDS = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()
INT4, WIDE = Format(bits=4, group_size=32), Storage(scales="fp32", offsets="fp32")
NEEDED = "needs mlx-lm (pip install 'quadapt[mlx]')"


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """Each quantized weight as a reader in NumPy has it, in float32, that follows the format's description alone."""
    tensors = load_file(folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())["quantization"]
    found = {}
    for name in {key.removesuffix(".scales") for key in tensors if key.endswith(".scales")}:
        own = about.get(name, about)
        parts = {part: tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases")}
        arrays = {part: (each if part == "weight" else each.float()).numpy() for part, each in parts.items()}
        found[name] = torch.from_numpy(looked_up(arrays, own["bits"], own["group_size"]))
    return found


def run(folder: Path, ids: list[int]) -> torch.Tensor:
    """The logits that mlx-lm has after each token, float32 `[length, vocabulary]`."""
    mx = pytest.importorskip("mlx.core", reason=NEEDED)
    utils = pytest.importorskip("mlx_lm.utils", reason=NEEDED)
    mx.set_default_device(mx.cpu)
    model, _ = utils.load_model(folder)
    return torch.from_numpy(np.array(model(mx.array([ids]))[0].astype(mx.float32)))


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The distance of two tensors, as a share of the size of the second."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("zero", ["float", "none", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_two_readers_find_the_very_same_weights(bits: int, zero: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(), Format(bits=bits, group_size=32, zero=zero), Storage.floating("fp16", zero))
    layers = quantized_layers(model)
    report = MLXWriter("float32" if zero == "integer" else "float16").export(model, tokenizer, tmp_path / "out")
    found = read_back(tmp_path / "out")
    assert set(found) == set(layers)
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    for name, layer in layers.items():
        weight, second = layer.quant_weight, again.get_submodule(name).quant_weight
        assert torch.equal(found[name], weight.dequantize()), name
        assert torch.equal(second.codes(), weight.codes())
        assert torch.equal(second.scales, weight.scales)
        assert torch.equal(second.offsets, weight.offsets)
        if zero == "float":
            assert second.digest() == weight.digest(), name
    assert report.bits_per_weight == bits + (2 if zero == "integer" else 1)


@pytest.mark.parametrize(
    ("size", "held"), [(96, {64, 32}), (128, {64, 128}), (160, {64, 32}), (256, {64, 128}), (-1, {64, 128})]
)
def test_groups_of_other_sizes_are_several_with_one_scale(
    size: int, held: set[int], tokenizer: Any, tmp_path: Path
) -> None:
    model = quantized(tiny(intermediate_size=384), Format(bits=4, group_size=size))
    MLXWriter("float32").export(model, tokenizer, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["quantization"] == about["quantization_config"]
    own = [each for each in about["quantization"].values() if isinstance(each, dict)]
    assert {each["group_size"] for each in (about["quantization"], *own)} == held
    found = read_back(tmp_path / "out")
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    for name, layer in quantized_layers(model).items():
        assert torch.equal(found[name], layer.quant_weight.dequantize()), name
        assert torch.equal(again.get_submodule(name).quant_weight.dequantize(), layer.quant_weight.dequantize()), name
    assert torch.equal(logits(again, IDS), logits(model, IDS))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 16, "pad_token_id": 0}
LOCAL = {"query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 6}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, another base of the rotary embedding": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    "llama, scaled rotary embedding": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", {**GEMMA, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3", GEMMA | LOCAL),
    "phi": ("Phi", {"num_key_value_heads": 4}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "olmo2": ("Olmo2", {"pad_token_id": 0}),
    "olmo3": ("Olmo3", {"pad_token_id": 0, "sliding_window": 8, "num_hidden_layers": 4}),
    "granite": ("Granite", {}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
    "cohere": ("Cohere", {"pad_token_id": 0}),
    "smollm3": ("SmolLM3", {"pad_token_id": 0}),
    "gpt_neox": ("GPTNeoX", {"intermediate_size": 256}),
    "mixtral": ("Mixtral", {"vocab_size": 320}),
    "qwen2_moe": ("Qwen2Moe", {"vocab_size": 320, "moe_intermediate_size": 64}),
    "olmoe": ("Olmoe", {"vocab_size": 320}),
}


def made(name: str) -> nn.Module:
    """A tiny random model of `MODELS`."""
    kind, changes = MODELS[name]
    return tiny_of(kind, **changes) if "vocab_size" in changes else tiny(kind, **changes)


@pytest.mark.parametrize("name", MODELS)
def test_mlx_lm_gives_what_transformers_gives(name: str, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason=NEEDED)
    model = quantized(made(name), INT4, WIDE)
    assert model.config.model_type in FAMILIES
    report = MLXWriter("float32").export(model, tokenizer, tmp_path / "out")
    assert report.notes == ()
    # MLX has another approximation of GELU's hyperbolic tangent
    limit = 5e-4 if name in ("gemma", "starcoder2", "gpt_neox") else 1e-5
    assert far(run(tmp_path / "out", IDS), logits(model, IDS)) < limit


def test_every_family_that_is_listed_has_been_run() -> None:
    assert set(FAMILIES) == {name.partition(",")[0] for name in MODELS}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_what_was_tuned_and_merged_is_what_mlx_lm_runs(bits: int, tokenizer: Any, tmp_path: Path) -> None:
    model = with_adapter(quantized(tiny(), Format(bits=bits, group_size=32), WIDE), Pooled())
    tuned = logits(model, IDS)
    merged, _ = merge(model)
    EXPORTERS["mlx"].made(dtype="float32").write(merged, tokenizer, tmp_path / "out")
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    assert torch.equal(logits(again, IDS), tuned)
    assert far(run(tmp_path / "out", IDS), tuned) < 1e-5


def test_a_real_model_goes_on_with_a_story_as_in_transformers(tmp_path: Path) -> None:
    model, tokenizer = trained("stories260K-hf")
    lm = pytest.importorskip("mlx_lm", reason=NEEDED)
    model = quantized(model, INT4, skip=("down_proj",))  # whose rows of 172 inputs no groups of MLX fill
    EXPORTERS["mlx"].made(dtype="float32").write(model, tokenizer, tmp_path / "out")
    ids = story(tokenizer, 64)
    assert far(run(tmp_path / "out", ids), logits(model, ids)) < 1e-5
    theirs, words = lm.load(str(tmp_path / "out"))
    text = lm.generate(theirs, words, prompt=ids, max_tokens=24)
    ours = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
    assert text.strip() == tokenizer.decode(ours, skip_special_tokens=True).strip()


def test_layers_that_differ_are_named_and_dense_ones_have_no_scales(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(), INT4, skip=("layers.1.mlp.up_proj",))
    other = quantized(tiny(), Format(bits=8, group_size=64), Storage.floating("fp16", "float"))
    model.model.layers[0].mlp.up_proj.quant_weight = other.model.layers[0].mlp.up_proj.quant_weight
    MLXWriter("float32").export(model, tokenizer, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert about == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 8, "mode": "affine"},
    }
    found = read_back(tmp_path / "out")
    assert "model.layers.1.mlp.up_proj" not in found
    for name, layer in quantized_layers(model).items():
        assert torch.equal(found[name], layer.quant_weight.dequantize()), name
    assert far(run(tmp_path / "out", IDS), logits(model, IDS)) < 1e-5


def test_large_models_are_written_in_several_files(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "SHARD", 30_000)
    model = quantized(tiny(), INT4, WIDE)
    MLXWriter("float32").export(model, tokenizer, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {file.name for file in files}
    again, _ = quadapt.load(tmp_path / "out", dtype="float32")
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert far(run(tmp_path / "out", IDS), logits(model, IDS)) < 1e-5


@pytest.mark.parametrize(
    ("format", "storage", "told"),
    [
        (Format(levels="nf", bits=4, group_size=32), None, "nf4-g32 has levels that mlx cannot hold"),
        (Format(bits=4, group_size=48), None, "groups of 48 in rows of 64 inputs, and mlx knows groups of 32, 64 and"),
        (Format(bits=4, group_size=16), None, "has groups of 16"),
        (INT4, WIDE, r"are not exact in float16\. Use --dtype float32"),
        (Format(bits=4, group_size=32, zero="integer"), None, r"are not exact in float16\. Use --dtype float32"),
    ],
    ids=["levels", "size", "small", "floats", "products"],
)
def test_what_it_cannot_hold_is_refused_by_name(
    format: Format, storage: Storage | None, told: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=rf"model\.layers\.\d\..*{told}"):
        MLXWriter().export(quantized(tiny(), format, storage), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_models_that_mlx_lm_would_load_otherwise_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    def told(model: nn.Module) -> str:
        with pytest.raises(ExportError) as refused:
            MLXWriter("float32").export(model, tokenizer, tmp_path / "out")
        return str(refused.value)

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    assert "c_attn: is a Conv1D in transformers, which mlx-lm transposes" in told(quantized(tiny("GPT2", **sizes)))
    assert "experts of gpt_oss are stacked by mlx-lm in a way" in told(quantized(tiny_of("GptOss", vocab_size=320)))
    model = quantized(tiny_of("Mixtral", vocab_size=320), INT4, WIDE)
    other = quantized(tiny_of("Mixtral", vocab_size=320), Format(bits=8, group_size=32), WIDE)
    where = "model.layers.1.mlp.experts.2.up_proj"
    model.get_submodule(where).quant_weight = other.get_submodule(where).quant_weight
    assert f"{where}: is int8-g32, and model.layers.1.mlp.experts.0.up_proj int4-g32" in told(model)


def test_a_family_that_was_not_run_is_told(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny("OPT", ffn_dim=96, word_embed_proj_dim=64, pad_token_id=0))
    *_, first, second = MLXWriter().export(model, tokenizer, tmp_path / "out").notes
    assert "in float16 it rounds each weight" in first
    assert "opt has not been run there" in second
