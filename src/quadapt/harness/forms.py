"""Rows of benchmark files as the harness's tasks read them: one form for each data set, by its name on the hub.

MMLU's CSV files are the original ones (no header, letters for answers) or have a header and numbers; GSM8K's are the
original JSONL. The commonsense tasks are in the JSON of LLM-Adapters, which puts a question, its choices and the format
of the answer into one instruction::

    Please choose the correct answer to the question: <question>

    Answer1: <choice> Answer2: <choice> Answer3: <choice>

    Answer format: answer1/answer2/answer3

Here an instruction is taken apart again, and the harness asks in its own words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quadapt.errors import DataError

Row = Mapping[str, Any]
"""One row of a file, by the names of its columns."""


@dataclass(frozen=True)
class Form:
    """How the files of one data set are found, and what becomes of their rows."""

    names: tuple[str, ...]
    """Ends of the paths of its files, with `{split}` for a split."""

    fields: Callable[[Row], dict[str, Any]]
    """Makes the fields that the harness's task reads of one row; raises DataError if it cannot."""

    asked: tuple[str, ...] = ("test", "validation", "val", "dev")
    """Splits that hold questions, the first that there is being asked."""

    shown: tuple[str, ...] = ("train",)
    """Splits that hold examples for few-shot prompts, the first that there is being shown."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the harness's task that are replaced, as the files lack something."""

    note: str = ""
    """What is said of figures that come of such files; empty if they are those of the harness."""


def form_of(config: Mapping[str, Any]) -> Form | None:
    """The form of local files for a task of the harness; None if there is none.

    Args:
        config: The harness's configuration of the task, of which the name of the data set counts.
    """
    where, name = str(config.get("dataset_path")), str(config.get("dataset_name"))
    if where == "cais/mmlu" and name != "None":
        return Form((f"{name}_{{split}}.csv",), mmlu, asked=("test", "val"), shown=("dev",))
    return FORMS.get((where, name)) or FORMS.get((where, ""))


def choices_of(row: Row) -> tuple[str, list[str], int]:
    """An instruction of LLM-Adapters, taken apart: the question, its choices, and the number of the right one.

    Raises:
        DataError: It is not of the form that the module describes.
    """
    text, answer = _instruction(row)
    body, found, form = text.rpartition("Answer format:")
    words = [word.strip() for word in form.split("/")]
    if not found or answer not in words:
        raise DataError(f"its answer {answer!r} is none of the answer format {form.strip()!r}")
    question, rest = "", body
    choices = []
    for number, word in enumerate(words):
        before, mark, rest = rest.partition(f"{word.capitalize()}: ")
        if not mark:
            raise DataError(f"its instruction has no {word.capitalize()!r}, which its answer format names")
        if number == 0:
            question = before
        else:
            choices.append(before)
    choices.append(rest)
    _, _, question = question.partition(": ")
    return question.strip(), [choice.strip() for choice in choices], words.index(answer)


def mmlu(row: Row) -> dict[str, Any]:
    """A question of MMLU: `question`, four `choices`, and `answer`, the number of the right one."""
    answer = str(row["answer"]).strip()
    number = "ABCD".find(answer) if len(answer) == 1 and answer.isalpha() else int(answer) if answer.isdigit() else -1
    if not 0 <= number < 4:
        raise DataError(f"its answer is {answer!r}, not one of A to D or 0 to 3")
    return {"question": row["question"], "choices": [row[f"choice{at}"] for at in range(4)], "answer": number}


def gsm8k(row: Row) -> dict[str, Any]:
    """A problem of GSM8K: `question`, and `answer`, which ends in `#### ` and the number."""
    if "####" not in str(row.get("answer")):
        raise DataError("its answer does not end in '#### ' and a number, as those of GSM8K do")
    return {"question": row["question"], "answer": row["answer"]}


def lettered(row: Row) -> dict[str, Any]:
    """A question of ARC or OpenBookQA, with its choices by letters."""
    question, choices, right = choices_of(row)
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    key = {"text": choices, "label": letters}
    return {"question": question, "question_stem": question, "choices": key, "answerKey": letters[right]}


