"""What measuring models takes: evaluation mode, the model's device and context, and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""A function that wraps the list of batches to work on, like `tqdm`."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; then each module gets back the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def context_limit(model: nn.Module) -> int | None:
    """Positions that a model was made for; None if its configuration does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


def device_of(model: nn.Module) -> torch.device:
    """The device on which a model computes."""
    return next(model.parameters()).device


def grouped(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Some items in groups of so many, the last one possibly smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]
