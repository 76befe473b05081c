"""Sizes of tiles and warps of the Triton kernels, each tried on a card: `python -m benchmarks.gpu.tuning`.

Of each kernel on matrices of Llama-2-7B's shape, with the rows of a table from fastest to slowest; the sizes that stand
in the kernels' modules are named first. Programs are compiled by several processes before any is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.speed import CARD, INT4, NF4, multiplied, quantized, seconds
from benchmarks.gpu.steps import graph
from benchmarks.measure import environment, table
from quadapt.kernels import cuda, fake_cuda, product_cuda
from quadapt.kernels.fake_reference import Grid
from quadapt.kernels.tiles import launch

OUT, IN, RANK = 4096, 11008, 16
MODULES = {"dequantize": cuda, "compensate": cuda, "product": product_cuda, "fake": fake_cuda}


@dataclass(frozen=True)
class Trial:
    """One kernel with some sizes."""

    work: str
    """What is done; a key of `WORKS`."""

    sizes: tuple[tuple[str, int], ...] = ()
    """Names in the kernel's module and their values; `warps` is not a name but what is launched with."""

    @property
    def name(self) -> str:
        """In words."""
        return ", ".join(f"{name.strip('_').lower()} {value}" for name, value in self.sizes) or "as it is"

    @contextmanager
    def set(self) -> Iterator[None]:
        """Inside, the kernel has these sizes."""
        module, sizes = MODULES[self.work.split()[0]], dict(self.sizes)
        with ExitStack() as stack:
            if module is product_cuda and sizes:
                chosen = sizes["rows"], sizes["words"], sizes["warps"]
                stack.enter_context(mock.patch.object(module, "_sizes", return_value=chosen))
                sizes = {}
            warps = sizes.pop("warps", None)
            if warps is not None:
                stack.enter_context(mock.patch.object(module, "launch", partial(_launch, warps)))
            for name, value in sizes.items():
                stack.enter_context(mock.patch.object(module, name, value))
            yield


def _launch(warps: int, *arguments: Any, **constants: Any) -> None:
    launch(*arguments, **{**constants, "num_warps": warps})


def _dequantize(format: Any) -> Callable[[], object]:
    sets = [quantized(format) for _ in range(4)]  # more than the cache holds
    return lambda: [each.dequantize(torch.bfloat16) for each in sets]


def _product(format: Any, tokens: int) -> Callable[[], object]:
    sets = [quantized(format, out=4096, columns=4096) for _ in range(8)]
    x = torch.randn(tokens, 4096, device=CARD, dtype=torch.bfloat16)
    return lambda: [multiplied(x, each) for each in sets]


def _fake(gradients: bool) -> Callable[[], object]:
    group = INT4.group_size
    base = torch.randn(OUT, IN, device=CARD, dtype=torch.bfloat16)
    A, B = 0.1 * torch.randn(RANK, IN, device=CARD), 0.1 * torch.randn(OUT, RANK, device=CARD)
    scales = torch.rand(OUT, IN // group, device=CARD).add_(0.2)
    offsets, grid = -8 * scales, Grid(4, 4, group, IN)
    if not gradients:
        return lambda: fake_cuda.quantize(base, A, B, scales, offsets, None, grid, torch.bfloat16)
    G, dense = torch.randn(OUT, IN, device=CARD), torch.empty_like(base)
    return lambda: fake_cuda.gradients(G, base, A, B, scales, offsets, None, grid, None, dense)


def _compensate() -> Callable[[], object]:
    width = 128
    noise = torch.randn(4 * width, width, device=CARD)
    upper = torch.linalg.cholesky(noise.T @ noise).T.contiguous()
    weight, scales = torch.randn(OUT, width, device=CARD), torch.rand(OUT, device=CARD).add_(0.2)
    return lambda: cuda.compensate(weight, upper, scales, -8 * scales, None, 4)


WORKS: dict[str, Callable[[], Callable[[], object]]] = {
    "dequantize int4": lambda: _dequantize(INT4),
    "dequantize nf4": lambda: _dequantize(NF4),
    "product int4, 1 token": lambda: _product(INT4, 1),
    "product nf4, 1 token": lambda: _product(NF4, 1),
    "product int4, 8 tokens": lambda: _product(INT4, 8),
    "product int4, 16 tokens": lambda: _product(INT4, 16),
    "fake quantize": lambda: _fake(gradients=False),
    "fake gradients": lambda: _fake(gradients=True),
    "compensate": _compensate,
}
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "dequantize": {"_WORDS": (128, 256, 512, 1024), "warps": (2, 4, 8)},
    "product": {"rows": (1, 2, 4, 8), "words": (64, 128, 256), "warps": (2, 4)},
    "fake": {"_TILE": (512, 1024, 2048, 4096), "warps": (2, 4, 8)},
    "compensate": {"_HELD": (256, 512, 1024, 2048), "warps": (1, 2, 4)},
}


def trials() -> list[Trial]:
    """All that is tried, the sizes of the modules first."""
    found = []
    for work in WORKS:
        sizes = SIZES[work.split()[0]]
        found.append(Trial(work))
        found += [Trial(work, tuple(zip(sizes, each, strict=True))) for each in itertools.product(*sizes.values())]
    return found


@cache
def _ready(work: str) -> Callable[[], object]:
    return WORKS[work]()


@torch.no_grad()
def _compile(trial: Trial) -> None:
    """Run it once, so that the compiled program is kept on disk."""
    with trial.set():
        _ready(trial.work)()
        torch.cuda.synchronize()


@torch.no_grad()
def timed(trial: Trial) -> float:
    """Seconds of it, recorded as a graph so that launches take no time."""
    with trial.set():
        replay, _ = graph(_ready(trial.work))  # type: ignore[arg-type]
        return statistics.median(seconds({"": replay}, rounds=5, least=0.01)[""])


def main() -> None:
    """Time all, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    chosen, tried = parser.parse_args(), trials()
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), get_context("spawn")) as pool:
        list(pool.map(_compile, tried, chunksize=4))
    rows = []
    for work in WORKS:
        found = {each.name: timed(each) for each in tried if each.work == work}
        _ready.cache_clear()
        base = found["as it is"]
        fastest = sorted(found.items(), key=lambda each: each[1])
        rows += [{"kernel": work, "sizes": name, "microseconds": 1e6 * took} for name, took in fastest]
        best = [(name, f"{1e6 * took:.1f}", f"{took / base:.2f}") for name, took in fastest[:5]]
        table(work, ("sizes", "us", "of today's"), [*best, ("as it is", f"{1e6 * base:.1f}", "1")])
        content = {"environment": environment(), "card": torch.cuda.get_device_name(), "rows": rows}
        chosen.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
