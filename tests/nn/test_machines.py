"""What is stored is the same wherever it is made: processes told to work as other processors give equal digests.

Their inputs are whole numbers times a power of two: torch's random numbers differ by processor.
"""

from __future__ import annotations

import json
from collections.abc import Callable

STORED = """
import json
import torch
from quadapt.nn.adapters import L4Q, LRQAT, Pooled, Scales
from quadapt.nn.adapters.grid import grown
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout


def numbers(*shape, seed, size=1.0):
    count = torch.tensor(shape).prod()
    drawn = (torch.arange(count) * 1103515245 + seed * 12345) % 2**31 % 65537
    return (drawn.double() / 32768 - 1).float().mul(size).view(shape)


OUT, IN = 96, 400
weight, found = numbers(OUT, IN, seed=1, size=2.0**-4), {}


def quantized(format, storage, range="minmax"):
    layout = Layout(format=format, storage=storage or Storage.default(format), out=OUT, columns=IN)
    return Nearest(range=range)(weight, layout)


for format in (Format(bits=4), Format(bits=3, zero="none"), Format(bits=2, zero="integer"), Format(bits=8),
               Format(levels="nf", bits=4, group_size=16), Format(levels="nf", bits=3, zero="float")):
    for range in ("minmax", "mse"):
        found[f"{format.name} {range}"] = quantized(format, None, range).digest()
nf4 = Format(levels="nf", bits=4, group_size=16)
for scales in ("double", "linear8-256-fp32"):
    found[scales] = quantized(nf4, Storage(scales=scales, offsets="absent")).digest()
found["icq"] = quantized(Format(levels="nf", bits=4, zero="float"), None, "icq").digest()

base = quantized(Format(bits=4), None)
A, B = numbers(16, 13, seed=2), numbers(OUT, 16, seed=3, size=2.0**-8)
for kind in ("fp16", "fp32"):
    found[f"pooled {kind}"] = Pooled(offsets=kind).merge(base, {"A": A, "B": B}, 0.25).digest()
rho, shift = numbers(OUT, 13, seed=4, size=0.5), numbers(OUT, 13, seed=5, size=0.5)
A, B = numbers(16, IN, seed=6), numbers(OUT, 16, seed=7, size=2.0**-8)
for kind in ("fp16", "fp32"):
    adapter = L4Q(bits=4, group_size=32, scales=kind)
    trained = {"start": adapter.start(weight), "rho": rho, "shift": shift, "A": A, "B": B}
    found[f"l4q {kind}"] = adapter.merge(weight, trained, 0.25).digest()
    adapter = LRQAT(bits=4, scales=kind)
    inner = quantized(Format(bits=8, zero="none"), None)
    found[f"lr-qat {kind}"] = adapter.merge(inner, {"rho": rho, "A": A, "B": B}, 0.25).digest()
    found[f"scales {kind}"] = Scales(scales=kind).merge(base, {"rho": rho}, 1.0).digest()
found["exponential"] = rho.exp().numpy().tobytes().hex()[:20000]
found["grown"] = grown(rho).numpy().tobytes().hex()
print(json.dumps(found))
"""

OTHER = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "NUMBA_CPU_NAME": "generic",
    "OMP_NUM_THREADS": "3",
}


def test_other_processors_and_threads_store_the_same_bytes(run_python: Callable[..., str]) -> None:
    here, there = (json.loads(run_python(STORED, **machine).splitlines()[-1]) for machine in ({}, OTHER))
    here.pop("exponential"), there.pop("exponential")  # torch's own, which may differ
    assert len(here) > 20
    assert [name for name in here if here[name] != there[name]] == []
