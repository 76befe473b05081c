"""`quadapt run`: a whole job from one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import digests, give, quadapt

TUNE: dict[str, Any] = {
    "model": "dense",
    "data": "story.txt",
    "rank": 2,
    "seq_len": 32,
    "max_steps": 3,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "learning_rate": "2e-2",
}
JOB: dict[str, Any] = {
    "output": "job",
    "tune": TUNE,
    "merge": {},
    "eval": {"data": "sums.jsonl", "max_new_tokens": 4},
    "export": {"format": "gguf"},
}
STAGES = ("tune", "merge", "eval", "export")


def write(job: dict[str, Any] | str) -> str:
    Path("job.yaml").write_text(job if isinstance(job, str) else yaml.safe_dump(job))
    return "job.yaml"


def done(err: str) -> dict[str, bool]:
    """Which stages a call has done; the others had been done before."""
    return {stage: f"{stage} .." in err for stage in STAGES if f"{stage} .." in err or f"{stage}: done before" in err}


@pytest.fixture
def job(away: Path) -> Path:
    """A job that has been done."""
    said = quadapt("run", write(JOB))
    assert list(said) == list(STAGES)
    assert said["merge"]["certificate"]["verdict"] == "exact"
    assert said["eval"]["exact_match"]["count"] == 24
    return away / "job"


def test_all_stages_are_done_once(job: Path) -> None:
    assert {"adapter", "merged", "eval.json", "model.gguf"} <= {item.name for item in job.iterdir()}
    before = digests(job), (job / "model.gguf").read_bytes()
    first = give("run", "job.yaml", "--json", code=0)
    assert done(first.err) == dict.fromkeys(STAGES, False)
    assert first.json["merge"]["certificate"]["verdict"] == "exact"
    assert (digests(job), (job / "model.gguf").read_bytes()) == before


def test_missing_stages_are_done(job: Path) -> None:
    import shutil

    shutil.rmtree(job / "merged")
    (job / "model.gguf").unlink()
    again = give("run", "job.yaml", code=0)
    # what is merged again is the same, and so is what it was measured on: content counts, not time
    assert done(again.err) == {"tune": False, "merge": True, "eval": False, "export": True}
    assert (job / "model.gguf").exists()


def test_an_interrupted_job_goes_on(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quadapt.jobs.evaluate.load_as_asked", stop)
        give("run", write(JOB), code=130)
    assert done(give("run", "job.yaml", code=0).err) == {"tune": False, "merge": False, "eval": True, "export": True}
    assert (away / "job" / "eval.json").exists()


def test_a_stage_with_other_settings_is_done_again(job: Path) -> None:
    write({**JOB, "eval": {"data": "sums.jsonl", "max_new_tokens": 5}})
    assert done(give("run", "job.yaml", code=0).err) == {"tune": False, "merge": False, "eval": True, "export": False}
    assert (job / "model.gguf").exists()


def test_what_was_trained_is_not_thrown_away(job: Path) -> None:
    before = digests(job)
    changed = {**JOB, "tune": {**TUNE, "max_steps": 2}}
    said = give("run", write(changed), code=2)
    assert (
        "'job/adapter' was trained with other settings or data (max_steps: 3 -> 2). Use overwrite: true" in said.error
    )
    assert digests(job) == before
    assert done(give("run", write({**changed, "overwrite": True}), code=0).err) == dict.fromkeys(STAGES, True)
    assert digests(job) != before


def test_overwriting_starts_over_once_and_then_goes_on(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(job)
    write({**JOB, "overwrite": True})

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quadapt.jobs.evaluate.load_as_asked", stop)
        assert done(give("run", "job.yaml", code=130).err) == {"tune": True, "merge": True, "eval": True}
    assert done(give("run", "job.yaml", code=0).err) == {"tune": False, "merge": False, "eval": True, "export": True}
    assert digests(job) == before


def test_settings_are_replaced_on_the_command_line(away: Path) -> None:
    changes = [
        "--set",
        "tune.max_steps=2",
        "--set",
        "output=other",
        "--set",
        "eval.data=story.txt",
        "--set",
        "merge={}",
    ]
    said = give("run", write({"output": "job", "tune": TUNE}), *changes, "--json", code=0)
    assert done(said.err) == {"tune": True, "merge": True, "eval": True}
    assert said.json["eval"]["data"] == "story.txt"
    assert json.loads((away / "other" / ".tune.json").read_text())["job"]["settings"]["max_steps"] == 2
    assert not (away / "job").exists()
    assert (away / "other" / "merged").is_dir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("tune.max_steps", "must be a setting and its value, such as tune.max_steps=5"),
        ("tune.a.b=1", "must be a setting and its value"),
        ("tune.max_stepz=1", "job.yaml: tune.max_stepz is not a setting. Did you mean max_steps?"),
        ("tune.max_steps=[", "the value is not YAML"),
        ("tunes.max_steps=1", "tunes is not a setting. Did you mean tune?"),
    ],
)
def test_what_cannot_be_replaced_is_said(change: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"output": str(tmp_path / "job"), "tune": TUNE}))
    assert words in give("run", file, "--set", change, code=2).error


def test_stages_that_are_not_listed_are_left_out(away: Path) -> None:
    said = give("run", write({"output": "job", "tune": {**TUNE, "method": "qlora"}, "eval": {"data": "sums.jsonl"}}))
    assert done(said.err) == {"tune": True, "eval": True}
    assert {item.name for item in (away / "job").iterdir() if item.name[0] != "."} == {"adapter", "eval.json"}


def test_a_section_without_settings_counts(away: Path) -> None:
    text = yaml.safe_dump({"output": "job", "tune": TUNE}) + "merge:\n"
    assert done(give("run", write(text), code=0).err) == {"tune": True, "merge": True}
    assert (away / "job" / "merged").exists()


BAD: dict[str, tuple[dict[str, Any] | str, tuple[str, ...]]] = {
    "typo": ({**JOB, "tune": {**TUNE, "lerning_rate": 1}}, ("tune.lerning_rate", "Did you mean learning_rate?")),
    "typo of what is needed": ({**JOB, "eval": {"dat": "x"}}, ("job.yaml: eval.dat is", "Did you mean data?")),
    "missing": ({**JOB, "eval": None}, ("job.yaml: eval.data is missing", "Data to measure on")),
    "section": ({**JOB, "exprot": {}}, ("job.yaml: exprot is not a setting", "Did you mean export?")),
    "no output": ({"tune": TUNE}, ("job.yaml: output is missing", "Folder of the job")),
    "value": ({**JOB, "tune": {**TUNE, "bits": 7}}, ("job.yaml: tune.bits=7", "2, 3, 4, 5, 6 or 8")),
    "kind": ({**JOB, "tune": {**TUNE, "max_steps": "many"}}, ("tune.max_steps='many'", "whole number")),
    "contradiction": ({**JOB, "tune": {**TUNE, "method": "qlora", "form": "side"}}, ("form", "Leave it out")),
    "own output": ({**JOB, "tune": {**TUNE, "output": "x"}}, ("tune.output is not a setting", "Leave it out")),
    "own model": ({**JOB, "eval": {"model": "x", "data": "y"}}, ("eval.model is not a setting", "Leave it out")),
    "no section": ({**JOB, "tune": "dense"}, ("job.yaml: tune='dense'", "section")),
    "not YAML": ("tune: [1", ("job.yaml: is not YAML", "line 1")),
    "no settings": ("- tune", ("job.yaml: holds no settings", "output and tune")),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_file_is_refused_before_anything_is_done(case: str, away: Path) -> None:
    content, words = BAD[case]
    said = give("run", write(content), code=2)
    assert said.err.startswith("quadapt: ")
    assert said.err.count("\n") == 1
    for word in words:
        assert word in said.err
    assert not (away / "job").exists()


@pytest.mark.usefixtures("away")
def test_a_file_that_is_missing() -> None:
    write(JOB)
    assert "'jobb.yaml' does not exist. Did you mean 'job.yaml'?" in give("run", "jobb.yaml", code=2).error
