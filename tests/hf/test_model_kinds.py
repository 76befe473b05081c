"""Models of any kind are quantized but for their heads, which train and merge; PEFT gets its own word for the task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import quadapt
from quadapt.errors import CheckpointError
from quadapt.hf.context import positions_of
from quadapt.hf.kinds import KINDS, class_of, kind_of, kind_of_model
from quadapt.model.quantize import quantized_layers
from quadapt.model.select import heads

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_TEXT = {**_SIZES, "vocab_size": 120, "max_position_embeddings": 64, "initializer_range": 0.2}
_BART = {
    "vocab_size": 120,
    "d_model": 64,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
_T5 = {"vocab_size": 120, "d_model": 64, "d_ff": 96, "num_layers": 1, "num_heads": 4, "d_kv": 16}

MODELS: dict[str, tuple[str, dict[str, Any], str, str | None, set[str]]] = {
    "BertForSequenceClassification": ("Bert", _TEXT, "sequence-classification", "SEQ_CLS", {"classifier", "pooler"}),
    "BertForTokenClassification": ("Bert", _TEXT, "token-classification", "TOKEN_CLS", {"classifier"}),
    "BertForQuestionAnswering": ("Bert", _TEXT, "question-answering", "QUESTION_ANS", {"qa_outputs"}),
    "BertForMaskedLM": ("Bert", _TEXT, "masked-lm", None, {"decoder"}),
    "BertModel": ("Bert", _TEXT, "features", None, set()),
    "RobertaForSequenceClassification": ("Roberta", _TEXT, "sequence-classification", "SEQ_CLS", {"classifier"}),
    "LlamaForSequenceClassification": (
        "Llama",
        {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0},
        "sequence-classification",
        "SEQ_CLS",
        {"score"},
    ),
    "BartForConditionalGeneration": ("Bart", _BART, "seq2seq", "SEQ_2_SEQ_LM", {"lm_head"}),
    "BartForSequenceClassification": ("Bart", _BART, "sequence-classification", "SEQ_CLS", {"classification_head"}),
    "T5ForConditionalGeneration": ("T5", _T5, "seq2seq", "SEQ_2_SEQ_LM", {"lm_head"}),
    "T5EncoderModel": ("T5", _T5, "text-encoding", None, set()),
}


def _made(name: str, **changes: Any) -> Any:
    family, sizes, *_ = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes, **changes)).eval()


@pytest.mark.parametrize("name", MODELS)
def test_kind_task_and_head(name: str) -> None:
    model, (_, _, kind, task, head) = _made(name), MODELS[name]
    model.config.architectures = [name]
    found = kind_of(model.config)
    assert found == kind_of_model(model)
    assert (found.name, found.peft) == (kind, task)
    assert {each.rpartition(".")[2] for each in heads(model)} == head
    if kind in KINDS:
        assert class_of(model.config, found).startswith(type(model).__name__[:4])


@pytest.mark.parametrize("name", MODELS)
def test_all_but_the_head_is_quantized_and_what_trained_is_merged(name: str) -> None:
    model, (*_, task, head) = _made(name), MODELS[name]
    adapted = quadapt.prepare(model, rounding="nearest", group_size=16, rank=2)
    assert (adapted.peft_config["default"].task_type or None) == task
    trained = {each for each, parameter in adapted.named_parameters() if parameter.requires_grad}
    whole = {each for each in trained if "lora_" not in each}
    language = model.get_output_embeddings() is not None
    assert bool(whole) == (bool(head) and not language)
    assert all(any(f".{part}." in each for part in head) for each in whole)
    with torch.no_grad():
        for each, parameter in adapted.named_parameters():
            if each in trained:
                parameter += 0.1 * torch.randn_like(parameter)
    merged, certificate = quadapt.merge(adapted)
    assert certificate.verdict == "exact"
    assert certificate.logits_equal
    assert (certificate.perplexity_before is None) == (task != "CAUSAL_LM")
    assert type(merged).__name__ == name
    assert len(quantized_layers(merged)) > 4
    assert not any(part in layer.split(".") for layer in quantized_layers(merged) for part in head)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_a_merged_model_is_written_and_read(name: str, tmp_path: Path) -> None:
    merged, _ = quadapt.merge(quadapt.prepare(_made(name), rounding="nearest", group_size=16, rank=2))
    merged.save_pretrained(tmp_path)
    found = getattr(transformers, name).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, merged.state_dict()[key]) for key, tensor in found.state_dict().items())


def test_positions_are_those_that_tokens_may_have() -> None:
    assert positions_of(_made("BertForSequenceClassification")) == 64
    roberta = _made("RobertaForSequenceClassification")
    most = positions_of(roberta)
    assert most == 62  # two rows are in front of the first token's
    roberta(input_ids=torch.full((1, most), 7))
    with pytest.raises(Exception, match="index"):
        roberta(input_ids=torch.full((1, most + 1), 7))


def test_a_family_without_such_a_class_is_named() -> None:
    with pytest.raises(CheckpointError, match="'vit' have no class for the task seq2seq"):
        class_of(transformers.ViTConfig(), KINDS["seq2seq"])


@pytest.mark.parametrize("damage", [{"architectures": "BertModel"}, {"architectures": [1]}, {"auto_map": []}])
def test_a_damaged_config_is_refused(damage: dict[str, Any], tiny_llama: Callable[..., Any]) -> None:
    config = tiny_llama().config
    config.architectures = ["LlamaForCausalLM"]
    for name, value in damage.items():
        setattr(config, name, value or [0])
    with pytest.raises(CheckpointError, match="is damaged"):
        kind_of(config)
