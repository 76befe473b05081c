"""Bringing a module to the device that computes, while the model that it belongs to stays where it is.

Copies go there, and nothing comes back: a checkpoint that is mapped into memory is read and never written, so that the
system may drop its pages whenever it wants memory, and read them again from the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


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


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with all tensors in it changed: in tuples, lists, dicts and what else torch knows to hold tensors."""
    return tree_map_only(Tensor, change, value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a value, in order."""
    return (each for each in tree_leaves(value) if isinstance(each, Tensor))


def moved(value: Any, device: torch.device) -> Any:
    """`value` with all tensors in it on `device`; what is shared stays shared.

    Args:
        value: Anything; what holds no tensors stays as it is.
        device: Where to.
    """
    there: dict[int, Tensor] = {}
    return changed(value, lambda tensor: there.setdefault(id(tensor), tensor.to(device)))
