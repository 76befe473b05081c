"""Methods that train the grid, by commands alone: tuned, merged exactly, verified, handed over, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, digests, give, logits, quadapt
from safetensors.torch import load_file

from quadapt import load
from quadapt.model.quantize import quantized_layers
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage

pytestmark = pytest.mark.usefixtures("here", "shelf")

CALIBRATED = ("--calibration-length", "32")
STEPS = ("--max-steps", "6")
EXACT = {"l4q": (), "lr-qat": ("--scale-lr", "1e-2"), "e2e-qp": ()}
EXACT |= {name: CALIBRATED for name in ("qa-lora-scales", "ir-qa-lora", "lota-qaf", "code-lora")}


def tune(method: str, output: str, *more: str, bits: int = 3) -> dict[str, Any]:
    grid = ("--method", method, "--bits", str(bits), "--group-size", "32")
    return quadapt("tune", "dense", "--data", "story.txt", "--output", output, "--max-steps", "6", *grid, *SHORT, *more)


@pytest.mark.parametrize("method", EXACT)
def test_what_was_trained_is_what_the_merge_computes(method: str, tmp_path: Path) -> None:
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    said = tune(method, adapter, *EXACT[method], bits={"l4q": 5, "lr-qat": 6}.get(method, 3))
    assert said["losses"][-2]["loss"] < said["losses"][0]["loss"]
    certificate = quadapt("merge", adapter, "--output", merged)["certificate"]
    assert certificate["verdict"] == "exact"
    assert torch.equal(logits(load(adapter)[0]), logits(load(merged)[0]))
    assert quadapt("inspect", merged, "--verify")["verified"] is True
    assert (tmp_path / "adapter" / "base").exists() == (method != "l4q")  # over the dense matrix nothing is written


def test_ir_qlora_is_handed_over_as_a_lora(tmp_path: Path) -> None:
    adapter = str(tmp_path / "adapter")
    said = quadapt(
        *("tune", "dense", "--data", "story.txt", "--output", adapter, "--max-steps", "6", "--method", "ir-qlora"),
        *SHORT,
    )
    assert said["losses"][-2]["loss"] < said["losses"][0]["loss"]
    (layer, *_) = quantized_layers(load(adapter)[0]).values()
    assert layer.layout.format == Format(levels="nf", bits=4, group_size=64, zero="float")
    assert layer.layout.storage == Storage(scales="double", offsets="double")
    give("merge", adapter, "--output", tmp_path / "no", code=2)
    quadapt("export", adapter, "--format", "lora", "--output", str(tmp_path / "lora"))
    names = set(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert len(names) == 28
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert len(load_file(Path(adapter) / "adapter_model.safetensors")) == 42


def test_l4q_goes_on_after_an_interruption_to_the_same_weights(
    tmp_path: Path, interrupted_at: Callable[..., list[int]]
) -> None:
    """Dense steps included: what begins to quantize does so once."""
    more = ("--dense-steps", "2", "--save-steps", "1")
    tune("l4q", str(tmp_path / "whole"), *more)
    steps = interrupted_at(5)
    grid = ("--method", "l4q", "--bits", "3", "--group-size", "32", "--max-steps", "6")
    said = ("tune", "dense", "--data", "story.txt", "--output", tmp_path / "halves", *grid, *SHORT, *more)
    give(*said, code=130)
    assert not (tmp_path / "halves").exists()
    give(*said, code=0)
    assert len(steps) == 5 + 2
    assert digests(tmp_path / "halves") == digests(tmp_path / "whole")


def test_whole_zero_points_reach_compressed_tensors(tmp_path: Path) -> None:
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    tune("l4q", adapter, "--zero", "integer")
    quadapt("merge", adapter, "--output", merged)
    said = quadapt("export", merged, "--format", "compressed-tensors", "--output", str(tmp_path / "ct"))
    assert said["reports"][0]["bits_per_weight"] > 3
    said = give("export", "merged", "--format", "compressed-tensors", "--output", tmp_path / "no", code=2)
    assert "offsets that compressed-tensors cannot hold" in said.error
    assert not (tmp_path / "no").exists()


def test_rilq_with_targets_from_disk_is_rilq_with_the_teacher_in_memory(tmp_path: Path) -> None:
    for name, flag in (("kept", "--keep-targets"), ("live", "--no-keep-targets")):
        tune("e2e-qp", str(tmp_path / name), "--objective", "rilq", flag)
    kept, live = (logits(load(str(tmp_path / name))[0]) for name in ("kept", "live"))
    torch.testing.assert_close(kept, live, rtol=1e-3, atol=1e-3)
    assert not (tmp_path / "kept" / "targets").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("q4", "--method", "l4q"), "starts from the dense model"),
        (("dense", "--method", "l4q", "--levels", "nf"), "levels='int'"),
        (("dense", "--method", "lr-qat", "--bits", "8"), "codes of 2 to 6 bits"),
        (("dense", "--method", "l4q", "--dropout", "0.1"), "train without it"),
        (("dense", "--method", "qat-lora", "--dropout", "0.1"), "train without it"),
        (("dense", "--method", "qlora", "--init", "lsq+"), "is a setting of the adapter of l4q"),
        (("dense", "--method", "qlora", "--dense-steps", "3"), "needs the dense matrix"),
        (("dense", "--method", "l4q", "--dense-steps", "6", "--max-steps", "6"), "Use fewer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_makes_no_sense_is_refused_with_advice(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    said = give("tune", *arguments, "--data", "story.txt", "--output", tmp_path / "new", *SHORT, code=2)
    assert told in said.error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("levels", "name"), [("fp4", "fp4-g32"), ("nf-qlora", "nf4-qlora-g32"), ("iq4-nl", "iq4-nl-g32")]
)
def test_the_tables_of_others_can_be_asked_for(levels: str, name: str, tmp_path: Path) -> None:
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    grid = ("--quant-type", levels, "--group-size", "32", "--rounding", "nearest")
    quadapt("quantize", "dense", "--output", base, *grid)
    assert {layer.layout.format.name for layer in quantized_layers(load(base)[0]).values()} == {name}
    assert quadapt("inspect", base, "--verify")["verified"] is True
    said = quadapt("tune", base, "--data", "story.txt", "--output", adapter, "--method", "qlora", *STEPS, *SHORT)
    assert said["losses"][-2]["loss"] < said["losses"][0]["loss"]
    said = give("quantize", "dense", "--output", tmp_path / "no", "--quant-type", levels, "--bits", "3", code=2)
    assert f"levels='{levels}' is defined for bits=4 alone" in said.error


def test_five_bits_go_all_the_way(tmp_path: Path) -> None:
    """Quantized, tuned over, merged and handed to llama.cpp's format: the same weights throughout."""
    base, adapter, merged = (str(tmp_path / name) for name in ("base", "adapter", "merged"))
    grid = ("--bits", "5", "--group-size", "32", "--rounding", "nearest")
    quadapt("quantize", "dense", "--output", base, *grid)
    assert {layer.layout.format.name for layer in quantized_layers(load(base)[0]).values()} == {"int5-g32"}
    quadapt("tune", base, "--data", "story.txt", "--output", adapter, "--max-steps", "2", *SHORT)
    assert quadapt("merge", adapter, "--output", merged)["certificate"]["verdict"] == "exact"
    said = quadapt("export", merged, "--output", str(tmp_path / "model.gguf"))
    assert {row["type"] for row in said["reports"][0]["tensors"] if row["linear"]} == {"Q5_1"}
    read, ours = quantized_layers(load(str(tmp_path / "model.gguf"))[0]), quantized_layers(load(merged)[0])
    for name, layer in ours.items():
        assert torch.equal(read[name].quant_weight.dequantize(), layer.quant_weight.dequantize()), name


