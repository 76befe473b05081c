"""Rows of local files become the fields that the harness's tasks read, and what is wrong with them is said."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from quadapt.config import EvalConfig, checked
from quadapt.errors import ConfigError, DataError, MissingDependency
from quadapt.harness.files import Shelf, TaskFiles, raw_rows
from quadapt.harness.forms import FORMS, form_of

PIQA = {
    "instruction": "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer with "
    "bobby pin \n\nSolution2: finish, woodgrain with  bobby pin \n\nAnswer format: solution1/solution2",
    "answer": "solution2",
}
WINOGRANDE = {
    "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah was a "
    "better surgeon than Maria so _ got the easier cases.\n\nOption1: Sarah Option2: Maria "
    "Answer format: option1/option2",
    "answer": "option2",
}
SIQA = {
    "instruction": "Please choose the correct answer to the question: Tracy didn't go home. What does Tracy need to "
    "do?\n\nAnswer1: make a plan Answer2: Go home Answer3: Find somewhere\n\nAnswer format: answer1/answer2/answer3",
    "answer": "answer3",
}
HELLASWAG = {
    "instruction": "Please choose the correct ending to complete the given sentence: Clean and jerk: A lady walks to a "
    "barbell. She bends down. the lady\n\nEnding1: swings. Ending2: pulls. Ending3: pulls a rope. Ending4: stands.\n\n"
    "Answer format: ending1/ending2/ending3/ending4",
    "answer": "ending4",
}
WIKIHOW = {
    "instruction": "Please choose the correct ending to complete the given sentence: Travel: [header] How to become "
    "one. [title] see this [step] Go on.\n\nEnding1: a Ending2: b Ending3: c Ending4: d\n\n"
    "Answer format: ending1/ending2/ending3/ending4",
    "answer": "ending1",
}


def fields(name: str, row: dict[str, Any], subset: str = "None") -> dict[str, Any]:
    form = form_of({"dataset_path": name, "dataset_name": subset})
    assert form is not None
    return form.fields(row)


def test_instructions_are_taken_apart() -> None:
    assert fields("baber/piqa", PIQA) == {
        "goal": "dresser",
        "sol1": "replace drawer with bobby pin",
        "sol2": "finish, woodgrain with  bobby pin",
        "label": 1,
    }
    assert fields("allenai/winogrande", WINOGRANDE, "winogrande_xl") == {
        "sentence": "Sarah was a better surgeon than Maria so _ got the easier cases.",
        "option1": "Sarah",
        "option2": "Maria",
        "answer": "2",
    }
    found = fields("lighteval/siqa", SIQA)
    assert f"{found['context']} {found['question']}" == "Tracy didn't go home. What does Tracy need to do?"
    assert (found["answerA"], found["answerC"], found["label"]) == ("make a plan", "Find somewhere", "3")
    found = fields("Rowan/hellaswag", HELLASWAG)
    assert (found["activity_label"], found["ctx_a"]) == ("Clean and jerk", "A lady walks to a barbell. She bends down.")
    assert (found["ctx_b"], found["endings"][3], found["label"]) == ("the lady", "stands.", "3")
    assert fields("Rowan/hellaswag", WIKIHOW)["ctx_b"] == ""
    found = fields("allenai/openbookqa", {**SIQA, "answer": "answer1"}, "main")
    assert (found["answerKey"], found["choices"]["label"]) == ("A", ["A", "B", "C"])


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("baber/piqa", {**PIQA, "answer": "solution3"}, "'solution3' is none of the answer format"),
        (
            "baber/piqa",
            {**PIQA, "instruction": "Solution1: a Answer format: solution1/solution2"},
            "has no 'Solution2'",
        ),
        ("allenai/winogrande", {**WINOGRANDE, "instruction": PIQA["instruction"], "answer": "solution1"}, "no blank"),
        ("openai/gsm8k", {"question": "?", "answer": "12"}, "does not end in '#### '"),
        ("baber/piqa", {"goal": "x"}, "has no instruction and answer"),
    ],
)
def test_a_row_of_another_form_is_named(name: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        fields(name, row)


def test_files_say_where_a_row_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    file.write_text(json.dumps([PIQA, {**PIQA, "answer": "both"}]))
    with pytest.raises(DataError, match=r"test.json: row 2: its answer 'both'"):
        TaskFiles("baber/piqa", "None", str(file), str(file))()
    file.write_text("[")
    with pytest.raises(DataError, match=r"test.json: cannot be read"):
        list(raw_rows(file))


def test_mmlu_is_read_in_both_forms(tmp_path: Path) -> None:
    row = ['Which, "of" these?', "NA", "2", "c", "d"]
    for name, lines in {
        "one_test.csv": [["question", *(f"choice{at}" for at in range(4)), "answer"], [*row, "2"]],
        "two_test.csv": [[*row, "C"]],
    }.items():
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    paths = {name: str(tmp_path / f"{name}_test.csv") for name in ("one", "two")}
    one, two = (TaskFiles("cais/mmlu", name, path, path)()["questions"][0] for name, path in paths.items())
    assert one == two == {"question": row[0], "choices": row[1:], "answer": 2}


def test_a_file_that_may_be_one_of_two_is_not_guessed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "piqa").mkdir(parents=True)
        (tmp_path / name / "piqa" / "test.json").write_text("[]")
    config = {"dataset_path": "baber/piqa", "dataset_name": None}
    with pytest.raises(DataError, match=r"a/piqa/test.json and .*b/piqa/test.json may both be meant"):
        Shelf(str(tmp_path)).files(config, FORMS["baber/piqa", ""])
    found = Shelf(str(tmp_path / "a" / "piqa")).files(config, FORMS["baber/piqa", ""])
    assert found is not None
    assert found.questions.endswith("a/piqa/test.json")
    with pytest.raises(DataError, match="is no folder"):
        Shelf(str(tmp_path / "none"))


def test_the_data_beside_the_repository_is_read_whole(shared: Path) -> None:
    shelf = Shelf(str(shared / "data"))
    for name, subset, count in (
        ("allenai/ai2_arc", "ARC-Easy", 2376),
        ("aps/super_glue", "boolq", 3270),
        ("openai/gsm8k", "main", 7473),
        ("cais/mmlu", "anatomy", 5),
    ):
        config = {"dataset_path": name, "dataset_name": subset}
        form = form_of(config)
        assert form is not None
        files = shelf.files(config, form)
        assert files is not None
        assert len(files()["questions"]) == count


def test_settings_that_contradict_each_other() -> None:
    def given(**settings: Any) -> EvalConfig:
        return checked(EvalConfig, {"model": "m", **settings})

    assert given(tasks="mmlu,piqa").tasks == ("mmlu", "piqa")
    with pytest.raises(ConfigError, match="data is missing"):
        given()
    with pytest.raises(ConfigError, match="tasks are given too"):
        given(tasks="mmlu", data="a.txt")
    with pytest.raises(ConfigError, match="few_shot=5 belongs to tasks"):
        given(data="a.txt", few_shot=5)


def test_without_the_harness_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    tasks = importlib.import_module("quadapt.harness.tasks")
    with pytest.raises(MissingDependency, match=r"pip install 'quadapt\[eval\]'"):
        tasks.ready(["mmlu"], None)
