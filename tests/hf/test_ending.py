"""What ends an answer is found in the chat template, and known wherever a model is loaded or written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from quadapt.errors import CheckpointError
from quadapt.hf.ending import set_ends, turn_end
from quadapt.hf.loading import load
from quadapt.hf.saving import save_quantized
from quadapt.hf.vocabulary import alike, check_vocabulary, embedding_rows

MARKS = ["<|ask|>", "<|say|>", "<|over|>"]
CHAT = "{% for m in messages %}<|ask|>{{ m['role'] }}: {{ m['content'] }}END{% endfor %}"


def speaker(template: str | None = None) -> Any:
    """Bytes, `</s>` at 0, three marks behind them."""
    tokens = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    found.add_special_tokens({"additional_special_tokens": MARKS})
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    ("end", "token"),
    [
        ("<|over|>\n", "<|over|>"),
        ("</s>", "</s>"),
        (" \n<|over|>", "<|over|>"),
        ("\n", None),
        (" over. <|over|>", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_special_token_behind_what_the_assistant_says(end: str, token: str | None) -> None:
    tokenizer = speaker(CHAT.replace("END", end))
    assert turn_end(tokenizer) == (None if token is None else tokenizer.convert_tokens_to_ids(token))
    assert turn_end(speaker(None)) is None


def test_it_is_added_to_the_ends_that_a_model_has(tiny_llama: Callable[..., Any]) -> None:
    tokenizer, model = speaker(CHAT.replace("END", "<|over|>")), tiny_llama(vocab_size=260)
    model.generation_config.eos_token_id = 7
    set_ends(model, tokenizer)
    assert model.generation_config.eos_token_id == [7, 0, 259]
    set_ends(model, tokenizer)
    assert model.generation_config.eos_token_id == [7, 0, 259]
    small = tiny_llama(vocab_size=258)
    small.generation_config.eos_token_id = 0
    set_ends(small, tokenizer)
    assert small.generation_config.eos_token_id == 0, "an end that has no row is none"


def test_a_model_that_is_written_ends_there(quantized_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = quantized_llama(vocab_size=260)
    model.generation_config.eos_token_id = 0
    save_quantized(model, speaker(CHAT.replace("END", "<|over|>")), tmp_path, {})
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [0, 259]
    again, tokenizer = load(str(tmp_path))
    head: Any = again.get_output_embeddings()  # type: ignore[operator]
    head.weight = nn.Parameter(torch.zeros_like(head.weight))
    head.weight.data[259] = 1e-3 * torch.ones(64)  # the end or not at all: ties go to token 0, which ends too
    ids: Any = again.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False)  # type: ignore[operator]
    assert ids.shape[1] == 3
    assert tokenizer.chat_template


def test_rows_that_no_training_has_told_apart_are_counted(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    rows = model.get_output_embeddings().weight.data
    assert alike(model, 5) == 0
    rows[[9, 30, 31]] = rows[5] * (1 + 1e-4 * torch.randn(3, 1))
    assert [alike(model, token) for token in (5, 9, 6)] == [3, 3, 0]
    rows[40:50] = 0
    assert alike(model, 44) == 9
    assert alike(tiny_llama(tie_word_embeddings=True), 3) == 0


def test_a_tokenizer_larger_than_the_model_is_refused_but_for_padding(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(vocab_size=258)
    assert embedding_rows(model) == 258
    tokenizer = speaker()
    assert check_vocabulary(tokenizer, 260) == ""
    with pytest.raises(CheckpointError, match=r"has a token 258 \('<\|say\|>'\) and 1 more, the model 258 rows"):
        check_vocabulary(tokenizer, 258)
    tokenizer.pad_token = "<|over|>"
    assert "<|over|> (259) has no row among the model's 259; </s> pads" in check_vocabulary(tokenizer, 259)
    tokenizer.eos_token = "<|over|>"
    with pytest.raises(CheckpointError):
        check_vocabulary(tokenizer, 259)


def test_loading_refuses_such_a_pair(quantized_llama: Callable[..., Any], tmp_path: Path) -> None:
    save_quantized(quantized_llama(vocab_size=258), speaker(), tmp_path, {})
    with pytest.raises(CheckpointError, match="do not belong together"):
        load(str(tmp_path))