@pytest.mark.parametrize("objective", ["kl", "js"])
def test_distillation_from_all_that_is_kept_is_that_with_the_teacher_in_memory(objective: str, tmp_path: Path) -> None:
    said = ("--objective", objective, "--weight", "0.9", "--temperature", "1.5", "--completion-only")
    kept = tune("qa-lora", str(tmp_path / "kept"), *said, "--top-tokens", "9999")
    live = tune("qa-lora", str(tmp_path / "live"), *said, "--no-keep-targets")
    assert kept["losses"][0]["loss"] == pytest.approx(live["losses"][0]["loss"], rel=2e-3)
    assert not (tmp_path / "kept" / "targets").exists()


def test_a_tuned_model_can_be_the_teacher_and_is_counted(tmp_path: Path) -> None:
    """One that is nowhere near the dense model; a dry run finds it, its size and its vocabulary."""
    teacher = str(tmp_path / "teacher")
    model, tokenizer = load("dense")
    for parameter in model.parameters():
        parameter.data *= 1.1
    model.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    more = ("--objective", "kl", "--weight", "1.0", "--data", "story.txt", "--bits", "3", "--group-size", "32", *SHORT)
    without, live, kept = (
        quadapt("tune", "dense", "--method", "qa-lora", "--dry-run", *each, *more[4:])["memory"]
        for each in ((), (*more[:4], "--no-keep-targets"), (*more[:4], "--top-tokens", "8"))
    )
    size = sum(each.numel() * each.itemsize for each in model.parameters())
    assert without["teacher"] == 0
    assert live["teacher"] > size
    assert 0 < kept["teacher"] < live["teacher"]
    assert live["total"] == sum(value for name, value in live.items() if name != "total")
    losses = [
        tune("qa-lora", str(tmp_path / name), *more[:4], *about)["losses"][0]["loss"]
        for name, about in (("own", ()), ("tuned", ("--teacher", teacher)))
    ]
    assert losses[1] > 1.05 * losses[0]
    config = model.config
    config.vocab_size = 8 + config.vocab_size
    model.resize_token_embeddings(config.vocab_size)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    grid = ("--method", "qa-lora", "--teacher", tmp_path / "other")
    said = give("tune", "dense", *grid, "--output", tmp_path / "no", *more, code=2)
    assert "cannot be compared" in said.error
