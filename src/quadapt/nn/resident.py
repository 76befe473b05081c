"""Bringing a module to the device that computes, while the model that it belongs to stays where it is.

Copies go there, and nothing comes back: a checkpoint that is mapped into memory is read and never written, so that the
system may drop its pages whenever it wants memory, and read them again from the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def indexed(device: torch.device | str) -> torch.device:
    """The device as tensors name it: `cuda` is `cuda:0` there, or whichever is the current one."""
    return torch.empty(0, device=device).device


@contextmanager
def resident(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, all parameters and buffers of `module` are on `device`; afterwards they are the very ones from before.

    Modules keep their identity, and so do tensors that are on the device already. What is put into the module inside
    stays in it as it is.

    Args:
        module: A block, a layer, or a model whose blocks are taken out.
        device: The device to move to, as `indexed` gives it.
    """
    away: list[tuple[dict[str, Any], str, Tensor]] = [
        (owner, name, tensor)
        for each in module.modules()
        for owner in (each._parameters, each._buffers)
        for name, tensor in owner.items()
        if tensor is not None and tensor.device != device
    ]
    copies = {id(tensor): _copy(tensor, device) for _, _, tensor in away}  # tied tensors stay tied
    try:
        for owner, name, tensor in away:
            owner[name] = copies[id(tensor)]
        yield
    finally:
        for owner, name, tensor in away:
            owner[name] = tensor


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    there = tensor.detach().to(device)
    return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


def moved(value: Any, device: torch.device, seen: dict[int, Tensor] | None = None) -> Any:
    """`value` with all tensors in it (in tuples, lists and dicts too) on `device`.

    Args:
        value: Anything; what holds no tensors stays as it is.
        device: Where to.
        seen: What became of tensors that were met before, by identity: what is shared stays shared.
    """
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        return seen.setdefault(id(value), value.to(device))
    if isinstance(value, (tuple, list)):
        return type(value)(moved(item, device, seen) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device, seen) for key, item in value.items()}
    return value
