"""`--scales k-quant`, by commands alone: quantized, tuned over, merged, and written as llama.cpp's super-blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, byte_tokenizer, give, logits, quadapt, write_data

from quadapt import load
from quadapt.model.embeddings import recognized
from quadapt.model.quantize import quantized_layers


@pytest.fixture(autouse=True)
def wide(tmp_path: Path, tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with a model whose matrices, but for one, have whole super-blocks; and data."""
    sizes = {"hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 1, "initializer_range": 0.05}
    sizes |= {"vocab_size": 258, "max_position_embeddings": 128, "eos_token_id": 0}
    tiny_llama(**sizes, bos_token_id=None).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("method", "bits", "kinds"),
    [
        ("qa-lora", 4, {"Q4_K", "Q5_1"}),
        ("l4q", 3, {"Q3_K", "Q4_0"}),
        ("qa-lora-scales", 2, {"Q2_K", "Q4_1"}),
        ("e2e-qp", 5, {"Q5_K", "Q5_1"}),
        ("l4q", 6, {"Q6_K", "Q8_0"}),
    ],
)
def test_what_was_trained_is_what_llama_cpps_file_holds(method: str, bits: int, kinds: set[str]) -> None:
    grid = ("--method", method, "--bits", str(bits), "--scales", "k-quant", "--calibration-length", "32")
    grid = grid if "qa" in method else grid[:-2]
    said = quadapt("tune", "dense", "--data", "story.txt", "--output", "adapter", "--max-steps", "4", *grid, *SHORT)
    assert said["losses"][-2]["loss"] < said["losses"][0]["loss"]
    assert quadapt("merge", "adapter", "--output", "merged")["certificate"]["verdict"] == "exact"
    assert torch.equal(logits(load("adapter")[0]), logits(load("merged")[0]))
    ours = quantized_layers(load("merged")[0])
    assert {layer.layout.name for layer in ours.values()} > {f"int{bits}-q{bits}k"}
    said = quadapt("export", "merged", "--output", "model.gguf")
    assert {row["type"] for row in said["reports"][0]["tensors"] if row["linear"]} == kinds
    read = quantized_layers(load("model.gguf")[0])
    for name, layer in ours.items():
        assert torch.equal(read[name].quant_weight.dequantize(), layer.quant_weight.dequantize()), name


def test_reports_name_the_grid_and_what_takes_its_place() -> None:
    said = quadapt("quantize", "dense", "--output", "q", "--bits", "4", "--scales", "k-quant", "--rounding", "nearest")
    formats = {row["name"].rpartition(".")[2]: (row["format"], row["bits_per_weight"]) for row in said["rows"]}
    assert formats["q_proj"] == ("int4-q4k", 4.5)
    assert formats["down_proj"] == ("int5-sym-g32", 5.5)
    assert [row["note"] for row in said["rows"] if row["note"]] == [
        "int5-sym-g32 for int4-q4k, as llama.cpp does: 96 inputs are no whole super-blocks"
    ]
    assert quadapt("inspect", "q")["layers"]["model.layers.0.self_attn.q_proj"] == "int4-q4k"
    for arguments, told in [
        (("--bits", "8"), "are for codes of 2, 3, 4, 5 or 6 bits"),
        (("--bits", "4", "--group-size", "64"), "have group_size=32 at 4 bits"),
        (("--bits", "3"), "moves offsets"),
    ]:
        said = give("quantize", "dense", "--output", "no", "--scales", "k-quant", *arguments, code=2)
        assert told in said.error


@pytest.mark.parametrize(("method", "kind"), [("qa-lora", "q8_0"), ("l4q", "q6_k")])
def test_embeddings_go_out_as_they_were_trained_with(method: str, kind: str) -> None:
    """Rounded first: what trains over them, merges and serves is the same model; the file is as much smaller."""
    grid = ("--method", method, "--bits", "4", "--scales", "k-quant", "--embeddings", kind)
    grid += ("--calibration-length", "32") if method == "qa-lora" else ()
    quadapt("tune", "dense", "--data", "story.txt", "--output", "adapter", "--max-steps", "4", *grid, *SHORT)
    assert quadapt("merge", "adapter", "--output", "merged")["certificate"]["verdict"] == "exact"
    model = load("merged")[0]
    assert torch.equal(logits(load("adapter")[0]), logits(model))
    dense = load("dense")[0]
    for name in ("model.embed_tokens", "lm_head"):
        ours, before = (each.get_submodule(name).weight for each in (model, dense))
        assert recognized(ours, kind) is not None
        assert 0 < float((ours - before).norm() / before.norm()) < 0.03
    said = quadapt("export", "merged", "--output", "model.gguf")["reports"][0]
    types = {row["name"]: row["type"] for row in said["tensors"]}
    assert types["token_embd.weight"] == types["output.weight"] == kind.upper()
    assert any("its values are those of" in note for note in said["notes"])
    read = load("model.gguf")[0]
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(read.get_submodule(name).weight, model.get_submodule(name).weight)


def test_a_base_with_rounded_embeddings_is_another_base(tmp_path: Path) -> None:
    bits = ("--bits", "4", "--rounding", "nearest")
    said = quadapt("quantize", "dense", "--output", "rounded", *bits, "--embeddings", "q8_0")
    noted = {"kind": "q8_0", "layers": ["model.embed_tokens", "lm_head"], "bits_per_weight": 8.5}
    assert said["made"]["embeddings"] == noted
    assert quadapt("inspect", "rounded", "--verify")["verified"] is True
    quadapt("quantize", "dense", "--output", "plain", *bits)
    quadapt("tune", "rounded", "--data", "story.txt", "--output", "adapter", "--max-steps", "1", *SHORT)
    give("merge", "adapter", "--base", "plain", "--output", tmp_path / "no", code=2)
    said = give("tune", "rounded", "--data", "story.txt", "--output", "no", "--embeddings", "q8_0", *SHORT, code=2)
    assert "embeddings has no meaning here" in said.error
    said = give("quantize", "dense", "--output", "no", *bits, "--embeddings", "q6_k", "--dtype", "bfloat16", code=2)
    assert "bfloat16 does not hold the values of q6_k" in said.error


def test_rows_that_trained_leave_the_grid_and_the_report_says_so() -> None:
    grid = (
        "--method",
        "qa-lora",
        "--bits",
        "4",
        "--scales",
        "k-quant",
        "--embeddings",
        "q8_0",
        "--rounding",
        "nearest",
    )
    tokens = ("--train-tokens", "he", "--max-steps", "2")
    quadapt("tune", "dense", "--data", "story.txt", "--output", "adapter", *tokens, *grid, *SHORT)
    quadapt("merge", "adapter", "--output", "merged")
    said = quadapt("export", "merged", "--output", "model.gguf")["reports"][0]
    types = {row["name"]: (row["type"], row["note"]) for row in said["tensors"]}
    assert types["token_embd.weight"] == ("F32", "was rounded to q8_0 once, and no longer has such values: left as F32")
