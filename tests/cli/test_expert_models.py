"""Commands over mixtures of experts and over GPT-2: no setting is needed for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, byte_tokenizer, give, quadapt, write_data
from expert_models import IDS, logits_of, tensors_in, tiny_of
from transformers import AutoModelForCausalLM

from quadapt.hf.loading import load_model

NAMES = ("GPT2", "Mixtral", "GptOss")
CALIBRATION = ("--calibration-length", "32", "--calibration-sequences", "8")


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a dense model of the family that is asked for, and data beside it."""
    ends = {"vocab_size": 264, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 128}
    more = {"n_positions": 128} if request.param == "GPT2" else {"pad_token_id": 0}
    tiny_of(request.param, **ends, **more).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    write_data(tmp_path)
    return tmp_path


def _logits(model: Any) -> torch.Tensor:
    return logits_of(model, IDS)


@pytest.mark.parametrize("place", NAMES, indirect=True)
def test_quantized_by_gptq_and_verified(place: Path) -> None:
    given = ("quantize", place / "dense", "--rounding", "gptq", "--calibration-data", place / "story.txt", *CALIBRATION)
    dry = quadapt(*given, "--output", place / "out", "--dry-run")
    found = quadapt(*given, "--output", place / "out")
    assert found["left"] == dry["left"]
    assert set(dry["layers"]) == {row["name"] for row in found["rows"]}
    assert dry["file_bytes"] == pytest.approx(found["file_bytes"], rel=0.3)
    give("inspect", place / "out", "--verify", code=0)
    give("eval", place / "out", "--data", place / "story.txt", code=0)
    give("chat", place / "out", "--prompt", "The fox", "--max-new-tokens", "4", code=0)


@pytest.mark.parametrize("place", NAMES, indirect=True)
def test_tuned_merged_and_written_as_the_family_has_it(place: Path) -> None:
    tuned = ("tune", place / "dense", "--data", place / "story.txt", "--method", "l4q", *SHORT, "--output", place / "t")
    quadapt(*tuned, "--dry-run")
    quadapt(*tuned)
    found = quadapt("merge", place / "t", "--output", place / "m")
    assert found["certificate"]["verdict"] == "exact"
    give("inspect", place / "m", "--verify", code=0)
    quadapt("export", place / "m", "--format", "hf", "--dtype", "float32", "--output", place / "hf")
    wanted, written = tensors_in(place / "dense"), tensors_in(place / "hf")
    assert {name: each.shape for name, each in written.items()} == {name: each.shape for name, each in wanted.items()}
    plain = AutoModelForCausalLM.from_pretrained(place / "hf")
    torch.testing.assert_close(_logits(plain), _logits(load_model(str(place / "m"))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["Mixtral"], indirect=True)
@pytest.mark.parametrize("method", ["recover", "lq-lora"])
def test_stages_and_starts_work_over_experts(place: Path, method: str) -> None:
    given = ("tune", place / "dense", "--data", place / "story.txt", "--method", method, *SHORT, *CALIBRATION)
    dry = quadapt(*given, "--output", place / "out", "--dry-run")
    assert dry["memory"]["total"] > 0
    assert quadapt(*given, "--output", place / "out")["steps"] > 0
    assert 1 < quadapt("eval", place / "out", "--data", place / "story.txt")["perplexity"]["perplexity"] < math.inf


@pytest.mark.parametrize("place", ["Mixtral"], indirect=True)
def test_a_plan_gives_each_expert_its_own_bits(place: Path) -> None:
    quadapt("plan", place / "dense", "--budget", "3.5", "--output", place / "plan.json")
    given = ("quantize", place / "dense", "--rounding", "nearest", "--plan", place / "plan.json")
    found = quadapt(*given, "--output", place / "out")
    assert {"model.layers.0.mlp.experts.3.up_proj"} < {row["name"] for row in found["rows"]}
    assert found["bits_per_weight"] <= 3.5
