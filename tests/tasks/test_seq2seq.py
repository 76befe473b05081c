"""Encoder-decoders learn to write one text from another; what they write is measured, and merging keeps all of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import give, quadapt
from task_models import QUICK, made, word_tokenizer, write_lines

import quadapt as library
from quadapt.tasks import TASKS, Reading
from quadapt.tasks.labels import cross_entropy

NAMES = ["T5ForConditionalGeneration", "BartForConditionalGeneration"]
SHORT = (*QUICK, "--lr", "0.003", "--seq-len", "16")


def _questions(path: Path, count: int, seed: int) -> Path:
    """Sources with a colour in them, and the colour as the target."""
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        colour = dice.choice(("red", "green"))
        rows.append(
            {"source": f"{dice.choice(('sun', 'sea'))} {dice.choice(('owl', 'fox'))} {colour}", "target": colour}
        )
    return write_lines(path, rows)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """`places(name)`: a folder with a dense model, its adapter and the merged model, and what the commands said."""
    known: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            made(name).save_pretrained(folder / "dense")
            word_tokenizer().save_pretrained(folder / "dense")
            data = (
                "--data",
                _questions(folder / "train.jsonl", 96, 0),
                "--eval-data",
                _questions(folder / "t.jsonl", 24, 1),
            )
            said = {
                "tune": quadapt(
                    "tune", folder / "dense", *data, *SHORT, "--epochs", "3", "--output", folder / "adapter"
                ),
                "merge": quadapt("merge", folder / "adapter", "--output", folder / "merged"),
                "eval": quadapt("eval", folder / "merged", "--data", folder / "t.jsonl", "--max-new-tokens", "4"),
            }
            known[name] = folder, said
        return known[name]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_what_was_trained_is_what_is_merged(name: str, places: Any) -> None:
    folder, said = places(name)
    assert said["tune"]["task"] == "seq2seq"
    assert said["merge"]["certificate"]["verdict"] == "exact"
    losses = [entry["eval_loss"] for entry in said["tune"]["losses"] if "eval_loss" in entry]
    assert min(losses) < 0.8 * losses[0]
    inputs = word_tokenizer()(["sun red"], return_tensors="pt")
    with torch.no_grad():
        one, other = (
            library.load(folder / each)[0](
                input_ids=inputs["input_ids"], decoder_input_ids=torch.tensor([[0, 5]])
            ).logits
            for each in ("adapter", "merged")
        )
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_that_of_the_model_and_answers_are_those_of_generate(name: str, places: Any) -> None:
    folder, said = places(name)
    model: Any = library.load(folder / "merged")[0]
    rows = [json.loads(line) for line in (folder / "t.jsonl").read_text().splitlines()]
    tokenizer = word_tokenizer()
    total = tokens = correct = 0
    for row in rows:
        ids = tokenizer(row["source"], return_tensors="pt")["input_ids"]
        labels = tokenizer(row["target"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * labels.numel()
            written = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, num_beams=1)
        tokens += labels.numel()
        correct += tokenizer.decode(written[0], skip_special_tokens=True).strip() == row["target"]
    assert said["eval"]["perplexity"]["tokens"] == tokens
    assert said["eval"]["perplexity"]["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert said["tune"]["eval_loss"] == pytest.approx(total / tokens, rel=1e-3)
    assert said["eval"]["exact_match"]["correct"] == correct
    assert len(said["eval"]["exact_match"]["samples"]) == 3


def test_t5_needs_no_layer_to_be_named(places: Any) -> None:
    folder, _ = places(NAMES[0])
    left = json.loads((folder / "merged" / "config.json").read_text())["quantization_config"]["left"]
    kept = {name.rpartition(".")[2] for name, why in left.items() if "float32" in why}
    assert kept == {"wo"}  # whose dtype T5 reads in code of its own
    assert left["lm_head"] == "output head"


def test_examples_keep_their_end_when_they_are_cut(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", [{"prompt": " ".join(["sun"] * 9), "completion": "red green one two three"}]
    )
    task, tokenizer = TASKS["seq2seq"](), word_tokenizer()
    data: Any = task.read([str(path)], Reading())
    found = task.encode(data, tokenizer, None, length=4, reading=Reading())
    assert tokenizer.decode(found.data[0]["input_ids"]) == "[CLS] sun sun [SEP]"
    assert tokenizer.decode(found.data[0]["labels"]) == "[CLS] red green [SEP]"
    assert (found.report.truncated, found.report.tokens_lost) == (1, 7 + 3)


def test_each_example_counts_by_its_tokens() -> None:
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, 2:] = labels[1, 4:] = -100
    found = cross_entropy(logits, labels)
    whole = torch.nn.functional.cross_entropy(logits.view(-1, 7), labels.view(-1))
    assert found[:, 1].tolist() == [2, 4, 5]
    assert float(found[:, 0].sum() / found[:, 1].sum()) == pytest.approx(float(whole), rel=1e-5)


def test_texts_alone_are_refused(folder: Callable[..., Path]) -> None:
    place = folder(made(NAMES[0]))
    (place / "text.txt").write_text("sun sea owl\n")
    given = ("--data", place / "text.txt", *SHORT, "--output", place / "out")
    said = give("tune", place / "dense", *given, code=2).error
    assert "holds text rows, and a model that writes one text from another needs both" in said
