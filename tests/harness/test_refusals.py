"""What `quadapt eval --tasks` refuses, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="comes with the extra eval")

from quadapt.config import EvalConfig, checked
from quadapt.errors import ConfigError, DataError
from quadapt.harness.tasks import ready
from quadapt.jobs.benchmarks import by_tasks
from quadapt.report.ui import UI


def test_a_group_without_all_of_its_files(files: Path) -> None:
    with pytest.raises(DataError, match=r"not the files of mmlu: 55 of its 57 tasks .* is looked for as \w+_test.csv"):
        ready(["mmlu"], str(files))


def test_a_task_without_its_files(files: Path) -> None:
    with pytest.raises(DataError, match=r"not the files of piqa: piqa is looked for as piqa/test.json"):
        ready(["piqa"], str(files))


def test_too_few_examples(files: Path) -> None:
    with pytest.raises(ConfigError, match=r"6 examples are to be shown, and there are 5, those in the file"):
        ready(["mmlu_anatomy"], str(files), few_shot=6)
    with pytest.raises(ConfigError, match=r"8 examples are to be shown, and there are 7, the others among the 8"):
        ready(["gsm8k"], str(files), few_shot=8)


def test_a_task_twice(files: Path) -> None:
    with pytest.raises(ConfigError, match="mmlu_anatomy is asked twice"):
        ready(["mmlu_stem", "mmlu_anatomy"], str(files))


def test_no_network() -> None:
    with pytest.raises(DataError, match=r"piqa: its data cannot be had from the hub .* --task-files DIR"):
        ready(["piqa"], None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stride": 4}, "stride=4 has no meaning for tasks"),
        ({"prompt_form": "alpaca"}, "prompts of their own"),
        ({"system": "Be brief."}, "Add --prompt-form chat"),
    ],
)
def test_settings_without_a_meaning(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        by_tasks(checked(EvalConfig, {"model": "m", "tasks": "piqa", **settings}), UI(quiet=True))


@pytest.mark.deep
def test_a_name_with_a_typo() -> None:
    """All tasks of the harness are read for it, which takes a minute."""
    with pytest.raises(ConfigError, match=r"no task 'hellaswagg'. Did you mean hellaswag"):
        ready(["hellaswagg"], None)
