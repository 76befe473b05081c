"""The tensors of a model as an ordinary checkpoint names them, quantized layers as their codes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from quadapt.errors import ExportError
from quadapt.model.quantize import quantized_layers
from quadapt.quant.weight import QuantWeight

Source = QuantWeight | Tensor
"""Where the numbers of an exported tensor come from."""

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Short names of the floats that files hold."""

DTYPES = {name: dtype for dtype, name in TYPES.items()}
"""The same, by name."""


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Source]]:
    """Each tensor of the dense model under its name there: a QuantWeight for a quantized layer, tied ones once."""
    layers, seen = quantized_layers(model), set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        module, _, leaf = name.rpartition(".")
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if module not in layers or leaf == "bias":
            yield name, tensor.detach()
        elif leaf == "weight":
            yield name, layers[module].quant_weight


def refuse_adapters(model: nn.Module) -> None:
    """Raise ExportError if the model carries adapters, which would be left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ExportError(
            f"{adapted[0]}: carries an adapter, which is not part of this format. Merge it first "
            "(quadapt merge, or model.merge_and_unload()). Or export it by itself (--format lora), then "
            "take it off (model.unload()) and export the base"
        )


def shape_of(source: Source) -> tuple[int, ...]:
    """Shape of the dense tensor."""
    return (source.layout.out, source.layout.columns) if isinstance(source, QuantWeight) else tuple(source.shape)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor on the CPU; bfloat16, which numpy lacks, as int16 of the same bits.

    A copy: `.numpy()` of a model's own tensor would pin its storage, which FSDP2 must be free to resize.
    """
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
