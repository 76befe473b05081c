"""Other people's trainers over our models: the README's example, TRL, and stock PEFT under transformers' Trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SUMS, logits
from transformers import AutoModelForCausalLM

import quadapt
from quadapt.hf.peft_layer import QuantLoraLinear
from quadapt.quant.rounding import Nearest

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("away")
def test_the_first_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[:1]
    assert 10 <= len(example.splitlines()) <= 16
    for old, new in (
        ('"MODEL"', '"dense"'),
        ('"train.jsonl"', '"sums.jsonl"'),
        ("seq_len=512", "seq_len=64"),
        ('TrainingArguments("runs"', 'TrainingArguments("runs", max_steps=2, report_to="none", use_cpu=True'),
        ('calibration="sums.jsonl"', 'calibration="sums.jsonl", calibration_length=32, device="cpu"'),
    ):
        assert old in example
        example = example.replace(old, new)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["certificate"].verdict == "exact"
    assert "exact: logits bit-equal in float32" in capsys.readouterr().out
    want = logits(names["merged"])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("merged")), want)
    assert torch.allclose(logits(quadapt.load("model.gguf")[0]), want, atol=1e-4)


@pytest.fixture
def rows() -> Any:
    from datasets import Dataset

    return Dataset.from_list(SUMS)


def test_trl_trains_what_is_prepared(away: Path, rows: Any) -> None:
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = quadapt.prepare("dense", rounding="nearest", bits=3, rank=2, device="cpu")
    before = logits(model.eval())
    about = SFTConfig(
        str(away / "runs"), max_steps=2, learning_rate=0.02, max_length=32, report_to="none", use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(model, about, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained("dense"))
    assert trainer.train().global_step == 2
    after = logits(model.eval())
    assert not torch.equal(after, before)
    merged, certificate = quadapt.merge(model)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), after)


@pytest.mark.usefixtures("away")
def test_stock_lora_under_the_stock_trainer(place: Path, shelf: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    assert shelf
    base = AutoModelForCausalLM.from_pretrained(place / "q4")
    want = logits(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum(isinstance(module, QuantLoraLinear) for module in model.modules()) == 14
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 250, (4, 16))]
    about = TrainingArguments("runs", max_steps=2, learning_rate=0.02, report_to="none", use_cpu=True)
    trainer = Trainer(model, about, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.isfinite(torch.tensor(losses)))
    trainer.save_model("adapter")
    trained = logits(model.eval())
    assert not torch.equal(trained, want)
    fresh = AutoModelForCausalLM.from_pretrained(place / "q4")
    assert torch.equal(logits(fresh), want)
    fresh.load_adapter("adapter")
    assert torch.equal(logits(fresh.eval()), trained)
    from quadapt.hf.merge import merge

    _, certificate = merge(model, requantize=Nearest())
    assert certificate.verdict == "lossy"


@pytest.mark.parametrize("method", ["l4q", "peqa"])
def test_trl_prefers_with_the_untrained_adapter_as_its_reference(method: str, away: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs = [{"prompt": f"{at} + 1 =", "chosen": f" {at + 1}", "rejected": f" {at}"} for at in range(4)]
    model = quadapt.prepare("dense", method=method, rounding="nearest", bits=4, rank=2, device="cpu")
    before = logits(model.eval())
    about = DPOConfig(
        str(away / "runs"), max_steps=1, learning_rate=0.01, max_length=32, report_to="none", use_cpu=True
    )
    tokenizer = AutoTokenizer.from_pretrained("dense")
    trainer = DPOTrainer(model, args=about, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=0.01)  # model and reference are equal yet
    inside = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    trained = logits(inside)
    inside.set_adapter("ref")
    assert torch.equal(logits(inside), before)
    inside.set_adapter("default")
    assert not torch.equal(trained, before)
    merged, certificate = quadapt.merge(trainer.model)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), trained)
