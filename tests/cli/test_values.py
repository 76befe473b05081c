"""Every setting has a range, and says which; the same from flags, YAML and Python."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import give
from pydantic.fields import FieldInfo

import quadapt
from quadapt.cli import COMMANDS
from quadapt.cli.commands import settings_of
from quadapt.config import EvalConfig, ExportConfig, Settings, TuneConfig, checked, read_job
from quadapt.config.values import Location, allowed, types_in
from quadapt.errors import CheckpointError, ConfigError

NEEDED = {"model": "m", "data": "d", "output": "o", "adapter": "a", "budget": 3, "run": "r"}

WRONG: list[tuple[str, Any, str]] = [
    ("eval_split", float("nan"), "must be a number, at least 0 and below 1"),
    ("eval_split", 4.0, "must be a number, at least 0 and below 1"),
    ("eval_split", 1.0, "must be a number, at least 0 and below 1"),
    ("warmup_ratio", 1.5, "must be a number from 0 to 1"),
    ("dropout", -0.1, "must be a number, at least 0 and below 1"),
    ("learning_rate", float("inf"), "must be a number, above 0"),
    ("grid_learning_rate", float("nan"), "must be a number, above 0"),
    ("epochs", -float("inf"), "must be a number, above 0"),
    ("alpha", 0.0, "must be a number, above 0"),
    ("rank", 2**63, "must be a whole number, at least 1 and at most 2147483647"),
    ("max_steps", 2**200, "must be a whole number, at least 0 and at most 2147483647"),
    ("seed", 2**32, "must be a whole number, at least 0 and at most 4294967295"),
    ("seed", -1, "must be a whole number, at least 0"),
    ("batch_size", 0, "must be a whole number, at least 1"),
    ("data", "a\0b", "null character"),
    ("output", "a\ud83d", "not Unicode"),
    ("device", "cpu\0", "null character"),
    ("skip", "q_proj,\udce9", "not Unicode"),
    ("eval_data", "", "eval_data is empty. Held-out data"),
    ("model", "", "model is empty. Folder or hub name"),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_what_is_out_of_range_is_refused_with_what_is_allowed(
    name: str, value: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        checked(TuneConfig, {**NEEDED_FOR_TUNE, name: value})
    assert words in str(error.value)
    flags = {"model": ["m"], "data": ["--data", "d"], "output": ["--output", "o"]}
    flags[name] = [value] if name == "model" else [f"--{name.replace('_', '-')}", str(value)]
    said = give("tune", *(word for words_ in flags.values() for word in words_), code=2)
    assert words in said.error
    if name == "output" or (isinstance(value, str) and not value.isprintable()):
        return  # a job names its stages' outputs itself, and YAML holds no such characters
    job = tmp_path / "job.yaml"
    tune = {key: each for key, each in {**NEEDED_FOR_TUNE, name: value}.items() if key != "output"}
    job.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "tune": tune}))
    assert words in give("run", job, code=2).error
    assert not (tmp_path / "out").exists()


def needed_by(kind: type[Settings], name: str = "") -> dict[str, Any]:
    """What a command needs, whatever else is given, or beside the setting of that name."""
    found = {each: NEEDED[each] for each, about in kind.model_fields.items() if about.is_required()}
    if kind is EvalConfig:  # data, or tasks, which may have files
        found |= {"tasks": ("piqa",)} if name == "task_files" else {} if name == "tasks" else {"data": NEEDED["data"]}
    return found


NEEDED_FOR_TUNE = {name: NEEDED[name] for name in ("model", "data", "output")}


def test_from_python_too() -> None:
    with pytest.raises(ConfigError, match="rank=-1: must be a whole number, at least 1"):
        quadapt.prepare("m", rank=-1)
    with pytest.raises(ConfigError, match="learning_rate=nan: must be a number, above 0"):
        quadapt.prepare("m", learning_rate=float("nan"))


FIELDS = [
    pytest.param(kind, name, field, id=f"{command}-{name}")
    for command, kind in ((command, settings_of(command)) for command in COMMANDS)
    for name, field in kind.model_fields.items()
]


@pytest.mark.parametrize(("kind", "name", "field"), FIELDS)
def test_no_field_takes_what_cannot_be_meant(kind: type[Settings], name: str, field: FieldInfo) -> None:
    needed = needed_by(kind, name)
    bad: list[Any] = [float("nan"), float("inf"), -(2**70), 2**70, "\0", "\ud800", {"a": 1}, [[1]], b"x", object()]
    for value in bad if bool in types_in(field.annotation) else [*bad, True]:
        if isinstance(value, int) and value > 1 and float in types_in(field.annotation):
            continue
        if name in BY_NAME and value == {"a": 1}:
            continue
        with pytest.raises(ConfigError, match=f"^{name}"):
            checked(kind, {**needed, name: value})


BY_NAME = ("rank_pattern", "alpha_pattern")
"""Settings that from Python are numbers by name."""


def test_numbers_say_their_range_and_paths_are_paths() -> None:
    for kind in map(settings_of, COMMANDS):
        for name, field in kind.model_fields.items():
            types = list(types_in(field.annotation))
            if int in types or float in types:
                assert "," in allowed(field) or "from" in allowed(field), name
            if str in types and name not in PLAIN_TEXT:
                assert any(item in types or item in field.metadata for item in Location.__metadata__), name


PLAIN_TEXT = (
    "text_column",
    "label_column",
    "labels",
    "device",
    "report_to",
    "prompt",
    "system",
    "target_modules",
    "skip",
    "train_tokens",
    "host",
    "name",
    "push_to_hub",
    "tasks",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "size",
    "methods",
    "rates",
    "settings",
)
"""Settings that are text, and neither a path nor a choice."""


@pytest.mark.parametrize("kind", [settings_of(command) for command in COMMANDS])
def test_the_home_folder_is_found_in_every_path(kind: type[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    for name, field in kind.model_fields.items():
        needed = needed_by(kind, name)
        if kind is ExportConfig:  # which needs an output for all formats but "?"
            needed["output"] = NEEDED["output"]
        if str in types_in(field.annotation) and name not in PLAIN_TEXT:
            assert getattr(kind.model_validate({**needed, name: "~/x"}), name) in ("/home/ada/x", ("/home/ada/x",))
            with pytest.raises(ConfigError, match=f"{name}='~nobody-of-that-name/x': names the home folder"):
                checked(kind, {**needed, name: "~nobody-of-that-name/x"})


def test_the_home_folder_of_a_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "job.yaml").write_text("output: ~/out\ntune: {model: ~/m, data: d}\n")
    assert read_job("~/job.yaml").output == str(tmp_path / "out")


# --- job files --------------------------------------------------------------------------------------------------------

JOBS: dict[str, tuple[str, str]] = {
    "a number for names": ("output: o\ntune: {model: m, data: d, skip: 5}", "job.yaml: tune.skip=5: must be a name"),
    "names with a number": ("output: o\ntune: {model: m, data: d, skip: [a, 5]}", "Put numbers in quotes"),
    "a date for a path": ("output: 2024-05-01\ntune: {}", "output=datetime.date(2024, 5, 1): must be text"),
    "a section that is none": ("output: o\ntune: 5", "tune=5: must be a section: settings below it"),
    "a truth value": ("output: o\ntune: {model: m, data: d, rank: yes}", "tune.rank=True: must be a whole number"),
    "a list": ("[1, 2]", "holds no settings"),
    "no name": ("output: o\n5: x\ntune: {}", "5 is not a setting"),
    "twice": ("output: o\ntune: {rank: 4, model: m, rank: 8}", "rank stands twice in the section at line 2"),
    "thousands of digits": (f"output: o\ntune: {{rank: {'9' * 5000}}}", "is not YAML"),
    "a tag": ("output: !!bool x\ntune: {}", "is not YAML"),
    "nesting": ("output: " + "[" * 4000, "nested more than 20 levels deep"),
    "nesting that ends": ("output: " + "[" * 25 + "]" * 25, "nested more than 20 levels deep"),
    "itself": ("output: &a [*a]", "nested more than 20 levels deep"),
    "aliases": (
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
        "has over 10,000 values, aliases followed",
    ),
    "merged aliases": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 8)),
        "has over 10,000 values, aliases followed",
    ),
    "a large file": ("# " + "x" * 2**20, "no job has"),
}


@pytest.mark.parametrize("case", JOBS)
def test_job_files_that_cannot_be_meant(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, words = JOBS[case]
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(text)
    said = give("run", "job.yaml", "--json", code=2)
    assert words in said.json["error"]
    assert len(said.error) < 1000
    assert os.listdir() == ["job.yaml"]


def test_a_plan_that_is_nested_is_said_to_be_damaged(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"layers": ' + "[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        checked(TuneConfig, {**NEEDED_FOR_TUNE, "plan": str(tmp_path / "plan.json")}).spec  # noqa: B018


def test_a_short_message_for_a_long_value() -> None:
    with pytest.raises(ConfigError) as error:
        checked(TuneConfig, {**NEEDED_FOR_TUNE, "bits": json.loads("[" * 50 + "]" * 50), "rank": 10**300})
    assert len(str(error.value)) < 300
