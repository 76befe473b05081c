"""All checks of what runs on a device: one after the other, or shared out over processes.

What takes time on a card is compiling several hundred programs, and a process does that on one core.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.gpu import cases, steps

SLOW = ("compiled", "generated", "graphed")
"""Checks that take longest, and are begun first."""

Task = tuple[str, Any]
"""What to check: "kernels" and the number of the case, or "steps" and the check with its method."""


class Checks:
    """The checks of a device.

    Args:
        device: Where kernels run; on the CPU, through Triton's interpreter.
    """

    def __init__(self, device: torch.device) -> None:
        # Larger matrices have many programs each, to be compiled on a card and too slow to be interpreted on a CPU.
        larger = islice(cases.cases(67, 1100, 64), 0, None, 3) if device.type == "cuda" else ()
        self.device, self.cases = device, list(chain(cases.cases(5, 76, 32), larger))

    def tasks(self) -> list[Task]:
        """What there is to do, what takes longest first."""
        steps_ = sorted(steps.named(self.device), key=lambda each: each[0] not in SLOW)
        return [("steps", each) for each in steps_] + [("kernels", at) for at in range(len(self.cases))]

    def failure(self, task: Task) -> str | None:
        """Do one check: what is wrong, or None."""
        kind, what = task
        name = ", ".join(what) if kind == "steps" else f"{self.cases[what].kernel}, {self.cases[what].name}"
        try:
            if kind == "steps":
                steps.CHECKS[what[0]](what[1], self.device)
            else:
                self.cases[what].check(self.device)
        except Exception as error:  # each is reported, and all are run
            told = str(error).strip().splitlines()[0] if isinstance(error, AssertionError) else repr(error)[:300]
            return f"{name}: {told}"
        return None


def checks(device: torch.device, processes: int = 1) -> tuple[Counter[str], list[str]]:
    """Run every check, over so many processes: how many there were of each kind, and what failed."""
    every = Checks(device)
    tasks = every.tasks()
    found = map(every.failure, tasks) if processes == 1 else _shared(device, tasks, processes)
    return Counter(kind for kind, _ in tasks), [each for each in found if each is not None]


_mine: Checks | None = None
"""In a process that does a part of the checks."""


def _shared(device: torch.device, tasks: list[Task], processes: int) -> Iterator[str | None]:
    begin = (device.type,)
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=begin) as pool:
        yield from pool.map(_failure, tasks)


def _begin(device: str) -> None:
    global _mine
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # or each process would have as many as there are cores
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _mine = Checks(torch.device(device))


def _failure(task: Task) -> str | None:
    assert _mine is not None
    return _mine.failure(task)
