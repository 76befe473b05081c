"""What users set on transformers' Trainer holds over our adapters, and what was trained still merges exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

import quadapt

KINDS = pytest.mark.parametrize("kind", ["qa-lora", "l4q"])
MAKE = Callable[..., Trainer]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 42)[None]).logits


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, 90, (12,), generator=random) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


@pytest.fixture
def make(quantized_llama: Callable[..., Any], tiny_llama: Callable[..., Any], tmp_path: Path) -> MAKE:
    """`make(kind, **arguments)`: a trainer over a tiny model, always the same one."""

    def of(kind: str, callbacks: Any = None, **arguments: Any) -> Trainer:
        torch.manual_seed(0)
        base = quantized_llama() if kind == "qa-lora" else tiny_llama()
        model = get_peft_model(base, quadapt.AdapterConfig(kind, r=2))
        usual = {"max_steps": 4, "learning_rate": 0.02, "logging_steps": 1, "save_strategy": "no"}
        about = TrainingArguments(
            str(tmp_path / "runs"),
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{**usual, **arguments},
        )
        return Trainer(model, about, train_dataset=rows(8), eval_dataset=rows(4), callbacks=callbacks)

    return of


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def merged_exactly(trainer: Trainer) -> None:
    inside: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    adapted = logits(inside)
    merged, certificate = quadapt.merge(trainer.model)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), adapted)


@pytest.mark.parametrize("kind", ["qa-lora", pytest.param("l4q", marks=pytest.mark.deep)])
@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": True},
        {"bf16": True},
        {"neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "group_by_length"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
        {"optim": "adafactor"},
        {"optim": "adamw_8bit"},
        {"optim": "paged_adamw_8bit"},
        {"optim": "paged_adamw_32bit"},
        {"optim": "lion_8bit", "learning_rate": 1e-3},
    ],
    ids=lambda each: "-".join(str(value) for value in each.values() if not isinstance(value, dict)),
)
def test_what_is_set_holds_and_merges_exactly(kind: str, settings: dict[str, Any], make: MAKE) -> None:
    if "bit" in str(settings.get("optim")):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    trainer = make(kind, **settings)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert len(losses(trainer)) == 4
    if "neftune_noise_alpha" not in settings:
        assert trainer.evaluate()["eval_loss"] != before
    merged_exactly(trainer)


@KINDS
def test_activation_checkpointing_changes_no_loss(kind: str, make: MAKE) -> None:
    plain, saving = make(kind), make(kind, activation_checkpointing=True)
    plain.train()
    saving.train()
    assert losses(plain) == losses(saving)


@KINDS
def test_eight_bit_states_are_used_where_a_tensor_is_large_enough(kind: str, make: MAKE) -> None:
    """bitsandbytes keeps the states of tensors under 4,096 numbers in float32."""
    optimizers = pytest.importorskip("bitsandbytes").optim
    trainer = make(kind, optim="adamw_8bit")
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, optimizers.AdamW)
    assert optimizer.args.optim_bits == 8
    wide = torch.nn.Parameter(torch.randn(64, 64))
    wide.grad = torch.ones_like(wide)
    optimizer.add_param_group({"params": [wide]})
    optimizer.step()
    assert optimizer.state[wide]["state1"].dtype == torch.uint8


@KINDS
def test_training_stops_early_and_the_best_state_is_loaded_at_the_end(kind: str, make: MAKE) -> None:
    trainer = make(
        kind,
        callbacks=[EarlyStoppingCallback(1)],
        max_steps=12,
        learning_rate=2.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step < 12
    assert min(measured) < measured[-1]
    assert trainer.evaluate()["eval_loss"] == min(measured)
    merged_exactly(trainer)


@KINDS
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(kind: str, make: MAKE, tmp_path: Path) -> None:
    whole = make(kind, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make(kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert torch.equal(logits(resumed.model), logits(whole.model))


@pytest.mark.deep
@KINDS
def test_torch_compile_trains_the_same_model(kind: str, make: MAKE) -> None:
    plain, compiled = make(kind), make(kind, torch_compile=True)
    plain.train()
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    merged_exactly(compiled)
