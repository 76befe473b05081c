"""Starts and Block-AP by commands alone: fitted, kept, gone on with, handed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, digests, give, logits, quadapt
from safetensors.torch import load_file

from quadapt import load

pytestmark = pytest.mark.usefixtures("here", "shelf")

TEXT = ("--calibration-length", "32", "--calibration-sequences", "16")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Statistics are kept where no other test finds them."""
    monkeypatch.setenv("QUADAPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tuning(method: str, output: Path, *more: str) -> list[str]:
    grid = ("--method", method, "--bits", "3", "--group-size", "32", "--max-steps", "4")
    return ["tune", "dense", "--data", "story.txt", "--output", str(output), *grid, *TEXT, *SHORT, *more]


@pytest.mark.parametrize("method", ["loftq", "quailora", "cloq"])
def test_a_method_that_starts_by_a_fit(method: str, tmp_path: Path, cache: Path) -> None:
    said = quadapt(*tuning(method, tmp_path / "adapter"))
    assert said["losses"][-2]["loss"] < said["losses"][0]["loss"]
    base = quadapt("inspect", tmp_path / "adapter" / "base")
    assert base["made"]["start"]["kind"] == method
    assert base["made"]["start"]["rank"] == 2
    assert not (tmp_path / "adapter" / "start.safetensors").exists()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = [name for name in tensors if ".lora_first_B" in name]
    assert len(first) == 14
    assert all(bool(tensors[name].any()) for name in first)
    assert cache.exists() == (method != "loftq")


def test_the_same_statistics_serve_another_start(tmp_path: Path, cache: Path) -> None:
    give(*tuning("quailora", tmp_path / "one"), code=0)
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert len(kept) == 2
    said = give(*tuning("cloq", tmp_path / "other", "--bits", "2"), code=0)
    assert "statistics of the full-precision model: from" in said.err
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == kept


def test_it_goes_on_after_an_interruption_to_the_same_weights(
    tmp_path: Path, interrupted_at: Callable[..., list[int]]
) -> None:
    give(*tuning("quailora", tmp_path / "whole", "--save-steps", "1"), code=0)
    interrupted_at(1, 4)  # before the first checkpoint, and after some
    for code in (130, 130, 0):
        give(*tuning("quailora", tmp_path / "halves", "--save-steps", "1"), code=code)
    assert digests(tmp_path / "halves") == digests(tmp_path / "whole")


def test_what_is_exported_computes_the_same_without_the_first_factors(tmp_path: Path) -> None:
    give(*tuning("quailora", tmp_path / "adapter"), code=0)
    quadapt("export", tmp_path / "adapter", "--format", "lora", "--output", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[2] for name in tensors} == {"A.weight", "B.weight"}
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in tensors.items())


def test_a_calibrated_qa_lora_merges_exactly(tmp_path: Path) -> None:
    give(*tuning("qa-lora", tmp_path / "adapter", "--start", "quailora"), code=0)
    assert quadapt("merge", tmp_path / "adapter", "--output", tmp_path / "merged")["certificate"]["verdict"] == "exact"
    assert torch.equal(logits(load(str(tmp_path / "adapter"))[0]), logits(load(str(tmp_path / "merged"))[0]))


def test_block_ap_and_then_scales(tmp_path: Path) -> None:
    said = quadapt(*tuning("efficientqat", tmp_path / "adapter", "--calibration-epochs", "1"))
    assert said["method"] == "efficientqat"
    rows = json.loads((tmp_path / "adapter" / "base" / "quadapt.json").read_text())["rows"]
    errors = [row["block_error"] for row in rows]
    assert len(errors) == 14
    assert all(after <= before for before, after in errors)
    assert quadapt("merge", tmp_path / "adapter", "--output", tmp_path / "merged")["certificate"]["verdict"] == "exact"


def test_block_ap_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quadapt.nn.block_ap import BlockAP

    grid = ("--rounding", "block-ap", "--bits", "2", "--calibration-data", "story.txt", *TEXT)
    give("quantize", "dense", "--output", tmp_path / "whole", *grid, code=0)
    real, calls = BlockAP.fit, []

    def stop(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(BlockAP, "fit", stop)
    give("quantize", "dense", "--output", tmp_path / "halves", *grid, code=130)
    give("quantize", "dense", "--output", tmp_path / "halves", *grid, code=0)
    assert len(calls) == 3
    assert digests(tmp_path / "halves") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quantize", "dense", "--rounding", "block-ap", "-o", "x"), "rounding='block-ap' needs text to calibrate on"),
        (("quantize", "dense", "--calibration-epochs", "3", "-o", "x"), "setting of the rounding block-ap"),
        (("tune", "q4", "--data", "story.txt", "--start", "cloq", "-o", "x"), "Give the dense model"),
        (("tune", "dense", "--data", "story.txt", "--method", "l4q", "--start", "cloq", "-o", "x"), "nothing to start"),
    ],
)
def test_refusals(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    said = give(*arguments[:-1], tmp_path / arguments[-1], code=2)
    assert words in said.err
    assert not (tmp_path / "x").exists()


def test_the_compression_setting(tmp_path: Path) -> None:
    """LQ-LoRA: decompose, tune on text, hold the adapter as nf8, say the effective bits; then evaluate that."""
    give(*tuning("lq-lora", tmp_path / "adapter", "--fisher"), code=0)
    report = quadapt("export", tmp_path / "adapter", "--format", "nf8", "--output", tmp_path / "small")["reports"][0]
    assert report["notes"][0].startswith("effective bits per weight: ")
    assert not (tmp_path / "small" / "adapter_model.safetensors").exists()
    losses = [
        quadapt("eval", tmp_path / name, "--data", "story.txt", "--context", "32")["perplexity"]["loss"]
        for name in ("adapter", "small")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert quadapt("inspect", tmp_path / "small")["kind"] == "adapter"
    quadapt("export", tmp_path / "small", "--format", "hf", "--output", tmp_path / "dense")
    quadapt("merge", tmp_path / "small", "--requantize", "--output", tmp_path / "lossy")
