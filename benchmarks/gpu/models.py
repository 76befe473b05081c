"""Models to check and to time, made without the settings' library: `make gpu` needs no pydantic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from quadapt.hf.peft_layer import lora_config
from quadapt.hf.quantizer import adopt
from quadapt.methods import method_named
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.quant.gptq import GPTQ


def llama(device: torch.device, dtype: torch.dtype = torch.float32, **sizes: int) -> nn.Module:
    """A random Llama; small unless `sizes` says otherwise."""
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(LlamaConfig(**(small | sizes))).eval()  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(before)


def quantized(model: nn.Module, method: str, *, bits: int | None = None, batches: Sequence[Tensor] = ()) -> nn.Module:
    """A method's base in place of the model's matrices, on the device where they are; calibrated if there are batches.

    A method whose base is dense gets the model as it is.
    """
    chosen = method_named(method)
    if bits is not None:
        chosen = chosen.with_format(replace(chosen.format, bits=bits))
    if chosen.adapter.base != "float":
        selection, (format, storage, rounding) = select(model), chosen.base()
        rounding = GPTQ() if batches else rounding.without_data()
        plan = Quantization(format=format, storage=storage, rounding=rounding)
        quantize_model(model, selection.chosen, plan, batches=batches)
        adopt(model, left=selection.left, made={"method": method})
    return model


def adapted(model: nn.Module, method: str, *, rank: int, bits: int | None = None) -> nn.Module:
    """A method's adapter over a model, whose layers are rounded to nearest unless they are quantized."""
    names = list(quantized_layers(model)) or list(select(model).chosen)
    if not quantized_layers(model):
        quantized(model, method, bits=bits)
    config = lora_config(method_named(method).adapter, rank=rank, alpha=rank, target_modules=names)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def stock(rank: int) -> LoraConfig:
    """PEFT's own LoRA."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _cuda(_: torch.device) -> str:
    return "cuda"


@contextmanager
def triton_on(device: torch.device) -> Iterator[None]:
    """Inside, tensors on `device` are served by the Triton kernels: on the CPU, by the interpreter."""
    if device.type == "cuda":
        yield
        return
    with mock.patch("quadapt.kernels.dispatch.set_for", _cuda):
        yield
