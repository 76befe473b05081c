"""Quantizers beside a branch: what they give becomes the base, and the branch an ordinary adapter over it."""

from __future__ import annotations

import torch
from torch import nn

from quadapt.hf.also import stored_bias
from quadapt.hf.peft_layer import QuantLoraLinear, adapted_layers
from quadapt.nn.adapters import ADAPTERS
from quadapt.nn.adapters.grid import GridAdapter


@torch.no_grad()
def settle_quantizers(model: nn.Module) -> None:
    """Give a model the base that its adapters have trained beside themselves, for good; it computes the same.

    `y = Q(W0) x + scaling * B A x` is LoRA over the codes of `Q(W0)`. Parameters of the quantizer are gone then;
    adapters that have no quantizer, or that are part of it, stay as they are.
    """
    for layer in adapted_layers(model).values():
        for name in layer.active():
            _settle(layer, name)


def _settle(layer: QuantLoraLinear, name: str) -> None:
    adapter = layer.adapters[name]
    if not adapter.over_codes:
        return
    (part,) = layer.parts([name])
    assert isinstance(adapter, GridAdapter)
    weight = adapter.quantized(layer.source, part.params, part.scaling)
    layer.settle(weight, stored_bias(layer.get_base_layer()))
    for own in layer.declared[name].keys() - {"A", "B"}:
        del getattr(layer, f"lora_{own}")[name]
    layer.adapters[name] = other = ADAPTERS[adapter.over_codes]()
    layer.declared[name] = other.params(weight.layout, layer.r[name])
    layer.frozen_peft_weight_names[name] = ()
