"""What is wrong with the input is said in one line, with the place and what to do; nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import STORY, give, tree

from quadapt.report import memory

pytestmark = pytest.mark.usefixtures("broken", "here")

TUNE = ("tune", "dense", "--output", "new", "--data", "story.txt", "--max-steps", "1", "--seq-len", "32")
QUANTIZE = ("quantize", "dense", "--output", "new", "--rounding", "nearest")


@pytest.fixture(scope="session")
def broken(place: Path, shelf: dict[str, Any]) -> None:
    """The same folder, with things in it that are damaged."""
    assert shelf  # these are there to be copied

    def copy(source: str, name: str) -> Path:
        shutil.copytree(place / source, place / name)
        return place / name

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    cut(copy("dense", "cut") / "model.safetensors")
    cut(copy("q4", "cut-q4") / "model.safetensors")
    cut(copy("adapter", "cut-adapter") / "adapter_model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (copy("dense", "shards") / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy("q4", "bad-note") / "quadapt.json").write_text("{")
    (copy("dense", "bad-config") / "config.json").write_text("[1")
    (place / "empty.txt").write_text("")
    (place / "empty.jsonl").write_text("")
    (place / "bad.jsonl").write_text('{"prompt": "1 + 1 =", "completion": "2"}\n{"prompt": "2 + 2 ="}\n')
    (place / "blank.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " "}\n')
    (place / "bad.gguf").write_text("GGML")
    (place / "nothing").mkdir()


def tuned(*changes: str) -> tuple[str, ...]:
    return (*TUNE, *changes)


BAD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # settings
    "method": (tuned("--method", "qalora"), ("method='qalora'", "'qa-lora'", "Did you mean qa-lora?")),
    "bits": (tuned("--bits", "7"), ("bits=7", "2, 3, 4, 5, 6 or 8")),
    "bits of quantiles": (
        tuned("--method", "qlora", "--bits", "5"),
        ("bits=5 is not supported for levels='nf'", "Use 2, 3, 4 or 8, or integers (levels='int')"),
    ),
    "group size": (tuned("--group-size", "20"), ("group_size=20", "multiple of 16", "Use 32, 64 or 128")),
    "no group": (tuned("--group-size", "0"), ("group_size=0",)),
    "grid": (tuned("--levels", "nf", "--zero", "integer"), ("zero",)),
    "pooling": (tuned("--method", "qlora", "--pooling", "mean"), ("pooling", "qa-lora", "Leave it out")),
    "dropout": (
        tuned("--method", "qa-lora", "--dropout", "0.1"),
        ("dropout=0.1 has no meaning", "Use dropout=0, or form='side'"),
    ),
    "rank": (tuned("--rank", "0"), ("rank=0: must be a whole number, at least 1",)),
    "learning rate": (tuned("--lr", "-1"), ("learning_rate=-1.0: must be a number, above 0",)),
    "steps": (tuned("--max-steps", "-1"), ("max_steps=-1: must be a whole number, at least 0",)),
    "calibration": (tuned("--calibration-length", "0"), ("calibration_length=0: must be a whole number, at least 1",)),
    "too long": (
        tuned("--method", "qa-lora", "--calibration-length", "5000"),
        ("story.txt", "too few for one block of 5000"),
    ),
    "share": (tuned("--eval-split", "2"), ("eval_split=2.0", "at least 0 and below 1")),
    "device": (tuned("--device", "gpu"), ("device='gpu' is unknown", "cpu, cuda")),
    "offload": (tuned("--offload", "disk"), ("offload='disk'", "'auto', 'none' or 'cpu'")),
    "offload here": (
        (*QUANTIZE, "--device", "cpu", "--offload", "cpu"),
        ("offload='cpu' says where the model is while a GPU works", "device='cpu'", "Leave it out", "--device cuda"),
    ),
    "skip": (tuned("--skip", "nope"), ("'nope' matches no layer", "down_proj")),
    "target": (tuned("--target-modules", "nope"), ("'nope' matches no quantized layer", "down_proj")),
    "quantized target": ((*QUANTIZE, "--target-modules", "nope"), ("'nope' matches no layer", "down_proj")),
    "no text": (("quantize", "dense", "--output", "new"), ("rounding='gptq'", "--calibration-data", "nearest")),
    "bits of another": (
        ("tune", "q4", *TUNE[2:], "--bits", "3"),
        ("bits has no meaning here: 'q4' is quantized already", "Leave it out"),
    ),
    "temperature": (
        ("chat", "q4", "-p", "a", "--temperature", "-1"),
        ("temperature=-1.0: must be a number, at least 0",),
    ),
    "no room": (("chat", "q4", "-p", "a" * 200), ("200 tokens", "context 128", "Shorten it")),
    "no prompt": (("chat", "q4", "-p", ""), ("the prompt is empty",)),
    "batch": (
        ("eval", "q4", "--data", "story.txt", "--batch-size", "0"),
        ("batch_size=0: must be a whole number, at least 1",),
    ),
    # models
    "no model": (("tune", "dnse", *TUNE[2:]), ("'dnse'", "Did you mean 'dense'?")),
    "no path": (("quantize", "./dnse", *QUANTIZE[2:]), ("'./dnse' does not exist", "Did you mean 'dense'?")),
    "no gguf": (("eval", "mergd.gguf", "--data", "story.txt"), ("does not exist", "Did you mean 'merged.gguf'?")),
    "a file": (("quantize", "story.txt", "--output", "new"), ("'story.txt' is a file", "config.json")),
    "no folder of a model": (("quantize", "nothing", "--output", "new"), ("neither config.json nor adapter_config",)),
    "cut": (("quantize", "cut", *QUANTIZE[2:]), ("cut/model.safetensors: is damaged or truncated", "Copy it again")),
    "cut quantized": (("eval", "cut-q4", "--data", "story.txt"), ("cut-q4/model.safetensors: is damaged",)),
    "cut adapter": (("merge", "cut-adapter", "--output", "new"), ("adapter_model.safetensors: is damaged",)),
    "shard": (("tune", "shards", *TUNE[2:]), ("shards: model-00002-of-00002.safetensors is missing", "Copy it")),
    "bad note": (("inspect", "bad-note"), ("bad-note/quadapt.json: is damaged", "Copy it again")),
    "bad config": (("tune", "bad-config", *TUNE[2:]), ("bad-config/config.json: is damaged",)),
    "bad gguf": (("eval", "bad.gguf", "--data", "story.txt"), ("'bad.gguf' cannot be loaded", "not a GGUF file")),
    "quantized already": (("quantize", "q4", "--output", "new"), ("'q4' is quantized already", "quadapt tune q4")),
    "tuned already": (
        ("tune", "adapter", *TUNE[2:], "--method", "qlora"),
        ("method='qlora': 'adapter' was trained with 'qa-lora', and that is fixed", "Leave it out"),
    ),
    "no adapter": (("merge", "q4", "--output", "new"), ("'q4' is a quantized model, not an adapter",)),
    "dense": (("inspect", "dense"), ("'dense' is a dense model, not written by quadapt",)),
    "another base": (
        ("merge", "adapter", "--output", "new", "--base", "nearest"),
        ("adapter: this adapter was trained over another base (fingerprint", "--base"),
    ),
    "dense base": (
        ("merge", "adapter", "--output", "new", "--base", "dense"),
        ("adapter: this adapter was trained over another base", "--base"),
    ),
    "no base": (
        ("eval", "adapter", "--data", "story.txt", "--base", "naerest"),
        ("'naerest'", "Did you mean 'nearest'?"),
    ),
    "export dense": (("export", "dense", "--output", "new"), ("'dense' is a dense model", "Quantize or tune it")),
    "export lora": (("export", "merged", "--format", "lora", "--output", "new"), ("'merged' is no adapter", "hf")),
    # data
    "no data": (tuned("--data", "stroy.txt"), ("stroy.txt: there is no such file", "Did you mean story.txt")),
    "empty text": (tuned("--data", "empty.txt"), ("empty.txt: is empty",)),
    "empty lines": (tuned("--data", "empty.jsonl"), ("empty.jsonl: is empty",)),
    "column": (("tune", "dense", "--data", "bad.jsonl", "--strict"), ("bad.jsonl:2: has no column 'completion'",)),
    "blank": (("tune", "dense", "--data", "blank.jsonl", "--seq-len", "32"), ("completion",)),
    "text and pairs": (tuned("--data", "sums.jsonl"), ("story.txt holds text, and sums.jsonl prompts", "Leave one")),
    "strict and not": (tuned("--strict", "--max-bad-rows", "3"), ("strict=True: no bad row is allowed", "Leave one")),
    "no held-out": (tuned("--eval-data", "sum.jsonl"), ("sum.jsonl: there is no such file", "sums.jsonl")),
    "no calibration": (tuned("--calibration-data", "sum.jsonl"), ("sum.jsonl: there is no such file", "sums.jsonl")),
    "no eval data": (("eval", "q4", "--data", "stry.txt"), ("stry.txt: there is no such file", "story.txt")),
    # outputs
    "exists": (tuned("--output", "q4"), ("output='q4' exists", "--overwrite", "another --output")),
    "quantize exists": ((*QUANTIZE, "--output", "adapter"), ("output='adapter' exists", "--overwrite")),
    "merge exists": (("merge", "adapter", "--output", "q4"), ("output='q4' exists", "--overwrite")),
    "export exists": (("export", "merged", "--output", "merged.gguf"), ("output='merged.gguf' exists", "--overwrite")),
    "in a file": (tuned("--output", "story.txt/new"), ("'story.txt' cannot be written into (it is a file)",)),
    "quantize in a file": ((*QUANTIZE, "--output", "story.txt/a/b"), ("'story.txt' cannot be written into",)),
    "export in a file": (("export", "merged", "--output", "story.txt/new"), ("'story.txt' cannot be written into",)),
    "eval in a file": (
        ("eval", "merged", "--data", "story.txt", "--output", "story.txt/new.json"),
        ("'story.txt' cannot be written into",),
    ),
    "onto a file": ((*QUANTIZE, "--output", "story.txt", "--overwrite"), ("output='story.txt' is a file",)),
    "onto a folder": (
        ("export", "merged", "--output", "q4", "--overwrite"),
        ("output='q4' is a folder", "another --output"),
    ),
    "onto the input": (
        ("export", "merged", "--output", "merged", "--format", "hf", "--overwrite"),
        ("output='merged' would replace 'merged', which is read",),
    ),
    "onto the base": (
        ("merge", "adapter", "--output", "adapter/base", "--overwrite"),
        ("output='adapter/base' would replace 'adapter/base', which is read",),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, words = BAD[case]
    before = tree(Path())
    said = give(*arguments, code=2)
    assert said.error.startswith("quadapt: ")
    for word in words:
        assert word in said.error
    assert tree(Path()) == before


@pytest.mark.parametrize("case", ["method", "cut", "no data"])
def test_with_json_the_error_is_json_too(case: str) -> None:
    said = give(*BAD[case][0], "--json", code=2)
    assert said.json["exit_code"] == 2
    assert said.error == f"quadapt: {said.json['error']}"


def test_debug_shows_where_it_happened() -> None:
    assert "Traceback" in give(*BAD["cut"][0], "--debug", code=2).err


def test_a_bug_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AttributeError("nobody foresaw this")

    monkeypatch.setattr("quadapt.jobs.quantize.device_of", fail)
    said = give(*QUANTIZE, code=1)
    assert "AttributeError: nobody foresaw this" in said.err
    assert "--debug" in said.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lerning-rate", "1"), ("No such option: --lerning-rate", "--learning-rate")),
        (("--bits", "four"), ("--bits", "as an integer")),
    ],
)
def test_what_is_wrong_with_the_command_line(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    before = tree(Path())
    said = give(*TUNE, *arguments, code=2)
    for word in words:
        assert word in " ".join(said.err.replace("│", " ").split())
    assert "Traceback" not in said.err
    assert tree(Path()) == before


def test_a_missing_option_is_named() -> None:
    assert "--data" in give("tune", "dense", "--output", "new", code=2).err


# --- the machine ------------------------------------------------------------------------------------------------------

WRITERS = {
    "quantize": QUANTIZE,
    "tune": TUNE,
    "merge": ("merge", "adapter", "--output", "new"),
    "export": ("export", "merged", "--output", "new.gguf"),
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk_is_noticed_before_anything_is_written(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(Path())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    said = give(*WRITERS[command], code=2)
    assert "has 0.00 GB free, the output needs 0.00 GB. Free some space, or use --output on another disk" in said.error
    assert tree(Path()) == before


@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_without_permission_is_named(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    said = give(*WRITERS[command], code=2)
    assert "'.' cannot be written into (no permission). Use another --output" in said.error


def test_a_disk_that_fills_up_midway_leaves_no_output(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("quadapt.jobs.quantize.save_quantized", full)
    said = give(*QUANTIZE, code=2)
    assert said.error == (
        "quadapt: model.safetensors: no space left on the disk. Free some space, or use --output on another disk. The "
        "same command goes on where it stopped"
    )
    assert not (away / "new").exists()


def test_too_little_memory_is_refused_and_scarce_memory_warned_of(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(away)
    monkeypatch.setattr(memory, "machine_bytes", lambda _: (10**7, 10**7))
    said = give(*TUNE, "--method", "l4q", code=2)
    assert "GB of memory are needed, cpu has 0.0 GB. Use a smaller --batch-size" in said.error
    for quantizing in (TUNE, QUANTIZE):
        assert "cpu has 0.0 GB. Use a shorter --calibration-length" in give(*quantizing, code=2).error
    assert tree(away) == before
    monkeypatch.setattr(memory, "machine_bytes", lambda _: (10**12, 10**7))
    assert "warning: about" in give(*TUNE, code=0).err


def test_running_out_of_memory_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate: Out of memory")

    monkeypatch.setattr("quadapt.jobs.quantize.device_of", fail)
    assert "out of memory. Use a smaller --batch-size" in give(*QUANTIZE, code=2).error


# --- data -------------------------------------------------------------------------------------------------------------


def test_what_became_of_the_data_is_said(away: Path) -> None:
    (away / "rows.jsonl").write_text("".join(json.dumps({"text": STORY * count}) + "\n" for count in (1, 2)))
    said = give(*TUNE, "--data", "rows.jsonl", "--overwrite", code=0)
    assert "story.txt, rows.jsonl: 3 rows (text) in" in said.err
    assert "rows.jsonl: 2 rows" in said.err
    assert "an example: [no loss]T[loss]" in said.err
    (away / "sums.jsonl").open("a").write("{}\n")
    said = give("tune", "dense", "--data", "sums.jsonl", *TUNE[2:4], *TUNE[6:], "--overwrite", code=0)
    assert "an example: [no loss]0 + 0 =[loss] 0<end>" in said.err
    assert "skipped 1 row that cannot be used: sums.jsonl:" in said.err
