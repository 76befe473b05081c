"""Tiny models of each kind, a tokenizer of words, and data that such models learn in seconds."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = ("sun", "sea", "owl", "fox", "good", "bad", "Ann", "Bob", "saw", "red", "green", "one", "two", "three")
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {**SIZES, "vocab_size": len(MARKS) + len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0}
T5 = {
    "vocab_size": TEXT["vocab_size"],
    "d_model": 64,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 16,
    "pad_token_id": 0,
    "eos_token_id": 3,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": TEXT["vocab_size"],
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": None,
}
LLAMA = {**TEXT, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 2, "eos_token_id": 3}
PIXELS = {**SIZES, "image_size": 16, "patch_size": 4}
STILL = {"initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "Bert": TEXT | STILL,
    "Roberta": TEXT | STILL,
    "Llama": LLAMA,
    "T5": T5,
    "Bart": BART,
    "ViT": PIXELS | STILL,
}

QUICK = (
    "--rounding",
    "nearest",
    "--group-size",
    "16",
    "--rank",
    "4",
    "--batch-size",
    "8",
    "--gradient-accumulation",
    "1",
)
"""Settings of a run that takes seconds; `--method` is the usual one for such tasks."""


def word_tokenizer() -> Any:
    """A token for each word, with BERT's marks around a text, or around a pair of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate((*MARKS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), MARKS, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", **names)


def made(name: str, **changes: Any) -> Any:
    """A random model of a class of transformers."""
    family = next(family for family in CONFIGS if name.startswith(family))
    torch.manual_seed(0)
    return getattr(transformers, name)(
        getattr(transformers, f"{family}Config")(**{**CONFIGS[family], **changes})
    ).eval()


def sentence(dice: random.Random, extra: Sequence[str] = (), count: int = 4) -> list[str]:
    """Random words, among which `extra` stands somewhere."""
    words = [dice.choice(("sun", "sea", "owl", "fox", "saw", "red")) for _ in range(count)]
    for word in extra:
        words.insert(dice.randrange(len(words) + 1), word)
    return words


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(path: Path, count: int, seed: int, labels: Sequence[str] = ("bad", "good")) -> Path:
    """A table of texts that are good or bad by one word in them."""
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        at = dice.randrange(2)
        rows.append((" ".join(sentence(dice, [("bad", "good")[at]])), labels[at]))
    return write_csv(path, ("review", "label"), rows)
