"""What quadapt is measured beside."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn


def bitsandbytes(model: nn.Module, config: LoraConfig, device: str) -> nn.Module:
    """PEFT LoRA over bitsandbytes NF4 with double quantization, of a model in bfloat16."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            kind = {"quant_type": "nf4", "compress_statistics": True}
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, **kind
            )
            weight = layer.weight.data.float()
            packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=packed, **kind)
            model.set_submodule(name, packed.to(device))
    return get_peft_model(model, config)  # type: ignore[arg-type]


class Int4Pack(nn.Module):
    """A linear layer on torch's own product of bfloat16 with 4-bit codes, which torchao takes on CPUs and on cards.

    Args:
        codes: `[out, in]`, uint8.
        scales: `[out, groups]`.
        offsets: `[out, groups]`; a weight is `scales * code + offsets`.
        group: How many inputs share a scale.
    """

    def __init__(self, codes: Tensor, scales: Tensor, offsets: Tensor, group: int) -> None:
        super().__init__()
        self.group, middle = group, 8
        if codes.is_cuda:
            self.packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
            self.multiply = torch.ops.aten._weight_int4pack_mm
        else:
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            self.multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        self.constants = torch.stack([scales.T, (offsets + middle * scales).T], -1).bfloat16().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """The product, in bfloat16."""
        rows = self.multiply(x.flatten(0, -2), self.packed, self.group, self.constants)
        return rows.view(*x.shape[:-1], -1)
