"""Tasks of the harness on models in memory: known answers are found, and figures are the harness's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quadapt

pytest.importorskip("lm_eval", reason="comes with the extra eval")

from quadapt.harness.measure import How, measure
from quadapt.harness.tasks import ready


def scores_of(tokenizer: Any, **bytes_: float) -> torch.Tensor:
    """Logits of each token: random small ones, and those that are given."""
    scores = torch.rand(len(tokenizer), generator=torch.Generator().manual_seed(3))
    for word, score in bytes_.items():
        scores[tokenizer.convert_tokens_to_ids(word)] = score
    return scores


def values(found: Any) -> dict[tuple[str, str], float]:
    return {(each.task, each.metric): each.value for each in found.figures}


@pytest.mark.parametrize(("letter", "right"), [("A", (2, 1)), ("C", (2, 1)), ("D", (1, 1))])
def test_a_model_that_always_says_one_letter(
    letter: str, right: tuple[int, int], constant: Callable[..., Any], tokenizer: Any, files: Path
) -> None:
    """Of 7 and 4 questions whose answers go round A, B, C, D, as many are right as have this letter."""
    model = constant(scores_of(tokenizer, **{letter: 9.0}))
    found = measure(model, tokenizer, ready(["mmlu_anatomy", "mmlu_virology"], str(files)), How(batch_size=4))
    assert values(found) == {("mmlu_anatomy", "acc"): right[0] / 7, ("mmlu_virology", "acc"): right[1] / 4}
    assert [each.questions for each in found.figures] == [7, 4]
    error = np.std([1.0] * right[0] + [0.0] * (7 - right[0]), ddof=1) / np.sqrt(7)
    assert found.figures[0].stderr == pytest.approx(error)
    assert found.notes == []


def test_sums_of_logarithms_decide(constant: Callable[..., Any], tokenizer: Any, files: Path) -> None:
    """The likelihood of a choice is known: a sum over its bytes; of ARC the harness also divides it by the length."""
    scores = scores_of(tokenizer)
    found = measure(constant(scores), tokenizer, ready(["arc_easy"], str(files)), How(batch_size=3))
    logs = (scores.double() - torch.logsumexp(scores.double(), 0)).numpy()
    plain, normed = [], []
    for at in range(13):
        choices = ["a", "bb", "c c c", f"{at}d"][: 3 + at % 2]
        sums = np.array([logs[tokenizer.encode(f" {choice}")].sum() for choice in choices])
        plain.append(sums.argmax() == at % 3)
        normed.append((sums / [len(choice) for choice in choices]).argmax() == at % 3)
    assert values(found) == {("arc_easy", "acc"): np.mean(plain), ("arc_easy", "acc_norm"): np.mean(normed)}
    assert 0 < np.mean(plain) < 1


def test_boolq_without_passages_says_so(constant: Callable[..., Any], tokenizer: Any, files: Path) -> None:
    model = constant(scores_of(tokenizer, y=9.0, e=9.0, s=9.0))
    found = measure(model, tokenizer, ready(["boolq"], str(files)), How(limit=5))
    assert values(found) == {("boolq", "acc"): 3 / 5}  # 0, 2 and 4 of the first five
    assert any("no passages" in note for note in found.notes)


def test_generated_answers(constant: Callable[..., Any], tokenizer: Any, files: Path) -> None:
    """A model that says nothing but 7 is right where eight of them are."""
    model = constant(scores_of(tokenizer, **{"7": 9.0}))
    found = measure(model, tokenizer, ready(["gsm8k"], str(files), few_shot=2), How(max_new_tokens=8))
    assert values(found)["gsm8k", "exact_match (flexible-extract)"] == 3 / 8
    assert values(found)["gsm8k", "exact_match (strict-match)"] == 0
    assert any("train.jsonl is all there is" in note for note in found.notes)


def test_examples_come_from_their_own_file(files: Path) -> None:
    chosen = ready(["mmlu_anatomy"], str(files), few_shot=5)
    (task,) = chosen.tasks
    task.set_fewshot_seed(seed=0)
    prompt = task.fewshot_context(task.eval_docs[0], 5)
    assert prompt.count("anatomy dev") == 5
    assert prompt.count("anatomy test") == 1
    assert prompt.endswith("anatomy test 0, is it?\nA. one\nB. two\nC. three, or so\nD. four\nAnswer:")


def test_a_question_is_never_its_own_example(files: Path, tmp_path: Path) -> None:
    place = tmp_path / "anatomy_dev.csv"
    place.write_bytes((files / "mmlu" / "dev" / "anatomy_dev.csv").read_bytes())
    (task,) = ready(["mmlu_anatomy"], str(tmp_path), few_shot=4).tasks
    task.set_fewshot_seed(seed=0)
    for at in range(5):
        assert task.fewshot_context(task.eval_docs[at], 4).count(f"anatomy dev {at},") == 1


def test_long_prompts_are_counted(constant: Callable[..., Any], tokenizer: Any, files: Path) -> None:
    model = constant(scores_of(tokenizer, A=9.0))
    found = measure(model, tokenizer, ready(["mmlu_virology"], str(files)), How(context=40))
    assert any(note.startswith("16 of 16 prompts are longer") for note in found.notes)
    assert values(found) == {("mmlu_virology", "acc"): 1 / 4}


ORACLE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
found = simple_evaluate(
    model="hf", model_args={"pretrained": sys.argv[1], "dtype": "float32"}, device="cpu",
    tasks=["mine_mmlu", "mine_arc"],
    batch_size=8, num_fewshot=2, limit=20, log_samples=False,
    task_manager=TaskManager(include_defaults=False, include_path=sys.argv[2]),
)
print(json.dumps(found["results"]))
"""

