"""Encoders go on with their pretraining: hidden words are drawn by the seed, learnt, and measured."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import give, quadapt
from task_models import QUICK, made, word_tokenizer, write_csv, write_lines

from quadapt.tasks import TASKS, Reading

TEXTS = ("sun saw sea", "owl saw fox", "Ann saw Bob", "red owl", "green fox")


def _texts(path: Path, count: int, seed: int) -> Path:
    dice = random.Random(seed)
    return write_lines(path, [{"text": " ".join(dice.choice(TEXTS) for _ in range(3))} for _ in range(count)])


def test_hidden_words_are_learnt(folder: Callable[..., Path]) -> None:
    place = folder(made("BertForMaskedLM"))
    data = ("--data", _texts(place / "a.jsonl", 96, 0), "--eval-data", _texts(place / "b.jsonl", 32, 1))
    before = quadapt("eval", place / "dense", "--data", place / "b.jsonl")
    more = ("--lr", "0.003", "--seq-len", "16", "--epochs", "4", "--output", place / "adapter")
    said = quadapt("tune", place / "dense", *data, *QUICK, *more)
    assert said["task"] == "masked-lm"
    assert quadapt("merge", place / "adapter", "--output", place / "merged")["certificate"]["verdict"] == "exact"
    after = quadapt("eval", place / "merged", "--data", place / "b.jsonl")
    assert after["loss"] < 0.7 * before["loss"]
    assert after["hidden"] == before["hidden"]


def test_what_is_hidden_is_drawn_once_and_long_texts_are_cut_into_windows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": " ".join(["sun", "sea"] * 30)}])
    task, tokenizer = TASKS["masked-lm"](), word_tokenizer()
    data: Any = task.read([str(path)], Reading())
    one, again, other = (
        task.encode(data, tokenizer, None, length=22, reading=Reading(seed=seed)).data.to_list() for seed in (0, 0, 1)
    )
    assert one == again != other
    assert len(one) == 3
    whole = tokenizer(" ".join(["sun", "sea"] * 10))["input_ids"]
    for row in one:
        shown = [
            label if label != -100 else token for token, label in zip(row["input_ids"], row["labels"], strict=True)
        ]
        assert shown == whole
        assert row["labels"][0] == row["labels"][-1] == -100


def test_loss_is_that_of_the_model(tmp_path: Path) -> None:
    task, tokenizer, model = TASKS["masked-lm"](), word_tokenizer(), made("BertForMaskedLM")
    data: Any = task.read([str(_texts(tmp_path / "a.jsonl", 6, 0))], Reading())
    examples = task.encode(data, tokenizer, model.config, length=16, reading=Reading()).data
    batch = dict(task.collator(tokenizer, model)(list(examples)))
    with torch.no_grad():
        found = model(**batch)
    losses: Any = task.losses(model.config)
    summed, counted = losses(found.logits, batch["labels"]).sum(0)
    assert float(summed / counted) == pytest.approx(float(found.loss), rel=1e-5)


def test_other_rows_ask_for_a_task(folder: Callable[..., Path]) -> None:
    place = folder(made("BertForMaskedLM"))
    write_csv(place / "a.csv", ("prompt", "completion"), [("sun", "sea")])
    said = give("tune", place / "dense", "--data", place / "a.csv", "--output", place / "out", code=2).error
    assert "words are hidden in texts" in said
    assert "--task" in said
    write_csv(place / "a.csv", ("review", "label"), [("sun", "good")])
    said = give("tune", place / "dense", "--data", place / "a.csv", "--output", place / "out", code=2).error
    assert "the columns are review, label" in said
    assert "something else than hidden words, say it: --task" in said


def test_a_bare_encoder_is_not_measured(folder: Callable[..., Path]) -> None:
    place = folder(made("BertModel"))
    data = _texts(place / "a.jsonl", 2, 0)
    said = give("eval", place / "dense", "--data", data, code=2).error
    assert "of the kind features does nothing that could be measured by itself. Tune it for a task first" in said
    said = give("tune", place / "dense", "--data", data, "--output", place / "out", code=2).error
    assert "what the model is to be trained for is not clear" in said
