"""A new head over a model that has none: drawn by its seed, of the right shape, and nothing else is lost or random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quadapt.errors import CheckpointError
from quadapt.hf.head import Head, labels_of, problem_of
from quadapt.hf.kinds import KINDS
from quadapt.hf.loading import load_model, read_config

_TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
_T5 = {"vocab_size": 99, "d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 16}
_SIGHT = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "BertForMaskedLM": ("Bert", _TEXT, "sequence-classification"),
    "BertModel": ("Bert", _TEXT, "token-classification"),
    "RobertaForMaskedLM": ("Roberta", _TEXT, "sequence-classification"),
    "LlamaForCausalLM": ("Llama", {**_TEXT, "num_key_value_heads": 2}, "sequence-classification"),
    "T5ForConditionalGeneration": ("T5", _T5, "sequence-classification"),
    "GPT2LMHeadModel": ("GPT2", {"vocab_size": 99, "n_embd": 64, "n_layer": 1, "n_head": 4}, "sequence-classification"),
    "ViTModel": ("ViT", {**_SIGHT, "patch_size": 8}, "image-classification"),
}


def _head(task: str, *labels: str, seed: int = 0) -> Head:
    return Head(KINDS[task], labels, "single-label", seed)


def _written(name: str, folder: Path, **changes: Any) -> Any:
    family, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes, **changes)).eval()
    model.save_pretrained(folder)
    return model


def _bare(key: str, model: Any) -> str:
    """The name of a tensor without the prefix of the body."""
    return key.rpartition(f"{model.base_model_prefix}.")[2]


def _turned(name: str, key: str) -> bool:
    return name.startswith("GPT2") and any(part in key for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))


@pytest.mark.parametrize("name", MODELS)
def test_a_head_is_drawn_by_its_seed_and_the_body_is_that_of_the_files(name: str, tmp_path: Path) -> None:
    model, task = _written(name, tmp_path), MODELS[name][2]
    before = torch.get_rng_state()
    one, again, other = (load_model(str(tmp_path), head=_head(task, "a", "b", "c", seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    states = [each.state_dict() for each in (one, again, other)]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    differ = {key for key, tensor in states[0].items() if not torch.equal(tensor, states[2][key])}
    assert differ
    own = {_bare(key, model): tensor for key, tensor in model.state_dict().items()}
    kept = [key for key in states[0] if key not in differ and _bare(key, one) in own]
    assert len(kept) > 5
    for key in kept:  # Conv1D lies the other way round in the linear form
        stored, found = own[_bare(key, one)], states[0][key]
        assert torch.equal(stored if stored.shape == found.shape and not _turned(name, key) else stored.T, found)
    about: Any = one.config
    assert labels_of(about) == ("a", "b", "c")
    assert problem_of(about) == "single-label"
    assert next(each for key, each in states[0].items() if key in differ and each.ndim == 2).shape[0] in (3, 64)


def test_a_head_of_another_kind_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    config = transformers.BertConfig(**_TEXT, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    found: Any = load_model(str(tmp_path), head=_head("token-classification", "a", "b", "c"))
    assert type(found).__name__ == "BertForTokenClassification"
    assert found.classifier.weight.shape == model.classifier.weight.shape
    assert not torch.allclose(found.classifier.weight, model.classifier.weight)


def test_what_the_body_lacks_is_still_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _written("BertForMaskedLM", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"bert\.encoder\.layer\.0\.output\.dense\.weight: is not in the files"):
        load_model(str(tmp_path), head=_head("sequence-classification", "a", "b"))


def test_a_config_names_the_class_that_the_model_becomes(tmp_path: Path) -> None:
    _written("LlamaForCausalLM", tmp_path, pad_token_id=None, eos_token_id=7)
    found = read_config(str(tmp_path), head=_head("sequence-classification", "a", "b"))
    assert found.architectures == ["LlamaForSequenceClassification"]
    assert found.pad_token_id == 7  # by which the model knows where a text ends
    assert read_config(str(tmp_path)).architectures == ["LlamaForCausalLM"]
    value = read_config(str(tmp_path), head=Head(KINDS["sequence-classification"], (), "regression"))
    assert (value.num_labels, value.problem_type) == (1, "regression")
    with pytest.raises(CheckpointError, match="have no class for the task image-classification"):
        read_config(str(tmp_path), head=_head("image-classification", "a", "b"))
