"""How fast the entropy search of IR-QLoRA is: ours, beside the authors' procedure written straight in torch.

Limit: 4096 x 4096 weights in NF4 groups of 64 at least 50 times faster than 201 quantizations, each with its entropies.
The peer is timed on a slice of the rows, and its time scaled by their number: it has no cost that rows share.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import THREADS, in_turn, ratio, store, table
from quadapt.kernels.reference import midpoints
from quadapt.quant.format import Format
from quadapt.quant.icq import LAMBDA, SIGMA, STEPS, shifted_range
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout

SIDE, SLICE, GROUP = 4096, 256, 64


def every_candidate(weight: Tensor, levels: Tensor) -> Tensor:
    """The shift of each group, float32 `[groups]`: quantize about each candidate, count codes, keep the best."""
    groups = weight.float().view(-1, GROUP)
    middle = groups.median(1).values
    spread = (groups - middle[:, None]).abs().amax(1)
    best, kept, mids = torch.full_like(middle, -1), middle, midpoints(levels)
    for f in torch.linspace(-LAMBDA * SIGMA, LAMBDA * SIGMA, 2 * STEPS + 1).tolist():
        tau = middle + f * spread
        shifted = groups - tau[:, None]
        codes = torch.bucketize(shifted / shifted.abs().amax(1, keepdim=True), mids)
        share = torch.zeros(len(groups), len(levels)).scatter_add_(1, codes, torch.ones_like(groups)) / GROUP
        entropy = -torch.special.xlogy(share, share).sum(1)
        kept, best = torch.where(entropy > best, tau, kept), torch.maximum(entropy, best)
    return kept


def main(rounds: int = 3) -> dict[str, Any]:
    """Measure, print and store."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    weight = torch.randn(SIDE, SIDE)
    format = Format(levels="nf", group_size=GROUP, zero="float")
    levels = format.table(weight)
    assert levels is not None
    layout = Layout(format=format, storage=Storage(scales="double", offsets="double"), out=SIDE, columns=SIDE)
    times = in_turn(
        {
            "every candidate, in torch": lambda: every_candidate(weight[:SLICE], levels),
            "icq": lambda: shifted_range(weight, format),
            "icq, rounding and all": lambda: Nearest(range="icq")(weight, layout),
        },
        rounds,
        warmup=1,
    )
    slow, name = SIDE // SLICE, "every candidate, in torch"
    times[name] = [slow * taken for taken in times[name]]
    table(
        f"entropy search over {SIDE} x {SIDE} weights (the first on {SLICE} rows, its time times {slow})",
        ("search", "median s"),
        [(search, statistics.median(taken)) for search, taken in times.items()],
    )
    times_faster = ratio(times, name, "icq")
    print(f"icq is {times_faster:.0f} times faster than every candidate (limit 50)")
    figures = {
        "limit": "50 times faster than every candidate in torch",
        "rows_of_the_peer": SLICE,
        "seconds": {search: statistics.median(taken) for search, taken in times.items()},
        "times_faster": times_faster,
    }
    store("icq", figures)
    return figures
