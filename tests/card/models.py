"""What the tests quantize: the same tiny model on the CPU and on the card, and text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from pretend import CARD
from torch import Tensor, nn

from quadapt.model.layer import Quantization
from quadapt.model.quantize import Done, quantize_model
from quadapt.model.select import select
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage


def llama(layers: int = 2, **changes: Any) -> Any:
    """A random Llama in evaluation mode, nothing of it trainable, the same for the same arguments."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 96}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": layers, "initializer_range": 0.2, **changes}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)


def text(count: int = 3, length: int = 24) -> list[Tensor]:
    """Token ids `[2, length]`, so many of them."""
    random = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (2, length), generator=random) for _ in range(count)]


def everywhere(model: nn.Module) -> list[tuple[nn.Module, torch.device | None]]:
    """A model with the device that is to compute: on the card as a whole, on the CPU for the card."""
    return [(copy.deepcopy(model).to(CARD), None), (model, CARD)]


def plan(rounding: Any, **settings: Any) -> Quantization:
    """A plan for three bits, unless settings say otherwise."""
    return Quantization(
        **{"format": Format(bits=3, group_size=32), "storage": Storage(), "rounding": rounding, **settings}
    )


def quantized(
    model: nn.Module, device: torch.device | None, plan: Quantization, *, only: Sequence[str] = (), **settings: Any
) -> Done:
    """Quantize its layers, all or only some."""
    chosen = select(model, target_modules=only).chosen
    return quantize_model(model, chosen, plan, batches=text(), device=device, **settings)
