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


def labelled(batch: Batch, device: torch.device | None = None) -> dict[str, Any]:
    """A batch as the keyword arguments of a model's forward that gives a loss.

    Args:
        batch: Token ids, which are the labels of a language model too; or inputs by name, `labels` among them.
        device: Where to bring them. Default: they stay where they are.

    Raises:
        CalibrationError: There are no labels.
    """
    labels = batch if isinstance(batch, Tensor) else batch.get("labels")
    if labels is None:
        raise CalibrationError(
            f"a batch of {', '.join(batch)} has no labels, and a loss is needed. Give them under the name labels"
        )
    return {**inputs_of(batch, device), "labels": labels if device is None else labels.to(device)}


def settings_of(model: Any) -> dict[str, Any]:
    """Further arguments of a model's forward: it keeps no cache, where it knows of one."""
    parameters = inspect.signature(model.forward).parameters
    about = getattr(model, "config", None)
    text = about.get_text_config() if hasattr(about, "get_text_config") else about
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return {"use_cache": False} if "use_cache" in parameters or (takes_any and hasattr(text, "use_cache")) else {}


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
