"""Small benchmark files, and a model whose answers are known."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _harness() -> None:
    pytest.importorskip("lm_eval", reason="comes with the extra eval")


def commonsense(word: str, question: str, choices: list[str], right: int) -> dict[str, str]:
    """A row in the form of LLM-Adapters."""
    listed = " ".join(f"{word.capitalize()}{at}: {choice}" for at, choice in enumerate(choices, 1))
    form = "/".join(f"{word}{at}" for at in range(1, len(choices) + 1))
    answer = f"{word}{right + 1}"
    asked = f"Please choose the correct answer to the question: {question}"
    return {
        "instruction": f"{asked}\n\n{listed}\n\nAnswer format: {form}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


SUBJECTS = ("anatomy", "virology")
ARC = [
    commonsense("answer", f"Which is number {at}?", ["a", "bb", "c c c", f"{at}d"][: 3 + at % 2], at % 3)
    for at in range(13)
]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of benchmark files: two subjects of MMLU in its two forms, ARC, BoolQ and GSM8K."""
    folder = tmp_path_factory.mktemp("files")
    for subject, named in zip(SUBJECTS, (True, False), strict=True):
        for split, count in (("dev", 5), ("test", 7 if named else 4)):
            place = folder / "mmlu" / split
            place.mkdir(parents=True, exist_ok=True)
            rows = [
                [
                    f"{subject} {split} {at}, is it?",
                    "one",
                    "two",
                    "three, or so",
                    "four",
                    at % 4 if named else "ABCD"[at % 4],
                ]
                for at in range(count)
            ]
            with (place / f"{subject}_{split}.csv").open("w", newline="") as file:
                header = [["question", "choice0", "choice1", "choice2", "choice3", "answer"]] if named else []
                csv.writer(file).writerows([*header, *rows])
    truths = [
        {
            "instruction": f"Please answer the following question with true or false, question: is {at} even?\n\n"
            "Answer format: true/false",
            "answer": "true" if at % 2 == 0 else "false",
        }
        for at in range(9)
    ]
    for name, rows in (("ARC-Easy", ARC), ("boolq", truths)):
        for split in ("train", "test"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{split}.json").write_text(json.dumps(rows))
    (folder / "gsm8k").mkdir()
    sums = [
        {"question": f"What is {at}?", "answer": f"It is so.\n#### {'7' * 8 if at % 3 == 0 else at}"} for at in range(8)
    ]
    (folder / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return folder


@pytest.fixture(scope="session")
def constant(tiny_llama: Callable[..., Any]) -> Callable[[torch.Tensor], Any]:
    """`constant(scores)`: a model whose logits are these, whatever it reads."""

    def make(scores: torch.Tensor) -> Any:
        model = tiny_llama(vocab_size=len(scores), max_position_embeddings=2048, bos_token_id=None, eos_token_id=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()
            model.model.embed_tokens.weight.fill_(1.0)
            model.model.norm.weight.zero_()
            model.model.norm.weight[0] = 1.0
            model.lm_head.weight.zero_()
            model.lm_head.weight[:, 0] = scores
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A token for each byte, and one for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