MMLU_YAML = """
task: mine_mmlu
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about anatomy.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\n\
D. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

ARC_YAML = """
task: mine_arc
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {train}}}}}
training_split: train
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
def test_figures_are_the_harness_s_own_of_the_dense_export(shared: Path, tmp_path: Path) -> None:
    """A quantized model in memory, and the harness alone on its dense export, with tasks written by hand."""
    from quadapt.harness.files import raw_rows
    from quadapt.harness.forms import form_of

    data = shared / "data"
    model = str(shared / "models" / "stories260K-hf")

    def command(*words: str) -> Any:
        found = subprocess.run(
            [sys.executable, "-m", "quadapt", *words, "--json"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)

    command("quantize", model, "--rounding", "nearest", "--bits", "4", "--output", "q4")
    command("export", "q4", "--format", "hf", "--dtype", "float32", "--output", "dense")
    tasks = ["--tasks", "mmlu_anatomy,arc_easy", "--task-files", str(data), "--few-shot", "2", "--limit", "20"]
    ours = command("eval", "q4", "--dtype", "float32", *tasks)["results"]

    arc = form_of({"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy"})
    assert arc is not None
    rows = {
        "mmlu": [
            {
                "question": row["question"],
                "choices": [row[f"choice{at}"] for at in range(4)],
                "answer": int(row["answer"]),
            }
            for row in raw_rows(data / "mmlu" / "dev" / "anatomy_dev.csv")
        ],
        **{
            split: [arc.fields(row) for row in raw_rows(data / "commonsense" / "ARC-Easy" / f"{split}.json")]
            for split in ("train", "test")
        },
    }
    for name, each in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mmlu.yaml").write_text(MMLU_YAML.format(rows=tmp_path / "mmlu.jsonl"))
    arcs = {"rows": tmp_path / "test.jsonl", "train": tmp_path / "train.jsonl"}
    (tmp_path / "tasks" / "arc.yaml").write_text(ARC_YAML.format(**arcs))
    (tmp_path / "oracle.py").write_text(ORACLE)
    found = subprocess.run(
        [sys.executable, "oracle.py", "dense", "tasks"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert found.returncode == 0, found.stderr
    theirs = json.loads(found.stdout.splitlines()[-1])
    for mine, name in (("mine_mmlu", "mmlu_anatomy"), ("mine_arc", "arc_easy")):
        figures = [{key: value for key, value in each.items() if "," in key} for each in (ours[name], theirs[mine])]
        assert figures[0] == figures[1]
        assert ours[name]["acc,none"] > 0


def test_the_harness_s_own_command_line_knows_quadapt(
    constant: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """By the line that stands for `lm_eval`, on a folder; the task is one that needs no network."""
    constant(scores_of(tokenizer, B=9.0)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": f"{at}?", "choices": list("wxyz"), "answer": at % 4}) + "\n" for at in range(8))
    )
    (tmp_path / "tasks").mkdir()
    text = MMLU_YAML.format(rows=tmp_path / "rows.jsonl").replace("task: mine_mmlu", "task: mine")
    (tmp_path / "tasks" / "mine.yaml").write_text(text)
    code = (
        "import sys, lm_eval.tasks as tasks\n"
        "real = tasks.TaskManager\n"
        "def ours(*, include_defaults=True, **more): return real(include_defaults=False, **more)\n"
        "tasks.TaskManager = ours  # to read all of the harness's tasks takes a minute\n"
        "import lm_eval.config.evaluate_config\n"
        "import runpy\n"
        "runpy.run_module('quadapt.harness', run_name='__main__', alter_sys=True)\n"
    )
    words = ["--model", "quadapt", "--model_args", "pretrained=model", "--tasks", "mine", "--include_path", "tasks"]
    found = subprocess.run(
        [sys.executable, "-c", code, *words, "--output_path", "out.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert re.search(r"acc +\|↑ +\| *0\.25\|±", found.stdout), found.stdout


def test_importing_quadapt_registers_the_model() -> None:
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import get_model

    from quadapt.harness.lm import QuadaptLM

    assert quadapt.__version__
    assert get_model("quadapt") is QuadaptLM
