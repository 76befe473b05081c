"""The commands on an adapter that trained more than layers over codes: nothing of it is lost, whatever they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from commands import give, quadapt
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quadapt.hf.peft_layer import lora_config
from quadapt.hf.quantizer import base_config
from quadapt.nn.adapters import Adapter, LoRA, Pooled

IDS = torch.tensor([[1, 5, 7, 5, 3, 12, 9, 40, 255, 254]])
"""With tokens whose rows train (5, 255)."""


@pytest.fixture(scope="module")
def base(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized base in which the output projections of attention are dense."""
    path = tmp_path_factory.mktemp("besides") / "base"
    quadapt("quantize", place / "dense", "--rounding", "nearest", "--skip", "o_proj", "--output", path)
    return path


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _adapter(LoRA(), base, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def pooled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _adapter(Pooled(), base, tmp_path_factory.mktemp("pooled"))


def _adapter(adapter: Adapter, base: Path, path: Path) -> Path:
    """An adapter over q_proj, with token rows, a norm, and LoRA over the head and a layer that was skipped."""
    model = AutoModelForCausalLM.from_pretrained(base)
    kind = lora_config(adapter, rank=2, alpha=4, base_fingerprint=base_config(model).fingerprint)
    targets = ["q_proj", "o_proj", "lm_head"] if adapter == LoRA() else ["q_proj"]
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=targets,
        task_type="CAUSAL_LM",
        auto_mapping=kind.auto_mapping,
        trainable_token_indices={"embed_tokens": [5, 255]},
        modules_to_save=["model.norm"],
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(path, save_embedding_layers=False)
    return path


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def answers(folder: Path, base: Path) -> tuple[Tensor, Tensor]:
    """Of the adapter, and of the base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    alone = logits(model)
    return logits(PeftModel.from_pretrained(model, folder)), alone


def lost(found: Tensor, folder: Path, base: Path) -> float:
    """Which share of what the adapter does is missing."""
    adapted, alone = answers(folder, base)
    assert (adapted - alone).norm() > 0.1 * alone.norm()
    return float((found - adapted).norm() / (adapted - alone).norm())


def test_merge_keeps_all_of_it_exactly(pooled: Path, base: Path, tmp_path: Path) -> None:
    said = quadapt("merge", pooled, "--base", base, "--output", tmp_path / "merged")
    assert said["certificate"]["verdict"] == "exact"
    assert said["certificate"]["probe"].endswith("and 2 tokens whose embeddings trained")
    assert {part["name"] for part in said["certificate"]["besides"]} == {"model.embed_tokens", "model.norm"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), answers(pooled, base)[0])
    shown = give("inspect", tmp_path / "merged", code=0).out
    assert "merged besides: model.embed_tokens, 2 token rows" in shown
    note = json.loads((tmp_path / "merged" / "quadapt.json").read_text())
    for damaged in (1.5, None, [1], [{"name": "model.norm"}]):
        note["certificate"]["besides"] = damaged
        (tmp_path / "merged" / "quadapt.json").write_text(json.dumps(note))
        assert "quadapt.json: is damaged (certificate.besides" in give("inspect", tmp_path / "merged", code=2).error


def test_requantizing_loses_what_rounding_loses_and_no_more(lora: Path, base: Path, tmp_path: Path) -> None:
    said = quadapt("merge", lora, "--base", base, "--requantize", "--output", tmp_path / "merged")
    assert {part["name"] for part in said["certificate"]["besides"]} >= {"lm_head", "model.layers.1.self_attn.o_proj"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert lost(logits(model), lora, base) < 0.5
    factor = load_file(lora / "adapter_model.safetensors")
    up, down = (factor[f"base_model.model.lm_head.lora_{part}.weight"] for part in "BA")
    moved = model.lm_head.weight - AutoModelForCausalLM.from_pretrained(base).lm_head.weight
    torch.testing.assert_close(moved, 2 * up @ down, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "pooled"])
def test_an_export_as_a_dense_model_has_all_of_it(
    kind: str, base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    export = ("export", folder, "--base", base, "--format", "hf", "--dtype", "float32", "--output", tmp_path / "hf")
    said = give(*export, code=0)
    assert "model.embed_tokens" in said.out + said.err
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    assert lost(found, folder, base) < 1e-4


def test_a_gguf_base_has_what_its_lora_file_cannot_hold(lora: Path, base: Path, tmp_path: Path) -> None:
    """Base and LoRA are two files that are served together; token rows, norm and dense layers are in the first."""
    quadapt("export", lora, "--base", base, "--output", tmp_path / "out.gguf")
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    trained = load_file(lora / "adapter_model.safetensors")
    rows = trained["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert np.array_equal(tensors["token_embd.weight"].data[[5, 255]], rows.numpy())
    assert np.array_equal(tensors["output_norm.weight"].data, trained["base_model.model.model.norm.weight"].numpy())
    up, down = (trained[f"base_model.model.lm_head.lora_{part}.weight"] for part in "BA")
    moved = tensors["output.weight"].data - AutoModelForCausalLM.from_pretrained(base).lm_head.weight.detach().numpy()
    np.testing.assert_allclose(moved, (2 * up @ down).numpy(), rtol=1e-4, atol=1e-5)
    names = {each.name for each in gguf.GGUFReader(tmp_path / "out-lora.gguf").tensors}
    assert names == {f"blk.{at}.attn_q.weight.lora_{part}" for at in (0, 1) for part in "ab"}


def test_an_exported_lora_over_the_exported_base_is_what_was_trained(lora: Path, base: Path, tmp_path: Path) -> None:
    quadapt("export", lora, "--base", base, "--format", "lora", "--output", tmp_path / "lora")
    quadapt("export", base, "--format", "hf", "--dtype", "float32", "--output", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert lost(logits(PeftModel.from_pretrained(model, tmp_path / "lora")), lora, base) < 1e-4


def test_formats_that_cannot_hold_it_name_it(lora: Path, base: Path, tmp_path: Path) -> None:
    said = give("export", lora, "--base", base, "--format", "nf8", "--output", tmp_path / "nf8", code=2)
    assert "model.embed_tokens: has 2 token rows trained, which nf8 cannot hold. Use --format lora" in said.error
    said = give("export", lora, "--base", base, "--format", "compressed-tensors", "--output", tmp_path / "ct", code=2)
    assert "Requantize it first" in said.error
    assert not list(tmp_path.iterdir())


def test_the_table_of_formats_knows_of_it(lora: Path, base: Path) -> None:
    rows = {row["format"]: row for row in quadapt("export", lora, "--base", base, "--format", "?")["formats"]}
    held = {name: row["holds"] for name, row in rows.items()}
    assert {name: each for name, each in held.items() if each != "no"} == {
        "gguf": "exactly",
        "hf": "changed",
        "lora": "exactly",
    }
    assert "model.embed_tokens: has 2 token rows trained, which nf8 cannot hold" in rows["nf8"]["words"]
