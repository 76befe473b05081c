"""Folders that the commands have written, made once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT, byte_tokenizer, quadapt, write_data


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any]) -> Path:
    """A folder with a dense model in `dense`, and data."""
    folder = tmp_path_factory.mktemp("place")
    sizes = {"vocab_size": 258, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0}
    tiny_llama(**sizes).save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def shelf(place: Path) -> dict[str, dict[str, Any]]:
    """What the commands said who filled `place`: each is the name of a folder or file there."""
    before = Path.cwd()
    os.chdir(place)
    try:
        return _fill()
    finally:
        os.chdir(before)


def _fill() -> dict[str, dict[str, Any]]:
    said: dict[str, dict[str, Any]] = {}

    def fill(name: str, command: str, *arguments: object) -> None:
        said[name] = quadapt(command, *arguments, "--output", name)

    fill("q4", "quantize", "dense", "--calibration-data", "story.txt", "--calibration-length", "32")
    fill("nearest", "quantize", "dense", "--rounding", "nearest")
    fill(
        "adapter",
        "tune",
        "dense",
        "--method",
        "qa-lora",
        "--data",
        "story.txt",
        "--bits",
        "3",
        "--max-steps",
        "8",
        *SHORT,
    )
    fill("over-q4", "tune", "q4", "--data", "sums.jsonl", "--max-steps", "4", *SHORT)
    fill("merged", "merge", "adapter")
    fill("qlora", "tune", "dense", "--data", "story.txt", "--method", "qlora", "--max-steps", "8", *SHORT)
    fill("lossy", "merge", "qlora", "--requantize")
    fill("merged.gguf", "export", "merged")
    fill("hf", "export", "merged", "--format", "hf", "--dtype", "float32")
    fill("lora", "export", "adapter", "--format", "lora")
    return said


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: `place` itself. Nothing in it may change."""
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def away(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of one's own, with the dense model and the data."""
    shutil.copytree(place / "dense", tmp_path / "dense")
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
