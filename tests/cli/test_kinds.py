"""Folders that the commands cannot do right by are refused before anything is written, whichever command is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, byte_tokenizer, give, write_data
from safetensors.torch import load_file, save_file

import quadapt
from quadapt.errors import CheckpointError

Make = Callable[..., Any]


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=264,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=3,
        )
    )


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=64, n_layer=1, n_head=4, n_positions=64))


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 16}
    return MambaForCausalLM(MambaConfig(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[Any], Path]:
    """`folder(model)`: a folder with it and a tokenizer, beside data."""

    def make(model: Any) -> Path:
        model.save_pretrained(tmp_path / "dense")
        byte_tokenizer().save_pretrained(tmp_path / "dense")
        write_data(tmp_path)
        return tmp_path

    return make


def _refused(place: Path, words: str, *commands: str) -> None:
    data, output = ("--data", place / "story.txt"), ("--output", place / "out")
    given = {
        "quantize": ("--rounding", "nearest", *output),
        "dry": ("--rounding", "nearest", "--dry-run", *output),
        "tune": (*data, "--method", "qlora", *SHORT, *output),
        "plan": ("--budget", "4", "--output", place / "out"),
        "eval": data,
        "chat": ("--prompt", "The fox"),
    }
    before = sorted(place.iterdir())
    for command in commands:
        name = "quantize" if command == "dry" else command
        assert words in give(name, place / "dense", *given[command], code=2).error
        assert sorted(place.iterdir()) == before


def test_a_classifier(folder: Any) -> None:
    place = folder(_bert())
    _refused(place, "is a model for sequence-classification, and quadapt chat needs one that goes on with", "chat")
    _refused(place, "no column has the label: the columns are text", "tune", "eval")


def test_a_class_that_nobody_knows(folder: Any) -> None:
    place = folder(_bert())
    config = json.loads((place / "dense" / "config.json").read_text())
    (place / "dense" / "config.json").write_text(json.dumps({**config, "architectures": ["BertForTelepathy"]}))
    words = "BertForTelepathy is no class of transformers that one of its Auto classes loads"
    _refused(place, words, "quantize", "dry", "tune", "plan", "eval", "chat")


def test_a_model_that_lacks_a_tensor(folder: Any, tiny_llama: Make) -> None:
    place = folder(tiny_llama(vocab_size=264, bos_token_id=None, eos_token_id=0))
    file = place / "dense" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    words = "model.layers.0.self_attn.k_proj.weight: is not in the files"
    _refused(place, words, "quantize", "dry", "tune", "plan", "eval", "chat")


def test_transposed_layers_are_quantized(folder: Any) -> None:
    place = folder(_gpt2())
    give("quantize", place / "dense", "--rounding", "nearest", "--output", place / "out", code=0)
    shown = give("inspect", place / "out", code=0).out
    assert all(f"1 x {name}" in shown for name in ("c_attn", "c_fc"))


def test_a_model_that_multiplies_with_weights(folder: Any) -> None:
    place = folder(_mamba())
    given = ("quantize", place / "dense", "--rounding", "nearest", "--output", place / "out")
    found = give(*given, code=2)
    assert "mixer.dt_proj: MambaForCausalLM reads the weight of this layer" in found.error
    assert not (place / "out").exists()
    give(*given, "--skip", "dt_proj", code=0)


def test_a_gguf_file_that_lacks_a_block(quantized_llama: Make, tmp_path: Path) -> None:
    from quadapt.exporters.gguf import export_gguf

    model = quantized_llama(vocab_size=264, bos_token_id=None, eos_token_id=0)
    export_gguf(model, byte_tokenizer(), tmp_path / "whole.gguf")
    ids = torch.arange(40, 60)[None]
    again, _ = quadapt.load(tmp_path / "whole.gguf")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    model.config.num_hidden_layers = 3
    export_gguf(model, byte_tokenizer(), tmp_path / "short.gguf")
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..* and \d+ more: are not in the files"):
        quadapt.load(tmp_path / "short.gguf")
