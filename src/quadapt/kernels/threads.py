"""Running a kernel on several threads, each of which gets some of the rows.

The compiled kernels release the interpreter lock, so plain Python threads suffice. That avoids numba's own thread
layers: under `omp` a forked child's first kernel dies, and under `workqueue` two threads that launch kernels at once
abort the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_WORTH_A_THREAD = 1 << 16
"""Weights below which handing work to a thread costs more than it saves (about 30 microseconds)."""

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget() -> None:
    """A forked child inherits the pool but none of its threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < count:
        _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="quadapt"), count
    return _pool


def over_rows(kernel: Callable[[int, int], object], rows: int, columns: int) -> None:
    """Call `kernel(first, last)` on slices that cover `rows`, on as many threads as torch uses, and wait for all."""
    parts = min(torch.get_num_threads(), rows, max(1, rows * columns // _WORTH_A_THREAD))
    if parts <= 1:
        kernel(0, rows)
        return
    bounds = [rows * part // parts for part in range(parts + 1)]
    others = [_workers(parts - 1).submit(kernel, *bounds[part : part + 2]) for part in range(1, parts)]
    kernel(bounds[0], bounds[1])
    for other in others:
        other.result()
