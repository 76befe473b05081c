"""Tokens that are read and written on a CPU, against bfloat16 in transformers and against other packed formats.

Decoding is one token after 32 others, with a cache; prefill is 128 or 512 tokens at once. The model is that of the step
benchmark: four Llama layers of 1024 and 2816 features, in one thread. Peers in the same run: bitsandbytes NF4, torch's
own 4-bit product (what torchao takes on a CPU), and llama.cpp on the very file that quadapt writes (by its own clock;
it rounds inputs to 8 bits). Goals: decoding at 3.0 times the speed of bfloat16 and at that of llama.cpp's Q4_1; prefill
not below that of bfloat16.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import quadapt
from benchmarks.measure import in_turn, ratio, store, table
from benchmarks.peers import Int4Pack, bitsandbytes
from benchmarks.step import CONFIG, STOCK, dense
from quadapt.exporters.gguf import export_gguf
from quadapt.exporters.llama_cpp import LlamaCpp
from quadapt.hf.loading import load_tokenizer

BEFORE = 32
"""Tokens that stand before the one that is decoded."""

PREFILLS = (128, 512)
GROUP = 32


def quantized(**settings: Any) -> Any:
    """The model, quantized to nearest, without an adapter."""
    return quadapt.prepare(dense(), rounding="nearest", rank=8, **settings).unload()


def int4pack() -> nn.Module:
    """The model with torch's own product in all layers."""
    model = quantized(method="qa-lora", bits=4)
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "quant_weight"):
            weight = layer.quant_weight
            model.set_submodule(name, Int4Pack(weight.codes(), weight.scales, weight.offsets, GROUP))
    return model


CANDIDATES: dict[str, Callable[[], Any]] = {
    "transformers, bf16": dense,
    "quadapt int4": lambda: quantized(method="qa-lora", bits=4),
    "quadapt int3": lambda: quantized(method="qa-lora", bits=3),
    "quadapt int2": lambda: quantized(method="qa-lora", bits=2),
    "quadapt int8": lambda: quantized(method="qa-lora", bits=8),
    "quadapt nf4, doubly quantized": lambda: quantized(method="qlora"),
    "bitsandbytes nf4": lambda: bitsandbytes(dense(), STOCK, "cpu").unload(),
    "torch int4pack": int4pack,
}
BASE = "transformers, bf16"


def decoding(model: Any, ids: Tensor) -> Callable[[], None]:
    """A function that decodes one token, the cache being as it was afterwards."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :BEFORE], past_key_values=cache)

    def work() -> None:
        with torch.no_grad():
            model(input_ids=ids[:, BEFORE : BEFORE + 1], past_key_values=cache)
        cache.crop(-1)

    return work


def reading(model: Any, ids: Tensor) -> Callable[[], None]:
    """A function that reads tokens at once."""

    def work() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    return work


def by_llama_cpp(model: Any, ids: Tensor) -> dict[str, float]:
    """Seconds of a token that llama.cpp decodes from our file, and of its prefills, by its own clock."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        export_gguf(model, load_tokenizer(str(files("quadapt.demo") / "model")), file)
        found: dict[str, list[float]] = {"decode": [], **{f"prefill {length}": [] for length in PREFILLS}}
        with LlamaCpp(file, context=1024) as engine:
            for turn in range(7):
                for length in (BEFORE, *PREFILLS):
                    prompt = (ids[0, :length] + turn) % CONFIG.vocab_size  # another one, which no cache holds
                    took = engine.timings(prompt.tolist(), 16)
                    if length != BEFORE:
                        found[f"prefill {length}"].append(took["prompt_ms"] / 1000)
                    elif took["predicted_n"] > 8:
                        found["decode"].append(took["predicted_per_token_ms"] / 1000)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main(rounds: int = 15) -> dict[str, Any]:
    """Measure, print and store."""
    torch.set_num_threads(1)
    ids = torch.randint(3, CONFIG.vocab_size, (1, max(PREFILLS)), generator=torch.Generator().manual_seed(0))
    models = {name: build().eval() for name, build in CANDIDATES.items()}
    tasks: dict[str, Callable[[Any, Tensor], Callable[[], None]]] = {"decode": decoding}
    tasks |= {f"prefill {n}": lambda model, ids, n=n: reading(model, ids[:, :n]) for n in PREFILLS}
    engine = by_llama_cpp(models["quadapt int4"], ids)
    rows = []
    for task, made in tasks.items():
        times = in_turn({name: made(model, ids) for name, model in models.items()}, rounds=rounds)
        base = statistics.median(times[BASE])
        for name, took in times.items():
            rows.append((task, name, 1000 * statistics.median(took), 1 / ratio(times, name, BASE)))
        rows.append((task, "llama.cpp on our Q4_1 file", 1000 * engine[task], base / engine[task]))
    table("on the CPU, one thread", ("task", "how", "median ms", "speed of bf16 = 1"), rows)
    names = ("task", "how", "median_ms", "speed_of_bf16")
    figures = {"rows": [dict(zip(names, row, strict=True)) for row in rows]}
    store("decode", figures)
    return figures


if __name__ == "__main__":
    main()
