"""What quadapt is measured beside."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from torch import nn


def bitsandbytes(model: nn.Module, config: LoraConfig, device: str) -> nn.Module:
    """PEFT LoRA over bitsandbytes NF4 with double quantization, of a model in bfloat16."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            kind = {"quant_type": "nf4", "compress_statistics": True}
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, **kind
            )
            weight = layer.weight.data.float().cpu()
            packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=packed, **kind)
            model.set_submodule(name, packed.to(device))
    return get_peft_model(model, config)  # type: ignore[arg-type]
