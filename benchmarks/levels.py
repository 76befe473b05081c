"""Grids of one size against each other: what rounding to them costs, and what is left of it once their scales trained.

    python -m benchmarks.levels --model FOLDER --data FILE

Of four bits in groups of 32: symmetric integers (Q4_0 in a GGUF file), the levels of IQ4_NL, and NF4, each with a scale
in float16 for a group, rounded to nearest by the range of least squared error. Of eight bits: integers with scales (and
offsets) in float16 and in float32. Loss is in nats per token on a part of the text that is not trained on. At four bits
the scales alone train (`peqa`), which every table of levels allows; at eight `qa-lora` trains the offsets, where there
are some. Rates are searched on a part of their own, on the first seed. Each run is kept in
`benchmarks/results/levels-MODEL.json`; given again, the script goes on with what is missing.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Kept, table
from benchmarks.served import Text, best
from quadapt.config import MergeConfig, QuantizeConfig, TuneConfig, checked
from quadapt.data import read
from quadapt.evaluate import perplexity
from quadapt.hf.loading import load, load_tokenizer
from quadapt.jobs.merge import merge
from quadapt.jobs.quantize import quantize
from quadapt.jobs.tune import tune
from quadapt.model.quantize import quantized_layers
from quadapt.report.ui import UI

QUIET = UI(quiet=True)
RATES = (1e-2, 3e-2, 0.1)
ROUNDED = {"rounding": "nearest", "range": "mse", "group_size": 32}
GRIDS: dict[str, dict[str, Any]] = {
    "int4-sym": {"method": "peqa", "bits": 4, "zero": "none"},
    "iq4-nl": {"method": "peqa", "levels": "iq4-nl"},
    "nf4": {"method": "peqa", "levels": "nf"},
    "int8-sym,fp32": {"method": "peqa", "bits": 8, "zero": "none", "scales": "fp32"},
    "int8-sym,fp16": {"method": "peqa", "bits": 8, "zero": "none", "scales": "fp16"},
    "int8,fp32": {"method": "qa-lora", "bits": 8, "scales": "fp32", "rank": 8},
    "int8,fp16": {"method": "qa-lora", "bits": 8, "scales": "fp16", "rank": 8},
}


class Levels:
    """A model and a text, rounded to grids and tuned."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.text = args, folder, Text.of(args.data, folder)
        self.tokenizer = load_tokenizer(args.model)

    def loss(self, folder: str, part: str) -> float:
        """Loss on a part of the text, in nats per token."""
        model, _ = load(folder, dtype="float32")
        rows = read(str(getattr(self.text, part)))
        found = perplexity(model, self.tokenizer, rows, context=self.args.length, batch=32)
        return float(torch.tensor(found.perplexity).log())

    def run(self, grid: str, rate: float, seed: int) -> dict[str, Any]:
        """Loss of a grid: rounded to it (a rate of zero), or tuned on it and merged."""
        settings = {"model": self.args.model, "dtype": "float32", **ROUNDED, **GRIDS[grid]}
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            base, adapter, merged = (str(Path(place) / each) for each in ("base", "adapter", "merged"))
            if not rate:
                settings.pop("rank", None)
                quantize(checked(QuantizeConfig, {**settings, "output": base}), QUIET)
                layers = quantized_layers(load(base, dtype="float32")[0]).values()
                bits = sum(8 * layer.quant_weight.nbytes for layer in layers)
                weights = sum(layer.layout.out * layer.layout.columns for layer in layers)
                return {"loss": self.loss(base, "test"), "bits": bits / weights}
            run = {
                "data": str(self.text.train),
                "output": adapter,
                "max_steps": self.args.steps,
                "batch_size": 16,
                "gradient_accumulation": 1,
                "seed": seed,
                "seq_len": self.args.length,
                "learning_rate": rate,
                "schedule": "linear",
                "warmup_ratio": 0.1,
                "max_grad_norm": 1.0,
                "save_steps": 10**6,
            }
            tune(checked(TuneConfig, settings | run), QUIET)
            certificate = merge(checked(MergeConfig, {"adapter": adapter, "output": merged}), QUIET)["certificate"]
            losses = {name: self.loss(merged, part) for name, part in (("choose", "choose"), ("loss", "test"))}
            return {**losses, "verdict": certificate["verdict"]}


def main() -> None:
    """Make what is missing, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="text")
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates to search")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        levels = Levels(args, Path(folder))
        about = {"steps": args.steps, "length": args.length}
        kept = Kept(f"levels-{Path(args.model).name}", about, levels.run)
        for grid in args.grids:
            untuned = kept.get(grid, 0.0, 0)
            rate = best(kept, args.rates, grid)
            losses = [kept.get(grid, rate, seed)["loss"] for seed in range(args.seeds)]
            spread = (max(losses) - min(losses)) / 2
            rows.append((grid, untuned["bits"], untuned["loss"], rate, sum(losses) / len(losses), spread))
    table(f"{Path(args.model).name}: grids", ("grid", "bits", "untuned", "rate", "tuned", "half the range"), rows)


if __name__ == "__main__":
    main()
