"""What a model is run on to calibrate it: token ids, or whatever its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quadapt.errors import CalibrationError
from quadapt.nn.resident import moved

Batch = Tensor | Mapping[str, Tensor]
"""Token ids `[sequences, length]`, without padding; or a model's inputs by the names of its forward's arguments
(`input_ids`, `attention_mask`, `decoder_input_ids`, `pixel_values`, `input_features`, ..), and `labels`, which are read
where a loss is asked for and nowhere else."""


def named(batch: Batch) -> dict[str, Any]:
    """All that a batch holds, by name: token ids are `input_ids`."""
    return {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)


def inputs_of(batch: Batch, device: torch.device | None = None) -> dict[str, Any]:
    """A batch as the keyword arguments of a model's forward, without labels.

    Args:
        batch: Token ids, or inputs by name.
        device: Where to bring them. Default: they stay where they are.
    """
    inputs = {name: each for name, each in named(batch).items() if name != "labels"}
    return inputs if device is None else moved(inputs, device)


def call_of(model: Any, batch: Batch, device: torch.device | None = None, *, loss: bool = False) -> dict[str, Any]:
    """All arguments with which a model's forward is called on a batch; it keeps no cache.

    An encoder-decoder that is not told what it has written is told what it reads.

    Args:
        model: One of transformers, or one that takes the like.
        batch: Token ids, which are the labels of a language model too; or inputs by name.
        device: Where to bring them. Default: they stay where they are.
        loss: Whether labels go along, so that the model gives a loss.

    Raises:
        CalibrationError: A loss is asked for, and there are no labels.
    """
    call = inputs_of(batch, device)
    if loss:
        call["labels"] = _labels(batch) if device is None else _labels(batch).to(device)
    about = getattr(model, "config", None)
    takes = inspect.signature(
        (model.get_base_model() if hasattr(model, "get_base_model") else model).forward
    ).parameters
    if getattr(about, "is_encoder_decoder", False) and {"input_ids"} <= call.keys() and "decoder_input_ids" in takes:
        call |= {} if loss else {"decoder_input_ids": call.get("decoder_input_ids", call["input_ids"])}
    return call | ({"use_cache": False} if _knows_a_cache(takes, about) else {})


def real_tokens(call: Mapping[str, Any]) -> Tensor | None:
    """Which tokens are no padding, bool `[sequences, length]`; None if all are, or if it cannot be told.

    An encoder-decoder's two sides are told apart by their lengths. Padding on the side that writes counts as tokens.
    """
    mask = call.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    written = call.get("decoder_input_ids")
    return None if isinstance(written, Tensor) and written.shape == mask.shape else mask.bool()


def _labels(batch: Batch) -> Tensor:
    labels = batch if isinstance(batch, Tensor) else batch.get("labels")
    if labels is None:
        raise CalibrationError(
            f"a batch of {', '.join(batch)} has no labels, and a loss is needed. Give them under the name labels"
        )
    return labels


def _knows_a_cache(parameters: Mapping[str, inspect.Parameter], config: Any) -> bool:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return "use_cache" in parameters or (takes_any and hasattr(text, "use_cache"))


def sequences_in(batch: Batch) -> int:
    """How many sequences (or pictures, or recordings) a batch has: the first axis of its first tensor."""
    return len(batch) if isinstance(batch, Tensor) else len(next(iter(batch.values())))


def parted(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of `size` sequences; the last may have fewer.

    Inputs by name are parted where all of them have one row for each sequence; else the batch stays whole.
    """
    if isinstance(batch, Tensor):
        return list(batch.split(size))
    count = sequences_in(batch)
    if any(len(each) != count for each in batch.values()):
        return [batch]
    return [{name: each[start : start + size] for name, each in batch.items()} for start in range(0, count, size)]
