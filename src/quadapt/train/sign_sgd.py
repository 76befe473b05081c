r"""t-SignSGD, the optimizer of ternary parameters (LoTA-QAF, Chen et al. 2025, arXiv:2505.18724, and its code).

    p <- clamp(p - sign(g) [|g| > quantile(|g|, sigma_t)] [|g| > 1e-9], -1, 1)

There is no learning rate: `1 - sigma_t` is the share of a tensor's entries that move, by one. It falls as training goes
on. Quantiles are found as order statistics, so that they are exact, and tensors may have any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIRST, MIDDLE, LAST = 0.95, 0.999, 0.9999
"""Sigma at the start, after `RISE` of the steps, and at the end; straight lines between them."""

RISE = 0.8
"""The share of the steps after which hardly anything moves, and huge gradients are cut."""

LEAST = 1e-9
"""Entries whose gradient is not above this do not move."""

HUGE = 10.0
"""The norm of the gradient of all ternary parameters together from which it counts as huge."""

MOST = 0.99995
"""Entries not below this quantile do not move in late steps with a huge gradient."""


def sigma(step: int, steps: int) -> float:
    """The share of entries that stay in step `step` of `steps`, of which the first is 1."""
    rise = RISE * steps
    if step >= steps:
        return LAST
    if step <= rise:
        return FIRST + step / rise * (MIDDLE - FIRST)
    return MIDDLE + (step - rise) / (steps - rise) * (LAST - MIDDLE)


def order(size: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The two entries of a tensor between which its quantile lies, the same one twice if it lies on one.

    So an entry is above the quantile if it is above the first, and below it if it is below the second.
    """
    flat = size.flatten()
    at = share * (flat.numel() - 1)
    low, high = math.floor(at), math.ceil(at)
    if flat.device.type == "cpu":  # the same, 30 times faster
        ranked = np.partition(flat.numpy(), (low, high))
        return torch.tensor(ranked[low]), torch.tensor(ranked[high])
    first = flat.kthvalue(1 + low).values
    return first, first if low == high else flat.kthvalue(1 + high).values


class TernaryAdamW(torch.optim.AdamW):
    """AdamW, but for groups that say `"ternary": True`, which step by t-SignSGD.

    ::

        groups = [{"params": ternary, "ternary": True}, {"params": others, "lr": 1e-4}]
        optimizer = TernaryAdamW(groups, steps=300)

    A ternary group has no state but the count of its steps, which is part of `state_dict`. Its learning rate has no
    meaning. A step skips what has no gradient.

    Args:
        params: Parameters, or groups of them.
        steps: How many steps there will be in all, over which sigma rises.
        settings: What AdamW takes.

    Raises:
        ValueError: There would be no step.
    """

    def __init__(self, params: Iterable[Any], *, steps: int, **settings: Any) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps}: t-SignSGD goes by the share of steps that are done. Give at least 1")
        self._steps = steps
        super().__init__(params, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, ternary or not; torch calls this for each that it is made with."""
        for name, value in {"ternary": False, "done": 0, "steps": self._steps}.items():
            param_group.setdefault(name, value)
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step of all groups."""
        every = self.param_groups
        self.param_groups = [group for group in every if not group["ternary"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        self._sign_step([group for group in every if group["ternary"]])
        return loss

    @torch.no_grad()
    def _sign_step(self, groups: list[dict[str, Any]]) -> None:
        moving = [(group, p) for group in groups for p in group["params"] if p.grad is not None]
        for group in groups:
            group["done"] += 1
        if not moving:
            return
        late = any(group["done"] > RISE * group["steps"] for group in groups)
        huge = late and float(torch.stack([p.grad.float().norm().cpu() for _, p in moving]).norm()) > HUGE
        for group, p in moving:
            size = p.grad.abs().float()
            moves = (size > order(size, sigma(group["done"], group["steps"]))[0]) & (size > LEAST)
            if huge:
                moves &= size < order(size, MOST)[1]
            p.sub_(torch.where(moves, p.grad.sign(), 0).to(p.dtype)).clamp_(-1, 1)
