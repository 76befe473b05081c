"""What is measured on a card, and what is asked of it. The documentation lists these rows, measured or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quadapt.kernels.dispatch import MOST_TOKENS


@dataclass(frozen=True)
class Row:
    """One number."""

    what: str
    """In words."""

    unit: str
    """Of the number."""

    limit: float | None = None
    """What is asked for on an H200; None for numbers that only inform."""

    at_least: bool = False
    """Whether the limit is the smallest number that will do, instead of the largest."""

    within: float | None = None
    """How far from one the number may be; None where a limit is asked, or nothing."""

    def met(self, value: float) -> bool | None:
        """Whether a number will do; None where nothing is asked."""
        if self.within is not None:
            return abs(value - 1) <= self.within
        if self.limit is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit

    def asked(self) -> str:
        """The limit in words."""
        if self.within is not None:
            return f"{1 - self.within:g} to {1 + self.within:g}"
        if self.limit is None:
            return ""
        return f"at {'least' if self.at_least else 'most'} {self.limit:g}"


BNB = "of PEFT + bitsandbytes nf4"
FULL = "Llama-2-7B's shape, 32 layers"
STEP = "4 x 1024 tokens, gradient checkpointing, AdamW"
MATRIX = "4096 x 11008"

ROWS: dict[str, Row] = {
    "copy": Row("copy from and to the card's memory, read and written", "TB/s"),
    "matmul": Row("bf16 product of 8192 x 8192 matrices", "TFLOP/s"),
    "dequantize_int4": Row(f"dequantize int4 of {MATRIX} to bf16, bytes read and written", "of the copy", 0.75, True),
    "dequantize_nf4": Row(f"dequantize nf4 of {MATRIX} to bf16, likewise", "of the copy", 0.75, True),
    "step_bf16": Row("step of PEFT's bf16 LoRA: 8 Llama-2-7B blocks, 4 x 1024 tokens", "ms"),
    "step_qlora": Row("step of QLoRA nf4", "of bf16 LoRA", 1.10),
    "step_gptq_lora": Row("step of LoRA over int4", "of bf16 LoRA", 1.10),
    "step_qa_lora": Row("step of QA-LoRA int4", "of bf16 LoRA", 1.10),
    "step_l4q": Row("step of L4Q int4", "of bf16 LoRA", 1.8),
    "step_lr_qat": Row("step of LR-QAT int4", "of bf16 LoRA"),
    "step_e2e_qp": Row("step of E2E-QP int4", "of bf16 LoRA"),
    "bnb_qlora": Row("step of QLoRA nf4", BNB, 0.85),
    "bnb_qa_lora": Row("step of QA-LoRA int4", BNB, 0.85),
    "memory_qlora": Row("peak memory of a QLoRA nf4 step", BNB, 1.0),
    "memory_qa_lora": Row("peak memory of a QA-LoRA int4 step", BNB, 1.0),
    "peak_bf16": Row("peak memory of a bf16 LoRA step", "GB"),
    "peak_qlora": Row("peak memory of a QLoRA nf4 step", "GB"),
    "peak_qa_lora": Row("peak memory of a QA-LoRA int4 step", "GB"),
    "icq": Row(f"ICQ's entropy search over {MATRIX}, nf4 in groups of 64", "ms", 50),
    "gptq": Row(f"GPTQ of {MATRIX} to int4 in groups of 128", "s", 3),
    "table": Row(f"LQ-LoRA's error table of {MATRIX}: 24 configurations, rank 64", "s", 5),
    "decode_bf16": Row("decoding, one token through 8 Llama-2-7B blocks, bf16, CUDA graph", "tokens/s"),
    "decode_int4": Row("decoding int4, fused product, CUDA graph", "times bf16", 2.5, True),
    "decode_nf4": Row("decoding nf4, doubly quantized scales, likewise", "times bf16"),
    "decode_int4pack": Row("decoding torch's int4 product, which torchao takes, likewise", "times bf16"),
    "decode_bnb": Row("decoding bitsandbytes nf4, likewise", "times bf16"),
    **{
        f"product_{tokens}": Row(
            f"fused product of {tokens} token{'s' * (tokens > 1)} with int4 4096 x 4096",
            "of dequantize + product",
            1.0 if tokens <= MOST_TOKENS["cuda"] else None,
        )
        for tokens in (1, 2, 4, 8, 16)
    },
    "full_nearest": Row(f"{FULL}: quantized to nf4 by nearest on the card", "s"),
    "full_gptq": Row(f"{FULL}: quantized to int4 by GPTQ, 128 x 2048 tokens", "s", 600),
    "full_gptq_peak": Row("peak memory of that", "GB"),
    "full_gptq_estimate": Row("peak memory of that", "of the dry run's estimate", within=0.1),
    **{
        f"full_{key}": row
        for method, name in (("qa_lora", "QA-LoRA int4"), ("qlora", "QLoRA nf4"), ("l4q", "L4Q int4"))
        for key, row in {
            f"{method}_step": Row(f"{FULL}: step of {name}, {STEP}", "s"),
            f"{method}_peak": Row("peak memory of that", "GB"),
            f"{method}_estimate": Row("peak memory of that", "of the dry run's estimate", within=0.1),
            f"{method}_of_bnb": Row("time of that step", BNB, None if method == "l4q" else 0.85),
            f"{method}_memory_of_bnb": Row("peak memory of that", BNB, None if method == "l4q" else 1.0),
        }.items()
    },
    "full_bnb_step": Row(f"{FULL}: step of PEFT + bitsandbytes nf4, {STEP}", "s"),
    "full_bnb_peak": Row("peak memory of that", "GB"),
}


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """What the steps of a model of full size take, of what they take with bitsandbytes, as far as both are measured."""
    found = {}
    for method in ("qa_lora", "qlora", "l4q"):
        for what, name in (("step", "of_bnb"), ("peak", "memory_of_bnb")):
            mine, theirs = rows.get(f"full_{method}_{what}"), rows.get(f"full_bnb_{what}")
            if mine and theirs:
                found[f"full_{method}_{name}"] = mine / theirs
    return found


def shown(rows: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """A table's rows: what, number with its unit, what is asked, whether it is met."""
    found = []
    for key, row in ROWS.items():
        value = rows.get(key)
        if isinstance(value, (int, float)):
            met = row.met(value)
            verdict = "" if met is None else "met" if met else "missed"
            found.append((row.what, f"{value:.3g} {row.unit}", row.asked(), verdict))
        else:
            why = f": {value}" if value else ""
            found.append((row.what, f"not measured{why}", f"{row.asked()} {row.unit}" if row.asked() else "", ""))
    return found