def piqa(row: Row) -> dict[str, Any]:
    """A goal of PIQA with its two solutions."""
    question, choices, right = choices_of(row)
    return {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": right}


def winogrande(row: Row) -> dict[str, Any]:
    """A sentence of WinoGrande with a blank `_` and two options for it."""
    sentence, choices, right = choices_of(row)
    if "_" not in sentence:
        raise DataError("its sentence has no blank, '_'")
    return {"sentence": sentence, "option1": choices[0], "option2": choices[1], "answer": str(right + 1)}


def social_iqa(row: Row) -> dict[str, Any]:
    """A situation of Social IQa and a question about it, which LLM-Adapters joined with a space.

    The harness's prompt joins them with a space as well, so the prompt is the same wherever they are cut.
    """
    text, choices, right = choices_of(row)
    context, _, question = text.partition(" ")
    answers = {f"answer{letter}": choice for letter, choice in zip("ABC", choices, strict=True)}
    return {"context": context, "question": question, **answers, "label": str(right + 1)}


def hellaswag(row: Row) -> dict[str, Any]:
    """A beginning of HellaSwag with four endings.

    Its last, unfinished sentence is `ctx_b`, which the harness capitalizes; of WikiHow texts (with marks in brackets)
    there is none. LLM-Adapters joined it to what stands before; it begins with a small letter.
    """
    text, endings, right = choices_of(row)
    label, _, context = text.partition(": ")
    before, stop, last = context.rpartition(". ")
    unfinished = bool(stop) and last[:1].islower() and "[" not in context
    parts = (f"{before}.", last) if unfinished else (context, "")
    return {"activity_label": label, "ctx_a": parts[0], "ctx_b": parts[1], "endings": endings, "label": str(right)}


def boolq(row: Row) -> dict[str, Any]:
    """A question of BoolQ, without the passage that it is about: LLM-Adapters left the passages out."""
    text, answer = _instruction(row)
    question, found, _ = text.partition("\n\nAnswer format:")
    question = re.sub(r"^.*?question: ", "", question, flags=re.DOTALL)
    if not found or answer not in ("true", "false"):
        raise DataError(f"its answer is {answer!r}, or its instruction has no 'Answer format: true/false'")
    return {"question": question.strip().rstrip("?").rstrip(), "label": int(answer == "true")}


def _instruction(row: Row) -> tuple[str, str]:
    text, answer = row.get("instruction"), row.get("answer")
    if not isinstance(text, str) or not isinstance(answer, str):
        raise DataError("has no instruction and answer, which rows of LLM-Adapters have")
    return text, answer.strip()


def _adapters(folder: str, fields: Callable[[Row], dict[str, Any]], **more: Any) -> Form:
    return Form((f"{folder}/{{split}}.json",), fields, **more)


FORMS: Mapping[tuple[str, str], Form] = {
    ("allenai/ai2_arc", "ARC-Easy"): _adapters("ARC-Easy", lettered),
    ("allenai/ai2_arc", "ARC-Challenge"): _adapters("ARC-Challenge", lettered),
    ("allenai/openbookqa", ""): _adapters("openbookqa", lettered),
    ("baber/piqa", ""): _adapters("piqa", piqa),
    ("allenai/winogrande", ""): _adapters("winogrande", winogrande),
    ("lighteval/siqa", ""): _adapters("social_i_qa", social_iqa),
    ("Rowan/hellaswag", ""): _adapters("hellaswag", hellaswag),
    ("aps/super_glue", "boolq"): _adapters(
        "boolq",
        boolq,
        changes={"doc_to_text": "Question: {{question}}?\nAnswer:", "should_decontaminate": False},
        note="LLM-Adapters' files have no passages, so its questions are asked without them. Figures of BoolQ that are "
        "published elsewhere are with passages",
    ),
    ("openai/gsm8k", ""): Form(("gsm8k/{split}.jsonl", "grade_school_math/data/{split}.jsonl"), gsm8k),
}
"""The forms of data sets other than MMLU, by their names on the hub: repository, and configuration or nothing."""
