"""From a dense model to what is served, by commands alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, SUMS, give, logits, quadapt

from quadapt import load

Shelf = dict[str, dict[str, Any]]

pytestmark = pytest.mark.usefixtures("here", "shelf")


def test_quantize(shelf: Shelf) -> None:
    said = shelf["q4"]
    assert said["layers"] == 14
    assert said["bits_per_weight"] == 5.0
    assert said["left"] == {"model.embed_tokens": "embedding", "lm_head": "output head"}
    assert said["file_bytes"] == Path("q4/model.safetensors").stat().st_size
    assert all(0 < row["error"] < 0.2 for row in said["rows"])
    note = json.loads(Path("q4/quadapt.json").read_text())
    assert note["made"]["calibration"] == {"data": "story.txt", "sequences": 33, "length": 32, "seed": 0}
    assert note["made"]["source"] == str(Path("dense").resolve())


def test_what_qa_lora_trained_is_what_its_merge_computes(shelf: Shelf) -> None:
    certificate = shelf["merged"]["certificate"]
    assert certificate["verdict"] == "exact"
    assert certificate["logits_equal"] is True
    assert certificate["effect_lost"] == 0
    assert certificate["probe"] == "256 tokens of story.txt"
    adapted, base, merged = (logits(load(name)[0]) for name in ("adapter", "adapter/base", "merged"))
    assert torch.equal(adapted, merged)
    assert not torch.allclose(adapted, base, atol=0.1)
    assert shelf["merged"]["bits"] == pytest.approx(
        {"base": 4.0, "merged": 4.0, "with_adapter": shelf["adapter"]["bits"]["with_adapter"]}
    )


def test_training_is_recorded(shelf: Shelf) -> None:
    said = shelf["adapter"]
    assert said["steps"] == 8
    losses = [entry["loss"] for entry in said["losses"] if "loss" in entry]
    assert losses[0] > said["final_loss"] == losses[-1]
    assert said["recipe"]["learning_rate"] == 0.02
    assert json.loads(Path("adapter/quadapt.json").read_text())["method"] == "qa-lora"
    assert {"base", "adapter_model.safetensors"} <= {item.name for item in Path("adapter").iterdir()}
    assert not {"checkpoints", "job.json", ".lock"} & {item.name for item in Path("adapter").iterdir()}


@pytest.mark.parametrize("name", ["q4", "nearest", "merged", "lossy", "adapter/base"])
def test_inspect_verifies_what_was_written(name: str) -> None:
    said = quadapt("inspect", name, "--verify")
    assert said["verified"] is True
    assert len(said["layers"]) == 14
    assert "verified: every tensor is what was written" in give("inspect", name, "--verify", code=0).out


def test_inspect_verifies_an_adapter_and_names_its_base(tmp_path: Path) -> None:
    said = give("inspect", "adapter", "--verify", code=0)
    assert "verified: every tensor is what was written, and so is all that is said of it" in said.out
    assert "has the fingerprint that it names" in said.out
    copy = shutil.copytree("adapter", tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "eos_token": "a"}))
    assert "copy: tokenizer_config.json: not what was written" in give("inspect", copy, "--verify", code=2).error


def test_inspect_shows_the_certificate_and_the_adapter() -> None:
    out = give("inspect", "merged", "--layers", code=0).out
    assert "merge: exact in float32 on 256 tokens of story.txt" in out
    assert "nan" not in out
    assert "model.layers.1.mlp.down_proj" in out
    out = give("inspect", "adapter", code=0).out
    assert "a pooled adapter (qa-lora) over adapter/base" in out
    assert quadapt("inspect", "over-q4")["base"] == "q4"


@pytest.mark.parametrize("data", ["story.txt", "sums.jsonl"])
def test_the_merged_model_measures_what_the_adapted_one_does(data: str) -> None:
    adapted, merged, base, gguf = (
        quadapt("eval", name, "--data", data, "--max-new-tokens", "6", "--context", "64")
        for name in ("adapter", "merged", "adapter/base", "merged.gguf")
    )
    measured = ("perplexity", "exact_match", "samples")
    assert [adapted.get(key) for key in measured] == [merged.get(key) for key in measured]
    assert adapted["perplexity"]["loss"] != base["perplexity"]["loss"]
    assert gguf["perplexity"]["loss"] == pytest.approx(merged["perplexity"]["loss"], rel=1e-4)
    assert ("exact_match" in merged) == (data == "sums.jsonl")
    if data == "story.txt":
        assert adapted["perplexity"]["loss"] < base["perplexity"]["loss"]  # it was trained on this
    else:
        assert merged["exact_match"]["count"] == len(SUMS)


def test_eval_writes_its_figures(tmp_path: Path) -> None:
    output = tmp_path / "new" / "figures.json"
    said = quadapt("eval", "merged", "--data", "sums.jsonl", "--limit", "2", "--output", output)
    assert json.loads(output.read_text()) == said


def test_exports_compute_alike(shelf: Shelf) -> None:
    merged = logits(load("merged")[0])
    for name in ("hf", "merged.gguf"):
        assert torch.allclose(logits(load(name)[0]), merged, atol=1e-4), name
    assert shelf["merged.gguf"]["reports"][0]["bits_per_weight"] == 5.0


def test_export_merges_an_adapter_first(tmp_path: Path) -> None:
    said = give("export", "adapter", "--output", tmp_path / "model.gguf", code=0)
    assert "merged first: exact: logits bit-equal" in said.err
    assert (tmp_path / "model.gguf").read_bytes()[-50_000:] == Path("merged.gguf").read_bytes()[-50_000:]


def test_an_exported_lora_over_the_dense_base_computes_alike(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    quadapt("export", "adapter/base", "--format", "hf", "--dtype", "float32", "--output", tmp_path / "dense")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    plain = logits(base)
    served = logits(PeftModel.from_pretrained(base, "lora"))
    adapted = logits(load("adapter")[0])
    assert float((served - adapted).norm() / (plain - adapted).norm()) < 0.05  # up to the rounding of offsets


def test_chat_answers_a_prompt() -> None:
    said = quadapt("chat", "merged", "--prompt", "The fox", "--max-new-tokens", "5")
    model, tokenizer = load("merged")
    ids = tokenizer("The fox", return_tensors="pt")["input_ids"]
    want = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert said == {"prompt": "The fox", "answer": tokenizer.decode(want, skip_special_tokens=True)}
    assert give("chat", "merged", "--prompt", "The fox", "--max-new-tokens", "5", code=0).out.strip("\n")
    sampled = ("chat", "merged", "--prompt", "The fox", "--temperature", "2", "--max-new-tokens", "5", "--seed")
    assert quadapt(*sampled, "1") == quadapt(*sampled, "1") != quadapt(*sampled, "2")


# --- qlora ------------------------------------------------------------------------------------------------------------


def test_qlora_does_not_merge_and_says_what_to_do(tmp_path: Path) -> None:
    said = give("merge", "qlora", "--output", tmp_path / "merged", code=2)
    for advice in ("export --format lora", "--method qa-lora", "merge --requantize"):
        assert advice in said.error
    assert not any(tmp_path.iterdir())


def test_requantizing_is_called_lossy(shelf: Shelf) -> None:
    certificate = shelf["lossy"]["certificate"]
    assert certificate["verdict"] == "lossy"
    assert certificate["logits_equal"] is False
    assert certificate["effect_lost"] > 0.05
    assert "merge: lossy in float32" in give("inspect", "lossy", code=0).out


def test_qlora_goes_out_as_base_and_lora(tmp_path: Path) -> None:
    said = give("export", "qlora", "--output", tmp_path / "model.gguf", code=0)
    assert "it goes out as a LoRA file beside the base" in said.err
    base = logits(load("qlora/base")[0])
    assert torch.allclose(logits(load(tmp_path / "model.gguf")[0]), base, atol=1e-4)
    assert (tmp_path / "model-lora.gguf").stat().st_size > 0
    quadapt("export", "qlora", "--format", "lora", "--output", tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_qlora_as_a_dense_model_computes_what_was_trained(tmp_path: Path) -> None:
    said = give("export", "qlora", "--format", "hf", "--dtype", "float32", "--output", tmp_path / "dense", code=0)
    assert "base and adapter are added up in the dense weights" in said.err
    assert "bits per quantized weight" not in said.out  # there is none left
    assert torch.allclose(logits(load(tmp_path / "dense")[0]), logits(load("qlora")[0]), atol=1e-4)


# --- other ways to tune -----------------------------------------------------------------------------------------------


def test_tuning_a_quantized_model_leaves_it_where_it_is() -> None:
    assert not Path("over-q4/base").exists()
    assert json.loads(Path("over-q4/quadapt.json").read_text())["base"]["relative"] == "../q4"
    assert not torch.equal(logits(load("over-q4")[0]), logits(load("q4")[0]))


def test_other_settings_reach_the_run(away: Path) -> None:
    shared = ("--method", "gptq-lora", "--group-size", "32", "--eval-split", "0.25", "--eval-steps", "1")
    more = ("--packing", "--gradient-checkpointing", "--target-modules", "q_proj,v_proj", "--skip", "down_proj")
    said = quadapt("tune", "dense", "--data", "sums.jsonl", *shared, *more, *SHORT, "--max-steps", "2", "-o", "adapter")
    assert said["eval_loss"] > 0
    assert len([entry for entry in said["losses"] if "eval_loss" in entry]) >= 2
    assert said["recipe"]["schedule"] == "cosine"
    config = json.loads((away / "adapter/adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "v_proj"}
    left = json.loads((away / "adapter/base/quadapt.json").read_text())["left"]
    assert left["model.layers.0.mlp.down_proj"] == "listed under skip"


def test_an_existing_output_is_replaced_when_asked(away: Path) -> None:
    quadapt("quantize", "dense", "--rounding", "nearest", "--output", "out")
    give("quantize", "dense", "--rounding", "nearest", "--bits", "8", "--output", "out", code=2)
    assert quadapt("inspect", "out")["bits_per_weight"] == 5.0
    quadapt("quantize", "dense", "--rounding", "nearest", "--bits", "8", "--output", "out", "--overwrite")
    assert quadapt("inspect", "out")["bits_per_weight"] == 9.0
    assert {item.name for item in away.iterdir()} == {"dense", "story.txt", "sums.jsonl", "out"}


@pytest.mark.parametrize("command", [("quantize", "dense", "--rounding", "nearest"), ("tune", "dense/x")])
def test_an_output_never_replaces_what_is_read(command: tuple[str, ...], away: Path) -> None:
    if command[0] == "tune":
        quadapt("quantize", "dense", "--rounding", "nearest", "--output", "dense/x")
        command = (*command, "--data", "story.txt")
    said = give(*command, "--output", "dense", "--overwrite", code=2)
    assert f"output='dense' would replace {command[1]!r}, which is read" in said.error
    assert (away / "dense" / "model.safetensors").exists()


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["dense", "q4", "nearest", "adapter", "over-q4", "merged", "qlora", "lossy", "merged.gguf", "hf"]
)
def test_everything_that_was_written_loads(name: str) -> None:
    model, tokenizer = load(name)
    ids = tokenizer("The fox", return_tensors="pt")["input_ids"]
    found = logits(model, ids[0].tolist())
    assert bool(torch.isfinite(found).all())
    assert found.shape == (6, 258)
    assert tokenizer.decode(ids[0]) == "The fox"
    assert not model.training
