"""Models that see, trained on chats with pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import give, quadapt
from talk_models import COLOURS, MODELS, template, write_pictures

from quadapt.data.collate import NO_LOSS
from quadapt.errors import DataError
from quadapt.hf.loading import load_model
from quadapt.tasks import Reading
from quadapt.tasks.talks import ImageTextToText, Processor

TASK = ImageTextToText()
SHORT = ("--seq-len", "128", "--batch-size", "4", "--gradient-accumulation", "1", "--rank", "4", "--lr", "0.02")


@pytest.fixture(params=MODELS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model, processor = MODELS[request.param]()
    model.save_pretrained(tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    write_pictures(tmp_path)
    return tmp_path


def read(folder: Path, *rows: dict[str, Any]) -> Any:
    """Rows as the task reads them from a file."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TASK.read([str(folder / "rows.jsonl")], Reading())


def asked(picture: str, question: str) -> list[dict[str, str]]:
    return [{"type": "image", "image": picture}, {"type": "text", "text": question}]


def test_answers_alone_bear_loss_as_the_marks_of_the_template_say(place: Path) -> None:
    from transformers import AutoProcessor

    talk = [
        {"role": "user", "content": asked("red-0.png", "Which colour is it?")},
        {"role": "assistant", "content": "red, I think"},
        {"role": "user", "content": asked("green-1.png", "red? And this?")},
        {"role": "assistant", "content": "green"},
    ]
    data = read(place, {"messages": talk}, {"messages": talk[:2]})
    processor = AutoProcessor.from_pretrained(place / "dense")
    found = TASK.encode(data, processor.tokenizer, None, length=256, reading=Reading())
    batch = TASK.collator(processor, MODELS["llava"]()[0])([found.data[0], found.data[1]])
    said = [processor.tokenizer.decode(row[row != NO_LOSS]) for row in batch["labels"]]
    assert said == ["red, I think<|im_end|>\ngreen<|im_end|>\n", "red, I think<|im_end|>\n"]
    assert found.report.loss_tokens == int((batch["labels"] != NO_LOSS).sum())
    picture = "<start>" if "Gemma3" in type(processor).__name__ else "<image>"
    shown = [
        {**turn, "content": [_shown(part, place) for part in turn["content"]]} if at % 2 == 0 else turn
        for at, turn in enumerate(talk)
    ]
    by_marks = processor.apply_chat_template(
        shown,
        chat_template=template(picture, marked=True),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert batch["input_ids"][0].tolist() == by_marks["input_ids"][0]
    assert (batch["labels"][0] != NO_LOSS).long().tolist() == list(by_marks["assistant_masks"][0])


def _shown(part: dict[str, str], folder: Path) -> dict[str, str]:
    return {"type": "image", "path": str(folder / part["image"])} if part["type"] == "image" else part


def test_pictures_stand_where_the_data_have_them(place: Path) -> None:
    one = {"role": "user", "content": asked("red-0.png", "Which?")}
    answer = {"role": "assistant", "content": "red"}
    forms: list[dict[str, Any]] = [
        {"messages": [one, answer]},
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}, answer],
            "images": ["red-0.png"],
        },
        {
            "image": "red-0.png",
            "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}],
        },
        {"image": "red-0.png", "question": "Which?", "answer": "red"},
    ]
    rows = [read(place, form).rows[0] for form in forms]
    assert all(row == rows[0] for row in rows)
    assert rows[0]["pictures"] == [str(place / "red-0.png")]
    assert rows[0]["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "Which?"}]


WRONG = [
    (
        {"image": "none.png", "prompt": "Which?", "completion": "red"},
        "names the picture .*none.png, which is not there",
    ),
    ({"image": "https://example.org/a.png", "prompt": "a", "completion": "b"}, "Download it, and write its path"),
    ({"image": "red-0.png", "text": "red"}, "has a text alone"),
    ({"image": "red-0.png", "prompt": "<image><image>", "completion": "b"}, "has 1 pictures, and 2 places"),
    ({"prompt": "<image> what?", "completion": "b"}, "has 0 pictures, and 1 places"),
    ({"image": "red-0.png", "prompt": "what?", "completion": "<image>"}, "has a picture in an answer"),
]


@pytest.mark.parametrize(("row", "words"), WRONG, ids=range(len(WRONG)))
def test_rows_that_cannot_be_used_are_named(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_pictures(tmp_path)
    with pytest.raises(DataError, match=words):
        read(tmp_path, row)


def test_long_examples_are_counted_and_left_out(place: Path) -> None:
    long = {"image": "red-0.png", "prompt": "which? " * 40, "completion": "red"}
    data = read(place, long, {**long, "prompt": "which?"})
    processor = MODELS["llava"]()[1]
    found = TASK.encode(data, processor, None, length=64, reading=Reading())
    assert len(found.data) == 1
    assert found.report.dropped == 1
    assert "1 examples are longer than 64 tokens" in " ".join(found.report.notes)


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    tokenizer = MODELS["llava"]()[1].tokenizer
    tokenizer.chat_template = template("<image>")
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    with pytest.raises(DataError, match="processor"):
        Processor(AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("part", ["text", "all"])
def test_tuned_merged_and_measured(place: Path, part: str) -> None:
    talks = ("--task", "image-text-to-text", "--data", place / "talks.jsonl")
    grid = ("--method", "qa-lora", "--rounding", "gptq", "--bits", "4", "--part", part)
    calibration = ("--calibration-sequences", "8", "--calibration-length", "128")
    tuned = quadapt(
        "tune", place / "dense", *talks, *grid, *calibration, *SHORT, "--max-steps", "20", "--output", place / "a"
    )
    assert tuned["task"] == "image-text-to-text"
    assert quadapt("merge", place / "a", "--output", place / "m")["certificate"]["verdict"] == "exact"
    found = quadapt("eval", place / "m", "--data", place / "talks.jsonl")
    assert found["perplexity"]["tokens"] == sum(len(name) + 2 for name in COLOURS) * 4
    assert found["exact_match"]["count"] == 12
    assert found["perplexity"]["loss"] < 4 < math.log(272)
    quantized = load_model(str(place / "m")).config.quantization_config.left
    assert any("vis" in name and "fc1" in name for name in quantized) == (part == "text")


def test_text_alone_names_the_task_for_pictures(place: Path) -> None:
    found = give("tune", place / "dense", "--data", place / "talks.jsonl", *SHORT, "--output", place / "a", code=2)
    assert "--task image-text-to-text" in found.err
