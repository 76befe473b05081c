"""What fitting QuAILoRA's start costs, beside gathering the second moments that it reads.

The model of the step benchmark (4 Llama layers, hidden 1024, intermediate 2816) in float32, 128 sequences of 512
tokens, NF4, rank 64. Limit: the refinement (20 sweeps over all layers) takes at most a tenth of the gathering.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import THREADS, store, table
from benchmarks.step import CONFIG, dense
from quadapt.model.select import select
from quadapt.nn.starts import CLoQ, QuAILoRA
from quadapt.nn.starts.fit import svd_factors
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout
from quadapt.statistics import MOMENT, StatisticsFiles, gather_second_moments

RANK, SEQUENCES, LENGTH = 64, 128, 512


def main() -> dict[str, Any]:
    """Measure, print and store."""
    torch.set_num_threads(THREADS)
    model = dense().float().eval()
    layers = select(model).chosen
    ids = torch.randint(0, CONFIG.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    times = dict.fromkeys(
        ("gathering second moments", "SVD of the errors", "QuAILoRA's sweeps", "CLoQ, closed form"), 0.0
    )

    def timed(name: str, start: float) -> float:
        times[name] += time.perf_counter() - start
        return time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        files, start = StatisticsFiles(Path(folder)), time.perf_counter()
        gather_second_moments(model, layers, list(ids.split(8)), files)
        timed("gathering second moments", start)
        for name, layer in layers.items():
            weight = layer.weight.detach()
            format = Format(levels="nf", group_size=64)
            layout = Layout(
                format=format,
                storage=Storage(scales="double", offsets="absent"),
                out=layer.out_features,
                columns=layer.in_features,
            )
            E = weight.double() - Nearest(code_against="exact")(weight, layout).dequantize().double()
            H = files[name][MOMENT].double()
            start = time.perf_counter()
            svd_factors(E, RANK)
            start = timed("SVD of the errors", start)
            QuAILoRA().fit(E, H, RANK)
            start = timed("QuAILoRA's sweeps", start)
            CLoQ().fit(E, H, RANK)
            timed("CLoQ, closed form", start)
    times["QuAILoRA's sweeps"] -= times["SVD of the errors"]  # `fit` begins with it
    whole = times["gathering second moments"]
    rows = [(name, seconds, seconds / whole) for name, seconds in times.items()]
    table(f"starts of {len(layers)} layers, rank {RANK}", ("step", "seconds", "of gathering"), rows)
    figures = {
        "limit": "QuAILoRA's sweeps at most 0.1 of gathering",
        "rows": [{"step": name, "seconds": seconds, "of_gathering": share} for name, seconds, share in rows],
    }
    store("quailora", figures)
    return figures
