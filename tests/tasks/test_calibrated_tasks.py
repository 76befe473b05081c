"""Roundings are calibrated on each task's own inputs, and training counts each label once, however it is batched."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import quadapt
from task_models import QUICK, made, reviews, sentence, word_tokenizer, write_lines

from quadapt.calibrate import named
from quadapt.hf.kinds import KINDS
from quadapt.methods import Run, method_named
from quadapt.tasks import TASKS, Reading
from quadapt.train import train

GPTQ = [each for each in QUICK if each not in ("--rounding", "nearest")]


def _sums(path: Path) -> Path:
    dice = random.Random(0)
    rows = [{"source": " ".join(sentence(dice)), "target": dice.choice(("red", "green"))} for _ in range(24)]
    return write_lines(path, rows)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BertForMaskedLM", "sequence-classification"),
        ("T5ForConditionalGeneration", "seq2seq"),
        ("BartForConditionalGeneration", "seq2seq"),
    ],
)
def test_gptq_is_calibrated_on_the_rows_of_the_task(name: str, task: str, folder: Callable[..., Path]) -> None:
    place = folder(made(name))
    data = _sums(place / "d.jsonl") if task == "seq2seq" else reviews(place / "d.csv", 24, 0)
    given = ("--task", task, "--data", data, *GPTQ, "--seq-len", "16", "--max-steps", "2")
    quadapt("tune", place / "dense", *given, "--output", place / "adapter")
    assert quadapt("merge", place / "adapter", "--output", place / "merged")["certificate"]["verdict"] == "exact"
    about = quadapt("inspect", place / "merged")["made"]
    assert about["rounding"]["kind"] == "gptq"
    assert about["calibration"]["sequences"] == 24


def test_a_quantized_classifier_errs_less_on_its_task_if_it_is_calibrated(folder: Callable[..., Path]) -> None:
    place = folder(made("BertForSequenceClassification"))
    data = reviews(place / "d.csv", 64, 0, labels=("0", "1"))
    grid = ("--bits", "2", "--group-size", "64")
    quadapt("quantize", place / "dense", *grid, "--rounding", "nearest", "--output", place / "nearest")
    quadapt("quantize", place / "dense", *grid, "--calibration-data", data, "--output", place / "gptq")
    from quadapt.hf.loading import load_model

    ids = word_tokenizer()(
        [line.split(",")[0] for line in data.read_text().splitlines()[1:]], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        dense, nearest, gptq = (
            load_model(str(place / each))(**ids, output_hidden_states=True).hidden_states[-1]
            for each in ("dense", "nearest", "gptq")
        )
    assert (gptq - dense).norm() < (nearest - dense).norm()


def test_batches_to_calibrate_on_are_inputs_without_more_padding_than_needed(tmp_path: Path) -> None:
    task, reading = TASKS["sequence-classification"](), Reading()
    data: Any = task.read([str(reviews(tmp_path / "d.csv", 20, 0))], reading)
    head: Any = task.head(made("BertForMaskedLM").config, KINDS["masked-lm"], data, reading)
    model = made("BertForSequenceClassification")
    model.config = head.onto(model.config)
    found = task.calibration(data, word_tokenizer(), model, length=16, sequences=12, at_least=None, reading=reading)
    assert [len(named(batch)["input_ids"]) for batch in found.batches] == [8, 4]
    assert found.sequences == 12
    assert set(named(found.batches[0])) == {"input_ids", "attention_mask", "labels"}
    again = task.calibration(data, word_tokenizer(), model, length=16, sequences=12, at_least=None, reading=reading)
    assert torch.equal(named(found.batches[0])["input_ids"], named(again.batches[0])["input_ids"])


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_a_step_is_the_same_however_it_is_accumulated(name: str, tmp_path: Path) -> None:
    """Examples differ in length, so a mean over batches of their means would be another."""
    dice = random.Random(0)
    rows = [{"text": " ".join(sentence(dice, (), count)), "label": str(count % 2)} for count in (1, 7, 2, 9)]
    if name.startswith("T5"):
        rows = [{"source": row["text"], "target": " ".join(sentence(dice, (), 1 + at))} for at, row in enumerate(rows)]
    task, reading = TASKS["seq2seq" if name.startswith("T5") else "sequence-classification"](), Reading()
    data = task.read([str(write_lines(tmp_path / "d.jsonl", rows))], reading)
    states = []
    for size, times in ((4, 1), (2, 2), (1, 4)):
        changes = {"dropout_rate": 0.0} if name.startswith("T5") else {"id2label": {0: "0", 1: "1"}}
        model = made(name, **changes)
        model.requires_grad_(True)
        examples = task.encode(data, word_tokenizer(), model.config, length=16, reading=reading).data
        recipe = method_named("qa-lora").recipe
        run = Run(recipe=recipe, max_steps=1, batch_size=size, gradient_accumulation=times)
        folder = tmp_path / f"{size}"
        found = train(
            model,
            examples,
            run,
            folder,
            collate=task.collator(word_tokenizer(), model),
            losses=task.losses(model.config),
        )
        states.append((found.final_loss, found.losses[0]["grad_norm"]))
    assert states[1] == pytest.approx(states[0], rel=1e-4)
    assert states[2] == pytest.approx(states[0], rel=1e-4)


def test_a_plan_by_fisher_information_goes_by_the_loss_of_the_labels(folder: Callable[..., Path]) -> None:
    place = folder(made("RobertaForSequenceClassification", id2label={0: "bad", 1: "good"}))
    data = reviews(place / "d.csv", 16, 0)
    found = quadapt("plan", place / "dense", "--budget", "4", "--fisher", data, "--output", place / "plan.json")
    assert found["layers"] == 12
    given = ("--plan", place / "plan.json", "--data", data, "--max-steps", "1", "--rank", "2", "--batch-size", "4")
    said = quadapt("tune", place / "dense", *given, "--output", place / "adapter")
    assert said["method"] == "lq-lora"
    assert said["bits"]["base"] <= 4


def test_a_model_by_name_is_calibrated_on_rows_of_its_task(folder: Callable[..., Path]) -> None:
    import quadapt as library

    place = folder(made("BertForSequenceClassification", id2label={0: "bad", 1: "good"}))
    data = reviews(place / "d.csv", 16, 0)
    model = library.prepare(str(place / "dense"), calibration=str(data), group_size=16, rank=2)
    assert library.merge(model)[1].verdict == "exact"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_head_trains_in_float32_and_the_merge_is_exact(
    dtype: torch.dtype, folder: Callable[..., Path]
) -> None:
    place = folder(made("BertForMaskedLM").to(dtype))
    data = reviews(place / "d.csv", 16, 0)
    given = ("--task", "sequence-classification", "--data", data, *QUICK, "--seq-len", "16", "--max-steps", "3")
    quadapt("tune", place / "dense", *given, "--lr", "0.001", "--output", place / "adapter")
    found = quadapt("merge", place / "adapter", "--output", place / "merged")["certificate"]
    assert (found["verdict"], found["dtype"]) == ("exact", str(dtype).removeprefix("torch."))
    from quadapt.hf.loading import load_model

    base, merged = (load_model(str(each)).state_dict() for each in (place / "adapter" / "base", place / "merged"))
    assert merged["classifier.weight"].dtype == dtype
    assert not torch.equal(base["classifier.weight"], merged["classifier.weight"])
