"""Small tables of constants as tensors, one copy a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from quadapt.hooks import when_imported


def per_device(make: Callable[..., Sequence[float]]) -> Callable[..., Tensor]:
    """Turn a function that gives numbers into one that gives them as a float32 tensor on the device `device=`.

    Each is kept, but for fake tensors (memory estimates run under a mode that makes every new tensor one).
    """
    kept: dict[tuple[object, ...], Tensor] = {}

    @wraps(make)
    def constant(*args: object, device: torch.device) -> Tensor:
        if detect_fake_mode() is not None:
            with unset_fake_temporarily():
                values = make(*args)
            return torch.tensor(values, dtype=torch.float32, device=device)
        key = (*args, device)
        if key not in kept:
            kept[key] = torch.tensor(make(*args), dtype=torch.float32, device=device)
        return kept[key]

    # A compiled program calls it as it is. That is said to the compiler once there is one: its import takes a second.
    when_imported("torch._dynamo", lambda: torch.compiler.allow_in_graph(constant))
    return constant
