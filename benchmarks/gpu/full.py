"""A model of full size: Llama-2-7B's shape with random weights, quantized on the card, and a step of each method."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import speed
from benchmarks.gpu.models import adapted, llama, quantized, stock
from benchmarks.peers import bitsandbytes
from quadapt.hf.peft_layer import lora_config
from quadapt.methods import method_named
from quadapt.model.layer import Quantization
from quadapt.model.select import select
from quadapt.nn.quant_linear import QuantLinear
from quadapt.report import memory

SHAPE = {**speed.BLOCKS, "num_hidden_layers": 32, "vocab_size": 32000, "max_position_embeddings": 2048}
CALIBRATION = (16, 8, 2048)
"""Batches, sequences of a batch, and tokens of a sequence, that GPTQ is given."""

RANK, ROUNDS = 16, 5


def dense() -> nn.Module:
    """The model in bfloat16."""
    return llama(speed.CARD, torch.bfloat16, **SHAPE)


def qa_lora() -> dict[str, Any]:
    """Quantized by GPTQ, then QA-LoRA's step."""
    model = dense()
    found = _by_gptq(model)
    return found | _step("qa_lora", adapted(model, "qa-lora", rank=RANK))


def _by_gptq(model: nn.Module) -> dict[str, Any]:
    """Quantize it to QA-LoRA's integers: seconds, and peak memory beside the dry run's."""
    batches, sequences, length = CALIBRATION
    ids = [torch.randint(0, SHAPE["vocab_size"], (sequences, length), device=speed.CARD) for _ in range(batches)]
    before = memory.parameter_bytes(model)
    torch.cuda.reset_peak_memory_stats()
    took = speed.elapsed(lambda: quantized(model, "qa-lora", batches=ids))
    peak = torch.cuda.max_memory_allocated()
    estimate = before + memory.parameter_bytes(model) + _gptq_bytes()
    return {"full_gptq": took, "full_gptq_peak": peak / 1e9, "full_gptq_estimate": peak / estimate}


def _gptq_bytes() -> int:
    """What the dry run counts beyond weights, dense and packed."""
    batches, sequences, length = CALIBRATION
    model = llama(torch.device("meta"), torch.bfloat16, **SHAPE)
    columns = SHAPE["intermediate_size"]
    step = memory.quantizing_bytes(columns * SHAPE["hidden_size"], columns, calibrated=True)
    step += memory.step_bytes(model, sequences, length, trains=False)
    return step + batches * sequences * length * memory.hidden_bytes(model)


def qlora() -> dict[str, Any]:
    """Quantized by nearest, then QLoRA's step."""
    model = dense()
    took = speed.elapsed(lambda: quantized(model, "qlora"))
    return {"full_nearest": took, **_step("qlora", adapted(model, "qlora", rank=RANK))}


def l4q() -> dict[str, Any]:
    """L4Q's step."""
    return _step("l4q", adapted(dense(), "l4q", rank=RANK))


def peer() -> dict[str, Any]:
    """The step of PEFT + bitsandbytes."""
    return _step("bnb", bitsandbytes(dense(), stock(RANK), speed.CARD.type))


def _step(name: str, model: Any) -> dict[str, float]:
    """Seconds and peak memory of a step with its optimizer; and the memory beside what a dry run says."""
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = torch.randint(0, SHAPE["vocab_size"], speed.BATCH, device=speed.CARD)
    work = _work(model, ids, optimizer)
    work()
    torch.cuda.reset_peak_memory_stats()
    took = statistics.median(speed.elapsed(work) for _ in range(ROUNDS))
    peak = torch.cuda.max_memory_allocated()
    found = {f"full_{name}_step": took, f"full_{name}_peak": peak / 1e9}
    if name != "bnb":
        found[f"full_{name}_estimate"] = peak / estimated(name.replace("_", "-"))
    return found


def _work(model: nn.Module, ids: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def work() -> None:
        with torch.autocast(speed.CARD.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def estimated(method: str) -> int:
    """Bytes of a step by the dry run's count: of the model in shapes alone, with its adapter."""
    from peft import get_peft_model

    chosen, model = method_named(method), llama(torch.device("meta"), torch.bfloat16, **SHAPE)
    layers, (format, storage, rounding) = select(model).chosen, chosen.base()
    plan = Quantization(format=format, storage=storage, rounding=rounding.without_data())
    if chosen.adapter.base != "float":
        for name, layer in layers.items():
            layout = plan.rounding.stored(plan.layout(name, layer.out_features, layer.in_features))
            model.set_submodule(name, QuantLinear(layout, device="meta", dtype=torch.bfloat16))
    weights = memory.parameter_bytes(model)
    config = lora_config(chosen.adapter, rank=RANK, alpha=RANK, target_modules=list(layers))
    adapter: Any = get_peft_model(model, config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    trained = memory.parameter_bytes(adapter, lambda parameter: parameter.requires_grad)
    adapter.enable_input_require_grads()
    adapter.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return weights + 4 * trained + memory.step_bytes(adapter, *speed.BATCH)
