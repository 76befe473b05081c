"""How fast weights are quantized.

Limits: nearest int4 at 100 M weights/s, NF4 at 50 M weights/s; GPTQ of a 1024 x 2816 layer within 3 times its floor,
which is the Cholesky factorization, the triangular inverse and the matrix products that any implementation of it needs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import THREADS, in_turn, ratio, store, table
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout

SIDE, OUT, IN = 4096, 1024, 2816


def nearest(format: Format, storage: Storage, weight: torch.Tensor) -> Callable[[], object]:
    """Rounding to nearest."""
    layout = Layout(format=format, storage=storage, out=weight.shape[0], columns=weight.shape[1])
    return lambda: Nearest()(weight, layout)


def floor(weight: torch.Tensor, moment: torch.Tensor) -> Callable[[], object]:
    """What GPTQ cannot do without, block by block of 128 columns as it does it."""
    eye = torch.eye(IN)

    def work() -> None:
        lower, _ = torch.linalg.cholesky_ex(moment)
        upper = torch.linalg.solve_triangular(lower, eye, upper=False).T
        left = weight.clone()
        for start in range(0, IN, 128):
            left[:, start + 128 :] -= left[:, start : start + 128] @ upper[start : start + 128, start + 128 :]

    return work


def main(rounds: int = 7) -> dict[str, Any]:
    """Measure, print and store."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    weight = torch.randn(SIDE, SIDE, dtype=torch.bfloat16)
    int4 = Format()
    nf4 = Format(levels="nf", group_size=64)
    times = in_turn(
        {
            "nearest int4": nearest(int4, Storage(), weight),
            "nearest nf4, double-quantized": nearest(nf4, Storage(scales="double", offsets="absent"), weight),
        },
        rounds,
    )
    speed = {name: weight.numel() / statistics.median(taken) / 1e6 for name, taken in times.items()}
    table(f"quantizing a {SIDE} x {SIDE} bf16 matrix", ("rounding", "M weights/s"), list(speed.items()))
    small, inputs = torch.randn(OUT, IN), torch.randn(4096, IN)
    moment = inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(IN)
    layout = Layout(format=int4, storage=Storage(), out=OUT, columns=IN)
    gptq = in_turn(
        {"GPTQ": lambda: GPTQ()(small, layout, {"second_moment": moment}), "its floor": floor(small, moment)}, rounds
    )
    over = ratio(gptq, "GPTQ", "its floor")
    table(
        f"GPTQ of a {OUT} x {IN} layer",
        ("step", "median ms"),
        [(name, 1000 * statistics.median(taken)) for name, taken in gptq.items()],
    )
    print(f"GPTQ takes {over:.2f} times its floor (limit 3)")
    figures = {
        "limit": "nearest int4 100 M weights/s, nf4 50 M weights/s; GPTQ 3 times its floor",
        "million_weights_per_second": speed,
        "gptq_of_floor": over,
    }
    store("quantize", figures)
    return figures
