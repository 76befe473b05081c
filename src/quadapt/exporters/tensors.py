"""The tensors of a model as an ordinary checkpoint names them, quantized layers as their codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quadapt.errors import ExportError
from quadapt.model.quantize import quantized_layers
from quadapt.quant.weight import QuantWeight

Source = QuantWeight | Tensor
"""Where the numbers of an exported tensor come from."""


@dataclass(frozen=True)
class Assembled:
    """A tensor that the dense model stores as one, and the linear form has as several."""

    pieces: Sequence[Source]
    """What it is made of."""

    shape: tuple[int, ...]
    """The shape of the tensor once it is dense."""

    join: Callable[[list[Tensor]], Tensor]
    """The function that makes one tensor of the dense pieces."""


Stored = Source | Assembled
"""Where the numbers of a tensor of transformers' files come from."""

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


def shape_of(source: Stored) -> tuple[int, ...]:
    """The shape that the tensor has once it is dense."""
    return (source.layout.out, source.layout.columns) if isinstance(source, QuantWeight) else tuple(source.shape)


def quantized_parts(source: Stored) -> list[QuantWeight]:
    """The quantized matrices that a tensor's numbers come from; none if it is not quantized."""
    pieces = source.pieces if isinstance(source, Assembled) else [source]
    return [piece for piece in pieces if isinstance(piece, QuantWeight)]


def dense_of(source: Stored, cast: Callable[[Source], Tensor]) -> Tensor:
    """A tensor as `cast` makes its pieces dense, or it as a whole if it is one."""
    if isinstance(source, Assembled):
        return source.join([cast(piece) for piece in source.pieces]).contiguous()
    return cast(source)


def rounded_besides(sources: Mapping[str, Stored], dtype: torch.dtype) -> list[str]:
    """A note on the tensors of unquantized layers that a dtype cannot hold as they are; nothing if it holds all."""

    def loses(tensor: Tensor) -> bool:
        return tensor.is_floating_point() and not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)

    rounded = []
    for name, source in sources.items():
        pieces = source.pieces if isinstance(source, Assembled) else [source]
        if any(isinstance(piece, Tensor) and loses(piece) for piece in pieces):
            rounded.append(name)
    if not rounded:
        return []
    short = str(dtype).removeprefix("torch.")
    return [f"{len(rounded)} tensors that are not quantized are rounded to {short}: {', '.join(rounded)}"]


def as_stored(model: Any, sources: Mapping[str, Source], *, dense: bool = True) -> dict[str, Stored]:
    """The tensors that transformers' files of a model hold, by their names there.

    GPT-NeoX's head is `embed_out` in its files; experts may be stacked there, and `Conv1D` is transposed.

    Args:
        model: Quantized, without adapters.
        sources: Its tensors, as the linear form has them.
        dense: Whether quantized matrices are going to be dense: then they are stacked and transposed like the others.

    Raises:
        ExportError: Some tensors are stored in other pieces than the model computes with.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from quadapt.hf.stored_form import names_alone

    whole = _assembled(model, sources, dense=dense)
    marks = {name: torch.empty(shape_of(source), device="meta") for name, source in whole.items()}
    names = {id(mark): name for name, mark in marks.items()}
    with names_alone(model):
        found = revert_weight_conversion(model, dict(marks))
    stored = {other: names.get(id(mark)) for other, mark in found.items()}
    if set(stored.values()) != set(whole) or len(stored) != len(whole):
        pieces = sorted(set(whole) - set(stored.values()))
        raise ExportError(
            f"{pieces[0]}: {type(model).__name__} is stored in other pieces than it computes with, "
            "which this export does not know. Use model.dequantize() and save_pretrained"
        )
    return {other: whole[name] for other, name in stored.items() if name is not None}


def _assembled(model: Any, sources: Mapping[str, Source], *, dense: bool) -> dict[str, Stored]:
    """Put together what the dense model stores as one; codes only if they become dense."""
    from quadapt.hf.stored_form import joins

    whole: dict[str, Stored] = dict(sources)
    for name, pieces, join in joins(model):
        found = [sources[piece] for piece in pieces if piece in sources]
        if not found or (not dense and any(isinstance(piece, QuantWeight) for piece in found)):
            continue
        shape = join([torch.empty(shape_of(piece), device="meta") for piece in found]).shape
        for piece in pieces:
            del whole[piece]
        whole[name] = Assembled(found, tuple(shape), join)
    return whole


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor on the CPU; bfloat16, which numpy lacks, as int16 of the same bits.

    A copy: `.numpy()` of a model's own tensor would pin its storage, which FSDP2 must be free to resize.
    """
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
