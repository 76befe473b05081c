"""What trainers put around a model is taken off before it is merged, or the merge says what to do."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from quadapt.errors import MergeError
from quadapt.hf.merge import merge
from quadapt.hf.peft_layer import adapted_layers, lora_config
from quadapt.nn.adapters import LoRA, Pooled
from quadapt.quant.format import Format


@pytest.fixture
def adapted(quantized_llama: Callable[..., Any]) -> Any:
    return _adapted(quantized_llama, Pooled())


def _adapted(quantized_llama: Callable[..., Any], adapter: Any) -> Any:
    model = get_peft_model(quantized_llama(Format(bits=4, group_size=32)), lora_config(adapter, rank=2, alpha=4)).eval()
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    return model


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def autocast(model: Any) -> Any:
    """As accelerate leaves it after training in bfloat16."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = (AcceleratorState, GradientState, PartialState)
    for state in states:  # of tests before this one, in the same process
        state._shared_state.clear()
    try:
        return Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    finally:
        for state in states:
            state._shared_state.clear()


def test_autocast_of_a_trainer_is_no_loss(adapted: Any) -> None:
    text = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = adapted(text).logits
    wrapped = autocast(adapted)
    with torch.no_grad():
        assert not torch.equal(wrapped(text).logits, before)
    merged, certificate = merge(wrapped)
    assert certificate.verdict == "exact"
    assert certificate.dtype == "float32"
    with torch.no_grad():
        assert torch.equal(merged(text).logits, before)


def test_a_model_that_does_not_merge_is_left_wrapped(quantized_llama: Callable[..., Any]) -> None:
    wrapped = autocast(_adapted(quantized_llama, LoRA()))
    text = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = wrapped(text).logits
    with pytest.raises(MergeError, match="q_proj"):
        merge(wrapped)
    with torch.no_grad():
        assert torch.equal(wrapped(text).logits, before)


@pytest.mark.usefixtures("alone")
def test_data_parallel_models_merge(adapted: Any) -> None:
    merged, certificate = merge(DistributedDataParallel(adapted))
    assert certificate.verdict == "exact"
    assert type(merged).__name__ == "LlamaForCausalLM"


@pytest.mark.usefixtures("alone")
def test_sharded_models_are_refused_with_what_to_do(adapted: Any) -> None:
    fully_shard(adapted)
    with pytest.raises(
        MergeError, match=r"is spread over processes .*trainer\.save_model\(FOLDER\).*quadapt merge FOLDER"
    ):
        merge(adapted)


def test_compiled_models_merge(adapted: Any) -> None:
    _, certificate = merge(torch.compile(adapted))
    assert certificate.verdict == "exact"
