"""`tune --train-also` through every command: nothing of it is lost, and all of it merges exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from commands import SHORT, digests, give, quadapt
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quadapt import load

pytestmark = pytest.mark.usefixtures("here", "shelf")

GRID = ("--method", "qa-lora", "--group-size", "32", "--rounding", "nearest")
ALSO = ("--train-also", "norms,head", "--train-also", "biases")


@pytest.fixture(scope="module")
def biased(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model of these tests, with biases, in bfloat16."""
    path = tmp_path_factory.mktemp("biased") / "dense"
    model, tokenizer = load(place / "dense")
    config = model.config
    config.attention_bias, config.mlp_bias = True, True
    torch.manual_seed(1)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.load_state_dict(model.state_dict(), strict=False)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.1 * torch.randn_like(parameter)
    made.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tune(model: Path, output: Path, *more: Any) -> dict[str, Any]:
    about = (*GRID, *SHORT, "--max-steps", "4", "--also-learning-rate", "0.004")
    return quadapt("tune", model, "--data", "story.txt", "--output", output, *about, *more)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.arange(3, 35)[None]).logits


def test_all_of_it_goes_through_merge_export_and_further_training(biased: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    tune(biased, adapter, *ALSO)
    trained = load_file(adapter / "adapter_model.safetensors")
    head = trained["base_model.model.lm_head.weight"]
    assert head.dtype == torch.bfloat16
    said = quadapt("merge", adapter, "--output", merged)["certificate"]
    assert said["verdict"] == "exact"
    listed = {part["name"] for part in said["besides"]}
    assert {"lm_head", "model.norm", "model.layers.0.self_attn.q_proj.bias"} < listed
    assert torch.equal(logits(load(merged)[0]), logits(load(adapter)[0]))
    assert torch.equal(load(merged)[0].lm_head.weight, head)
    for folder in (adapter, merged):
        assert quadapt("inspect", folder, "--verify")["verified"] is True
    quadapt("export", merged, "--output", tmp_path / "model.gguf")
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    norm = trained["base_model.model.model.norm.weight"].bfloat16().float()
    assert torch.equal(torch.tensor(tensors["output_norm.weight"].data), norm)
    again = tmp_path / "again"
    quadapt("tune", adapter, "--data", "story.txt", "--output", again, "--max-steps", "2", *SHORT[:6], "--lr", "1e-9")
    further = load_file(again / "adapter_model.safetensors")
    assert further.keys() == trained.keys()
    assert torch.equal(further["base_model.model.lm_head.weight"], head)  # such steps are too small to show
    assert json.loads((again / "quadapt.json").read_text())["settings"]["train_also"] == ["norms", "head", "biases"]


def test_what_is_computed_in_float32_over_a_base_in_bfloat16_is_what_a_merge_stores(
    biased: Path, tmp_path: Path
) -> None:
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    quadapt("quantize", biased, "--output", base, *GRID)
    quadapt(
        "tune",
        base,
        "--data",
        "story.txt",
        "--output",
        adapter,
        *SHORT,
        "--max-steps",
        "4",
        *ALSO,
        *("--dtype", "float32"),
    )
    quadapt("merge", adapter, "--output", merged)
    found, wanted = (load(each, dtype="float32")[0] for each in (merged, adapter))
    assert torch.equal(logits(found), logits(wanted))


def test_stock_lora_carries_all_of_it_and_says_so_and_nf8_refuses(biased: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    tune(biased, adapter, *ALSO, "--method", "qlora", "--bits", "4", "--group-size", "64")
    said = quadapt("export", adapter, "--format", "lora", "--output", tmp_path / "lora")
    assert "servers that know LoRA alone do not" in " ".join(said["reports"][0]["notes"])
    quadapt("export", adapter, "--format", "hf", "--dtype", "float32", "--output", tmp_path / "whole")
    quadapt("export", adapter / "base", "--format", "hf", "--dtype", "float32", "--output", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    whole, alone = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(base)
    found = logits(PeftModel.from_pretrained(base, tmp_path / "lora"))
    assert (found - whole).norm() < 0.05 * (alone - whole).norm()
    said = give("export", adapter, "--format", "nf8", "--output", tmp_path / "nf8", code=2)
    assert "which nf8 cannot hold" in said.error


def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    biased: Path, tmp_path: Path, interrupted_at: Callable[..., list[int]]
) -> None:
    tune(biased, tmp_path / "whole", *ALSO, "--save-steps", "1")
    interrupted_at(3)
    said = ("--data", "story.txt", "--output", tmp_path / "halves", *GRID, *SHORT, "--max-steps", "4", *ALSO)
    said = (*said, "--also-learning-rate", "0.004", "--save-steps", "1")
    give("tune", biased, *said, code=130)
    give("tune", biased, *said, code=0)
    assert digests(tmp_path / "halves") == digests(tmp_path / "whole")


def test_a_dry_run_counts_it(biased: Path) -> None:
    plain, also = (
        quadapt("tune", biased, "--data", "story.txt", "--dry-run", *GRID, *SHORT, *more)["memory"]["adapters"]
        for more in ((), ("--train-also", "embeddings"))
    )
    rows, width = load(biased)[0].get_input_embeddings().weight.shape
    assert also - plain == 4 * 4 * rows * width


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--train-also", "norm"), "Did you mean norms?"),
        (("--train-also", "norms,biases"), "has no biases. It has norms, embeddings, head"),
        (("--also-learning-rate", "0.1"), "Leave it out"),
    ],
)
def test_what_cannot_be_is_refused_with_advice(more: tuple[str, ...], words: str, tmp_path: Path) -> None:
    said = give("tune", "dense", "--data", "story.txt", "--output", tmp_path / "no", *GRID, *SHORT, *more, code=2)
    assert words in said.error
    assert not (tmp_path / "no").exists()
