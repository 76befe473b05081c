"""A fine-tuning step over quantized weights, against the same step of PEFT LoRA over bfloat16 weights.

Forward and backward of 512 tokens through 4 Llama layers (hidden 1024, intermediate 2816), rank 16 on all linear
layers. Limits: int4 QA-LoRA and NF4 QLoRA at most 1.10 of PEFT's bf16 LoRA step (goal 1.05), and not slower than PEFT +
bitsandbytes NF4; L4Q, LoTA-QAF and code-lora, which have three products where LoRA has two, at most 2.0 (goal 1.7), and
L4Q at most 0.6 of the same model whose layers are written in plain autograd.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import quadapt
from benchmarks.fake import plain
from benchmarks.measure import THREADS, in_turn, ratio, store, table
from benchmarks.peers import bitsandbytes
from quadapt.quant.products import product_dtype

CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=1024,
)
RANK = 16
STOCK = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def dense() -> nn.Module:
    """The model in bfloat16."""
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to(torch.bfloat16)


CANDIDATES: dict[str, Callable[[], nn.Module]] = {
    "PEFT LoRA, bf16": lambda: get_peft_model(dense(), STOCK),
    "PEFT LoRA, bf16, bf16 adapters": lambda: get_peft_model(dense(), STOCK, autocast_adapter_dtype=False),
    "QA-LoRA int4": lambda: quadapt.prepare(dense(), method="qa-lora", rounding="nearest", rank=RANK, alpha=RANK),
    "QA-LoRA int3": lambda: quadapt.prepare(
        dense(), method="qa-lora", bits=3, rounding="nearest", rank=RANK, alpha=RANK
    ),
    "QA-LoRA int2": lambda: quadapt.prepare(
        dense(), method="qa-lora", bits=2, rounding="nearest", rank=RANK, alpha=RANK
    ),
    "QLoRA nf4": lambda: quadapt.prepare(dense(), method="qlora", rank=RANK, alpha=RANK, dropout=0.0),
    "GPTQ-LoRA int4": lambda: quadapt.prepare(dense(), method="gptq-lora", rounding="nearest", rank=RANK, alpha=RANK),
    "L4Q int4": lambda: quadapt.prepare(dense(), method="l4q", rank=RANK, alpha=RANK),
    "LR-QAT int4": lambda: quadapt.prepare(dense(), method="lr-qat", rank=RANK, alpha=RANK),
    "LoTA-QAF int4": lambda: quadapt.prepare(dense(), method="lota-qaf", rounding="nearest", rank=RANK),
    "code-lora int4": lambda: quadapt.prepare(dense(), method="code-lora", rounding="nearest", rank=RANK, alpha=RANK),
    "E2E-QP int4": lambda: quadapt.prepare(dense(), method="e2e-qp"),
    "PEQA int4": lambda: quadapt.prepare(dense(), method="peqa"),
    "PEFT + bitsandbytes nf4": lambda: bitsandbytes(dense(), STOCK, "cpu"),
}
BASE = "PEFT LoRA, bf16"
PLAIN = ("L4Q int4", "LR-QAT int4", "E2E-QP int4", "PEQA int4")
"""Methods that are also timed with layers in plain autograd."""


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """One forward and backward pass."""
    model.train()

    def work() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return work


def in_plain_autograd(work: Callable[[], None]) -> Callable[[], None]:
    """The same step, the product with a trained grid left to torch."""

    def patched() -> None:
        with mock.patch("quadapt.nn.adapters.grid.fake_quant_matmul", plain):
            work()

    return patched


def of_plain(times: dict[str, list[float]], name: str) -> float | None:
    """Ratio to the step in plain autograd, where there is one."""
    peer = f"{name}, plain autograd"
    return ratio(times, name, peer) if peer in times else None


def main(rounds: int = 11) -> dict[str, Any]:
    """Measure, print and store."""
    torch.set_num_threads(THREADS)
    ids = torch.randint(0, CONFIG.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
    steps = {name: step(build(), ids) for name, build in CANDIDATES.items()}
    steps |= {f"{name}, plain autograd": in_plain_autograd(step(CANDIDATES[name](), ids)) for name in PLAIN}
    times = in_turn(steps, rounds=rounds)
    bnb = "PEFT + bitsandbytes nf4"
    rows = [
        (
            name,
            1000 * statistics.median(took),
            ratio(times, name, BASE),
            ratio(times, name, bnb),
            of_plain(times, name),
        )
        for name, took in times.items()
    ]
    table(
        "a fine-tuning step of 512 tokens",
        ("step", "median ms", "of PEFT bf16 LoRA", "of PEFT + bitsandbytes nf4", "of plain autograd"),
        [tuple("" if cell is None else cell for cell in row) for row in rows],
    )
    figures = {
        "limit": "int4 QA-LoRA and nf4 QLoRA at most 1.10 of PEFT's bf16 LoRA (goal 1.05), and 1.0 of bitsandbytes; "
        "L4Q, LoTA-QAF and code-lora at most 2.0 (goal 1.7), and L4Q 0.6 of plain autograd",
        "rows": [
            {
                "step": name,
                "median_ms": ms,
                "of_bf16_lora": of_bf16,
                "of_bitsandbytes": of_bnb,
                "of_plain_autograd": of_autograd,
            }
            for name, ms, of_bf16, of_bnb, of_autograd in rows
        ],
    }
    short = product_dtype(torch.empty(0, dtype=torch.bfloat16)) == torch.bfloat16
    store("step" if short else "step-float32", figures)  # two kinds of processors, which have a table each
    return figures
