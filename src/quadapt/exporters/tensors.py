"""The tensors of a model as an ordinary checkpoint names them, quantized layers as their codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
"""The dtypes of torch by the short names that files have for them."""


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


def base_of(model: Any) -> Any:
    """The transformers model itself, if it is a PEFT model that holds one."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def refuse_adapters(model: nn.Module) -> None:
    """Raise ExportError if the model carries adapters, which would be left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    adapted = [name for name, module in model.named_modules() if isinstance(module, wrappers)]
    if adapted:
        raise ExportError(
            f"{adapted[0]}: carries an adapter, which is not part of this format. Merge it first "
            "(quadapt merge, or model.merge_and_unload()). Or export it by itself (--format lora), then "
            "take it off (model.unload()) and export the base"
        )


def shape_of(source: Source) -> tuple[int, ...]:
    """The shape that the tensor has once it is dense."""
    return (source.layout.out, source.layout.columns) if isinstance(source, QuantWeight) else tuple(source.shape)


def rounded_besides(sources: Mapping[str, Source], dtype: torch.dtype) -> list[str]:
    """A note on the tensors of unquantized layers that a dtype cannot hold as they are; nothing if it holds all."""
    rounded = [
        name
        for name, source in sources.items()
        if isinstance(source, Tensor)
        and source.is_floating_point()
        and not torch.equal(source.to(dtype).to(source.dtype), source)
    ]
    if not rounded:
        return []
    short = str(dtype).removeprefix("torch.")
    return [f"{len(rounded)} tensors that are not quantized are rounded to {short}: {', '.join(rounded)}"]


def as_stored(model: Any, sources: dict[str, Source]) -> dict[str, Source]:
    """Rename tensors to the names that transformers stores them by (GPT-NeoX's head is `embed_out` in its files).

    Raises:
        ExportError: Some tensors are stored in other pieces than the model computes with.
    """
    from transformers.core_model_loading import revert_weight_conversion

    marks = {name: torch.empty(shape_of(source), device="meta") for name, source in sources.items()}
    names = {id(mark): name for name, mark in marks.items()}
    stored = {other: names.get(id(mark)) for other, mark in revert_weight_conversion(model, dict(marks)).items()}
    if set(stored.values()) != set(sources) or len(stored) != len(sources):
        pieces = sorted(set(sources) - set(stored.values()))
        raise ExportError(
            f"{pieces[0]}: {type(model).__name__} is stored in other pieces than it computes with, "
            "which this export does not know. Use model.dequantize() and save_pretrained"
        )
    return {other: sources[name] for other, name in stored.items() if name is not None}


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor on the CPU; bfloat16, which numpy lacks, as int16 of the same bits.

    A copy: `.numpy()` of a model's own tensor would pin its storage, which FSDP2 must be free to resize.
    """
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
