"""The scripts of examples/ run as they are, one after the other, and do what their first lines say."""

from __future__ import annotations

import io
import json
import re
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(ROOT / "tests" / "cli"))

from commands import byte_tokenizer, logits, write_data  # noqa: E402
from commands import quadapt as quadapt_command  # noqa: E402

import quadapt  # noqa: E402


def run(name: str, *arguments: str, cwd: Path) -> tuple[str, dict[str, Any]]:
    """What `python examples/NAME.py ARGUMENTS` in a folder prints, and what its names stand for at the end."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return said.getvalue(), names


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    sizes = {"vocab_size": 258, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0}
    tiny_llama(**sizes).save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def merged(place: Path) -> str:
    """What the first example printed; its model lies in `merged`."""
    return run("tune_and_merge", "dense", "story.txt", "merged", cwd=place)[0]


def test_tune_and_merge(place: Path, merged: str) -> None:
    assert "exact: logits bit-equal" in merged
    model, _ = quadapt.load(place / "merged")
    dense, _ = quadapt.load(place / "dense")
    assert not torch.allclose(logits(model), logits(dense), atol=1e-3)


def test_quantize_and_export(place: Path) -> None:
    _, names = run("quantize_and_export", "dense", "story.txt", "model.gguf", cwd=place)
    model, _ = quadapt.load(place / "model.gguf")
    assert torch.allclose(logits(model), logits(names["model"]), atol=1e-4)


@pytest.mark.usefixtures("merged")
def test_continue_adapter(place: Path) -> None:
    said, _ = run("continue_adapter", "merged", "story.txt", "adapter", cwd=place)
    losses = dict(re.findall(r"^(before|after): ([\d.]+)$", said, re.MULTILINE))
    before, after = float(losses["before"]), float(losses["after"])
    assert after < before
    model, _ = quadapt.load(place / "adapter", base=str(place / "merged"))
    assert not torch.equal(logits(model), logits(quadapt.load(place / "merged")[0]))


def test_gptq_in_gptq_out(place: Path) -> None:
    """What goes in is a GPTQ folder that was written from a dense model; what comes out is one that learned."""
    quadapt_command("quantize", place / "dense", "--zero", "integer", "--rounding", "nearest", "--output", place / "q4")
    quadapt_command("export", place / "q4", "--format", "gptq", "--output", place / "gptq")
    said, _ = run("gptq_in_gptq_out", "gptq", "story.txt", "gptq-out", cwd=place)
    losses = dict(re.findall(r"^(before|after): ([\d.]+)$", said, re.MULTILINE))
    before, after = float(losses["before"]), float(losses["after"])
    assert after < before
    assert "exact: logits bit-equal" in said
    about = json.loads((place / "gptq-out" / "config.json").read_text())["quantization_config"]
    assert (about["quant_method"], about["bits"]) == ("gptq", 4)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_tested_and_linked(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 15 <= len(lines) <= 40
    assert f"test_{path.stem}" in globals()
    assert f"examples/{path.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"python examples/{path.name} " in "\n".join(lines)
