"""Adapters held as nf8: LQ-LoRA's compression setting, in which the adapter is part of what is stored.

`A [rank, in]` and `B [out, rank]` of each layer, the latter transposed so that its groups are long, are quantized
matrices like any other: 8-bit NormalFloat in groups of 64, scales as linear codes, 8.127 bits a number.

Source: LQ-LoRA (arXiv 2311.12023) §5.1 and the helper of its code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quadapt.files import writing
from quadapt.hf.doors import check_state
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight, from_fields

NF8_FILE = "adapter_nf8.safetensors"
NF8 = Format(levels="nf", bits=8, group_size=64)
SCALES = Storage(scales="linear8-256-fp32", offsets="absent")


def write_nf8(path: Path, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Write `A` and `B` of each layer under a temporary name, then rename; the bytes that each layer takes."""
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, dict[str, Any]] = {}
    sizes: dict[str, int] = {}
    for name, (A, B) in factors.items():
        for part, factor in (("A", A), ("B", B.T)):
            layout = Layout(format=NF8, storage=SCALES, out=factor.shape[0], columns=factor.shape[1])
            weight = Nearest()(factor.detach().float().contiguous().cpu(), layout)
            layouts[f"{name}.{part}"] = asdict(weight.layout)
            tensors |= {f"{name}.{part}.{each}": tensor for each, tensor in weight.tensors.items()}
            sizes[name] = sizes.get(name, 0) + weight.nbytes
    with writing(path) as temporary:
        save_file(tensors, temporary, metadata={"layouts": json.dumps(layouts)})
    return sizes


def read_nf8(path: Path) -> dict[str, Tensor]:
    """What :func:`write_nf8` wrote, as the state dict of a PEFT LoRA, float32."""
    found = {}
    with safe_open(path, framework="pt") as file:
        for key, fields in json.loads(file.metadata()["layouts"]).items():
            name, _, part = key.rpartition(".")
            layout = Layout(
                **{
                    **fields,
                    "format": from_fields(Format, fields["format"]),
                    "storage": from_fields(Storage, fields["storage"]),
                }
            )
            weight = QuantWeight(layout, {each: file.get_tensor(f"{key}.{each}") for each in layout.shapes})
            factor = weight.dequantize()
            found[f"base_model.model.{name}.lora_{part}.weight"] = factor if part == "A" else factor.T.contiguous()
    return found


def attach(model: nn.Module, folder: Path, *, dropout: float | None = None) -> nn.Module:
    """A PEFT model with the adapter of a folder, however that is held.

    Args:
        model: The base model.
        folder: The folder of the adapter.
        dropout: The dropout to train on with; None for inference.
    """
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    if not (folder / NF8_FILE).exists():
        if dropout is None:
            return PeftModel.from_pretrained(model, str(folder))
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.lora_dropout = dropout
        return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=True)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = dropout is None
    if dropout is not None:
        config.lora_dropout = dropout
    adapted = get_peft_model(model, config)
    factors = read_nf8(folder / NF8_FILE)
    check_state(adapted, "default", factors)
    with torch.no_grad():
        set_peft_model_state_dict(adapted, factors)
    return adapted
