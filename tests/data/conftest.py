"""Tokenizers small enough to read, made here."""

import json

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quadapt.data.read import Rows, _dataset

SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'\"#/-_()"


def wrap(tokenizer, **special):
    post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = post
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **special
    )


@pytest.fixture
def chars():
    """A token for each character; BOS is put before a text; there is no pad token."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    return wrap(tokenizer)


@pytest.fixture
def pieces():
    """Like Llama's: a space goes into the token after it, one is put before the first word, and line ends merge."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    corpus = ["Answer: yes", "Answer: no", "the answer is yes", "yes and no\n\nno and yes\n\n"] * 50
    trainer = trainers.BpeTrainer(vocab_size=110, special_tokens=SPECIAL, initial_alphabet=[*CHARACTERS, "▁"])
    tokenizer.train_from_iterator(corpus, trainer)
    return wrap(tokenizer)


@pytest.fixture
def make_rows():
    """Rows from plain values: texts, pairs, or lists of (role, content)."""

    def make(kind, values):
        columns = {
            "text": lambda value: {"text": value},
            "prompt-completion": lambda value: {"prompt": value[0], "completion": value[1]},
            "messages": lambda value: {
                "messages": json.dumps([{"role": role, "content": text} for role, text in value]),
                "tools": "[]",
            },
        }
        rows = [columns[kind](value) | {"where": f"data:{line}"} for line, value in enumerate(values, start=1)]
        return Rows(kind, _dataset(rows, kind), "data")

    return make


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps copies of Parquet files; not in the user's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
