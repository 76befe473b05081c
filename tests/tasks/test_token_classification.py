"""Words get their tags: aligned with tokens, tuned, merged, measured by words and by entities."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import give, quadapt
from task_models import QUICK, made, sentence, word_tokenizer, write_lines

import quadapt as library
from quadapt.errors import DataError
from quadapt.hf.kinds import KINDS
from quadapt.tasks import TASKS, Reading

TUNE = ("--task", "token-classification", *QUICK, "--lr", "0.002", "--seq-len", "16")


def _people(path: Path, count: int, seed: int) -> Path:
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        words = sentence(dice, [dice.choice(("Ann", "Bob"))])
        rows.append({"tokens": words, "ner_tags": ["B-PER" if word in ("Ann", "Bob") else "O" for word in words]})
    return write_lines(path, rows)


def test_names_are_found_and_merging_keeps_it(folder: Callable[..., Path]) -> None:
    place = folder(made("BertForMaskedLM"))
    data = ("--data", _people(place / "train.jsonl", 96, 0), "--eval-data", _people(place / "test.jsonl", 32, 1))
    said = quadapt("tune", place / "dense", *data, *TUNE, "--epochs", "4", "--output", place / "adapter")
    merged = quadapt("merge", place / "adapter", "--output", place / "merged")
    assert merged["certificate"]["verdict"] == "exact"
    found = quadapt("eval", place / "merged", "--data", place / "test.jsonl")
    assert found["entities"]["f1"] > 0.9
    assert found["metrics"]["accuracy"] > 0.95
    assert found["loss"] == pytest.approx(said["eval_loss"], rel=1e-4)
    model: Any = library.load(place / "merged")[0]
    assert list(model.config.id2label.values()) == ["B-PER", "O"]
    with torch.no_grad():
        logits = model(**word_tokenizer()("sun sea Ann saw owl", return_tensors="pt")).logits[0]
    assert [model.config.id2label[int(tag)] for tag in logits.argmax(-1)[1:-1]] == ["O", "O", "B-PER", "O", "O"]


def test_the_first_token_of_a_word_bears_its_tag(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "play", "##ing", "chess", "##men"))}
    inner = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    path = write_lines(tmp_path / "a.jsonl", [{"words": ["playing", "chess", "chessmen"], "tags": ["V", "N", "N"]}])
    task, reading = TASKS["token-classification"](), Reading()
    data: Any = task.read([str(path)], reading)
    head: Any = task.head(made("BertForMaskedLM").config, KINDS["masked-lm"], data, reading)
    config = head.onto(made("BertForMaskedLM").config)
    found = task.encode(data, tokenizer, config, length=16, reading=reading)
    assert found.data[0]["input_ids"] == [2, 3, 4, 4, 5]
    assert found.data[0]["labels"] == [1, -100, 0, 0, -100]
    cut = task.encode(data, tokenizer, config, length=3, reading=reading)
    assert cut.data[0]["labels"] == [1, -100, 0]
    assert (cut.report.truncated, cut.report.tokens_lost, cut.report.loss_tokens) == (1, 1, 2)
    batch = task.collator(tokenizer, made("BertForTokenClassification"))([found.data[0], cut.data[0]])
    assert batch["labels"].tolist() == [[1, -100, 0, 0, -100], [1, -100, 0, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["sun"], "tags": ["A", "B"]}, "has 1 words and 2 tags"),
        ({"tokens": "sun sea", "tags": ["A", "B"]}, "column 'words': must be a list"),
        ({"tokens": ["sun", 3], "tags": ["A", "B"]}, "must be text"),
        ({"tokens": ["sun", "sea"]}, "no column has the tags"),
        ({"text": "sun", "tags": ["A"]}, "no column has the words"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=words):
        TASKS["token-classification"]().read([str(path)], Reading(max_bad_rows=0))


def test_a_single_tag_cannot_be_learnt(folder: Callable[..., Path]) -> None:
    place = folder(made("BertForMaskedLM"))
    write_lines(place / "a.jsonl", [{"tokens": ["sun"], "tags": ["O"]}])
    given = ("--data", place / "a.jsonl", *TUNE, "--output", place / "out")
    assert "every row has the label O" in give("tune", place / "dense", *given, code=2).error
