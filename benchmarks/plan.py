"""How fast the table of errors for a plan by budget is made, and how good the plan is.

Limit: ten times faster than decomposing each matrix for every one of LQ-LoRA's 432 configurations, at a sum of errors
within two percent, judged by the decomposition run to its end for what either plan chose. (Either table is off by a few
percent itself, since its decompositions stop early.)

Scaled: the plain way is timed on one in `EVERY` of the configurations of each matrix and multiplied, and 432 / 288 for
bfloat16 constants, which cost it as much as fp16 ones. Plans are compared on tables over the same configurations.
Matrices have singular values that fall like those of trained ones; rank 16. A model of 50 M linear weights is 21 times
what is measured here, and the table's time is that of its matrices added up.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import store, table
from quadapt.budget import Candidate, Option, Solution, candidates, measure, solve
from quadapt.budget.table import _Table, table_start
from quadapt.methods import method_named
from quadapt.nn.starts.lq import squared_error

SHAPES = ((512, 512), (512, 512), (1024, 512), (512, 1024), (512, 1408))
EVERY, RANK, TURNS = 9, 16, 30
BUDGETS = (2.25, 2.75, 3.25, 4.0)
WEIGHTS = 50_000_000


def decaying(out: int, columns: int) -> Tensor:
    """A random matrix whose singular values fall like a power."""
    least = min(out, columns)
    U, V = (torch.linalg.qr(torch.randn(size, least)).Q for size in (out, columns))
    return (U * torch.arange(1, least + 1) ** -0.5) @ V.T


def outcome(solution: Solution, weights: dict[str, Tensor]) -> float:
    """Sum of errors when every matrix is decomposed for what was chosen, up to `TURNS` turns."""
    from quadapt.nn.starts import LQ

    total, rounding = 0.0, method_named("lq-lora").rounding.without_data()
    for name, option in solution.chosen.items():
        layout = option.candidate.layout(*weights[name].shape)
        start = LQ(iterations=TURNS, tolerance=0.003)
        begun = start(weights[name], lambda dense, to=layout: rounding(dense, to), RANK, {})
        assert begun.factors is not None
        total += squared_error(weights[name] - begun.weight.dequantize(), *begun.factors, None)
    return total


def main() -> dict[str, Any]:
    """Measure, print and store. In CPU seconds of one thread, since others may be at work on the machine."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method = method_named("lq-lora")
    weights = {f"{i} {out} x {columns}": decaying(out, columns) for i, (out, columns) in enumerate(SHAPES)}
    ways, start = candidates(method), table_start(method, False)
    measure(decaying(160, 160), ways, method, rank=RANK)  # compiles the kernels
    full: dict[str, list[Option]] = {}
    quick: dict[str, list[Option]] = {}
    rows, spent = [], {"plain": 0.0, "quick": 0.0}
    for name, weight in weights.items():
        some: list[Candidate] = ways[len(full) :: EVERY]
        begun = time.process_time()
        full[name] = _Table(weight, start, method.rounding.without_data(), RANK, {}).each(some)
        plain = (time.process_time() - begun) / len(some) * 432
        begun = time.process_time()
        found = measure(weight, ways, method, rank=RANK)
        took = time.process_time() - begun
        quick[name] = measure(weight, some, method, rank=RANK)
        spent = {"plain": spent["plain"] + plain, "quick": spent["quick"] + took}
        rows.append((name, len(found), plain, took, plain / took))
    table("a row of the table, CPU seconds", ("matrix", "kept", "plain, 432 ways", "quadapt", "times"), rows)
    total = sum(weight.numel() for weight in weights.values())
    ratios = {}
    for bits in BUDGETS:
        mine, theirs = (outcome(solve(each, int(bits * total)), weights) for each in (quick, full))
        ratios[str(bits)] = mine / theirs
    table("errors of the plan, of those by the plain table", ("bits", "ratio"), list(ratios.items()))
    figures = {
        "limit": "10 times faster than 432 decompositions a matrix, errors within 2 percent",
        "scaled": f"plain: one in {EVERY} of 288 configurations timed, times {EVERY} and 432 / 288; {total} weights",
        "rank": RANK,
        "times_faster": spent["plain"] / spent["quick"],
        "seconds_for_50m_weights": {name: seconds * WEIGHTS / total for name, seconds in spent.items()},
        "error_of_plain_plan": ratios,
    }
    print(f"{figures['times_faster']:.1f} times faster (limit 10)")
    store("plan", figures)
    return figures
