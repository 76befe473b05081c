"""Folders that were moved, folders that were changed, and what a dry run says of folders to come."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, byte_tokenizer, give, logits, quadapt, tree, write_data
from huggingface_hub import ModelCard

from quadapt import load

Shelf = dict[str, dict[str, Any]]

# --- moved ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(place: Path, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, `q4`, and an adapter trained over it there, `over-q4`."""
    assert shelf
    folder = tmp_path / "first"
    folder.mkdir()
    shutil.copytree(place / "dense", folder / "dense")
    write_data(folder)
    monkeypatch.chdir(folder)
    quadapt("quantize", "dense", "--rounding", "nearest", "-o", "q4")
    quadapt("tune", "q4", "--data", "sums.jsonl", "--max-steps", "2", *SHORT, "-o", "over-q4")
    return folder


def test_base_and_adapter_moved_together(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = logits(load("over-q4")[0])
    monkeypatch.chdir(tmp_path)
    shutil.move(pair, "second")
    assert torch.equal(logits(load("second/over-q4")[0]), want)
    assert quadapt("inspect", "second/over-q4")["base"] == "second/q4"
    assert quadapt("merge", "second/over-q4", "-o", "merged")["certificate"]["verdict"] == "exact"


@pytest.mark.usefixtures("pair")
def test_an_adapter_moved_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = logits(load("over-q4")[0])
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.move("over-q4", tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load("far/away/over-q4")[0]), want)
    assert quadapt("merge", "far/away/over-q4", "-o", "merged")["certificate"]["verdict"] == "exact"


def test_a_base_that_is_gone_is_asked_for(pair: Path) -> None:
    want = logits(load("over-q4")[0])
    shutil.move("q4", "elsewhere")
    for command in (
        ("merge", "-o", "new"),
        ("eval", "--data", "story.txt"),
        ("export", "-o", "x"),
        ("chat", "-p", "a"),
    ):
        said = give(command[0], "over-q4", *command[1:], code=2)
        assert f"over-q4: its base is neither at 'over-q4/../q4' nor at '{pair / 'q4'}'" in said.error
        assert said.error.endswith("Say where it is with --base")
    assert torch.equal(logits(load("over-q4", base="elsewhere")[0]), want)
    assert quadapt("merge", "over-q4", "--base", "elsewhere", "-o", "new")["certificate"]["verdict"] == "exact"
    assert "over a base that is not where it was" in give("inspect", "over-q4", code=0).out


def test_an_adapter_with_its_base_inside_moves_as_one(
    place: Path, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shelf
    shutil.copytree(place / "adapter", tmp_path / "moved")
    want = logits(load(place / "adapter")[0])
    monkeypatch.chdir(tmp_path)
    assert quadapt("inspect", "moved")["base"] == "moved/base"
    assert torch.equal(logits(load("moved")[0]), want)


@pytest.mark.usefixtures("pair")
def test_an_adapter_of_stock_peft_merges_by_requantizing() -> None:
    """It has no `quadapt.json`: its own config says where its base is."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load("q4")[0], LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    model.save_pretrained("stock")
    assert "stock: a PEFT adapter (unknown method) over q4" in give("inspect", "stock", code=0).out
    said = quadapt("merge", "stock", "--requantize", "-o", "merged")
    assert said["certificate"]["verdict"] == "lossy"
    assert said["bits"]["base"] == said["bits"]["merged"] == 5.0
    assert said["bits"]["with_adapter"] > 5.0


# --- changed ----------------------------------------------------------------------------------------------------------


def flip(file: Path, tensor: str) -> None:
    """Change one bit in the middle of a tensor."""
    data = bytearray(file.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    start, end = json.loads(data[8 : 8 + header])[tensor]["data_offsets"]
    data[8 + header + (start + end) // 2] ^= 1
    file.write_bytes(data)


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("kind", ["base", "merged"])
@pytest.mark.parametrize(
    ("tensor", "named"),
    [(f"{LAYER}.{part}", LAYER) for part in ("weight", "scales", "offsets")] + [("model.norm.weight",) * 2],
)
def test_one_bit_is_noticed_and_named(
    tensor: str, named: str, kind: str, place: Path, shelf: Shelf, tmp_path: Path
) -> None:
    assert shelf
    folder = shutil.copytree(place / ("nearest" if kind == "base" else "merged"), tmp_path / "copy")
    quadapt("inspect", folder, "--verify")
    flip(folder / "model.safetensors", tensor)
    said = give("inspect", folder, "--verify", code=2)
    assert f"copy: {named}: not what was written" in said.error
    assert "verified" not in said.out


# --- dry runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid", [("--bits", "3"), ("--method", "qlora"), ("--method", "qa-lora", "--bits", "8", "--skip", "down_proj")]
)
@pytest.mark.parametrize("command", ["quantize", "tune"])
def test_a_dry_run_writes_nothing_and_foretells_the_size(
    command: str, grid: tuple[str, ...], tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    tiny_llama(vocab_size=258, hidden_size=256, intermediate_size=512).save_pretrained("dense")
    byte_tokenizer().save_pretrained("dense")
    arguments = ("quantize", "dense", "--rounding", "nearest", *grid, "--output", "new")
    if command == "tune":
        arguments = ("tune", *arguments[1:], "--data", "story.txt", "--max-steps", "1", *SHORT)
    before = tree(tmp_path)
    said = quadapt(*arguments, "--dry-run")
    shown = give(*arguments, "--dry-run", code=0).out
    assert tree(tmp_path) == before
    done = quadapt(*arguments)
    base = Path("new/base" if command == "tune" else "new")
    real = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert said["file_bytes"] == pytest.approx(real, rel=0.02)
    made = quadapt("inspect", base)
    assert said["layers"] == made["layers"]
    assert said["left"] == made["left"]
    assert said["bits_per_weight"] == pytest.approx(made["bits_per_weight"])
    lines = [line.split() for line in shown.splitlines()]
    for layer, format in made["layers"].items():
        (line,) = [line for line in lines if line and line[0] == layer]
        assert line[-2] == format
        assert float(line[-1]) > 2
    assert "estimated peak memory" in shown
    assert said["memory"]["total"] > 0
    assert done["output"] == "new"


def test_a_dry_run_of_what_is_quantized(place: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shelf
    monkeypatch.chdir(place)
    said = quadapt("tune", "q4", "--data", "story.txt", "--output", "new", "--dry-run", *SHORT)
    assert said["layers"] == quadapt("inspect", "q4")["layers"]
    assert said["file_bytes"] == pytest.approx(Path("q4/model.safetensors").stat().st_size, rel=0.05)


@pytest.mark.usefixtures("here")
def test_the_card_of_an_adapter_names_a_base_that_is_there(shelf: Shelf) -> None:
    assert shelf
    for adapter in ("adapter", "over-q4"):
        card = ModelCard.load(Path(adapter) / "README.md")
        assert (Path(adapter) / card.text.partition(" over ")[2].partition(", written")[0]).is_dir()
        assert ".partial" not in Path(adapter, "README.md").read_text()
