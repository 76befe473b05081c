"""A plan by budget against uniform formats of at most as many true bits: loss of the model, nothing tuned.

    python -m benchmarks.planned --known FILE                    # the embedded model, and stories
    python -m benchmarks.planned --model FOLDER --known FILE     # text as the model was made of

LQ-LoRA's NormalFloat grid. Each is measured rounded alone, and with LQ's low-rank part beside it, for which a plan of
its own is made; both also with Fisher information of the known text. Uniform: of every width and group the storage of
scales with most bits that still fits the budget.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import store, table
from benchmarks.methods import EMBEDDED
from quadapt.budget import Candidate, candidates, measure, solve
from quadapt.data import Rows, calibration_batches, read
from quadapt.demo.stories import narratives
from quadapt.evaluate import perplexity
from quadapt.hf.loading import load_model, load_tokenizer
from quadapt.hf.peft_layer import lora_config
from quadapt.hf.quantizer import adopt
from quadapt.hf.start import set_start
from quadapt.methods import method_named
from quadapt.model.layer import Quantization
from quadapt.model.quantize import bits_of, quantize_model
from quadapt.model.select import select
from quadapt.nn.adapters import LoRA
from quadapt.nn.starts import LQ, Zero
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.statistics import StatisticsFiles, gather_fisher

Grids = dict[str, tuple[Format, Storage]]


class Subject:
    """A model, text that it knows to gather Fisher information on, and such text held out."""

    def __init__(self, name: str, known: str | None, rank: int, budget: float, folder: Path) -> None:
        self.name, self.rank, self.budget = str(EMBEDDED) if name == "embedded" else name, rank, budget
        stories = "\n".join(each.text for each in narratives(0, 600, "held_out"))
        text = Path(known).read_text(encoding="utf-8") if known else stories
        cut = int(0.8 * len(text))
        for part, lines in (("seen", text[:cut]), ("held", text[cut : cut + 40_000])):
            (folder / f"{part}.txt").write_text(lines, encoding="utf-8")
        self.tokenizer = load_tokenizer(self.name)
        self.held: Rows = read(str(folder / "held.txt"))
        self.dense = load_model(self.name, dtype="float32")
        self.layers = select(self.dense).chosen
        seen = calibration_batches(read(str(folder / "seen.txt")), self.tokenizer, length=128, sequences=64)
        self.fisher = StatisticsFiles(folder / "fisher")
        gather_fisher(self.dense, self.layers, seen.batches, self.fisher)

    def planned(self, method: str, *, fisher: bool) -> Grids:
        """Grids of every layer, by the integer program."""
        chosen, weights = method_named(method), sum(layer.weight.numel() for layer in self.layers.values())
        options = {
            name: measure(
                layer.weight.detach(),
                candidates(chosen),
                chosen,
                rank=0 if isinstance(chosen.start, Zero) else self.rank,
                statistics=self.fisher[name] if fisher else {},
            )
            for name, layer in self.layers.items()
        }
        found = solve(options, int(self.budget * weights)).chosen
        return {name: (option.candidate.format, option.candidate.storage) for name, option in found.items()}

    def uniform(self) -> dict[str, Grids]:
        """For each width and group the dearest storage of scales that the budget allows."""
        best: dict[str, tuple[float, Candidate]] = {}
        for way in candidates(method_named("lq-lora")):
            bits = bits_of([way.layout(*layer.weight.shape) for layer in self.layers.values()])
            if bits <= self.budget and bits > best.get(way.format.name, (0.0, way))[0]:
                best[way.format.name] = bits, way
        return {
            f"{name}, {way.storage.scales}": dict.fromkeys(self.layers, (way.format, way.storage))
            for name, (_, way) in best.items()
        }

    def loss(self, grids: Grids, *, start: bool, fisher: bool = False) -> tuple[float, float]:
        """Held-out loss, and true bits per weight without the low-rank part."""
        from peft import get_peft_model

        model: Any = load_model(self.name, dtype="float32")
        chosen, (format, storage) = select(model), next(iter(grids.values()))
        plan = Quantization(
            format=format, storage=storage, rounding=method_named("lq-lora").rounding, layers=grids, rank=self.rank
        )
        plan = replace(plan, start=LQ(fisher=fisher) if start else Zero())
        done = quantize_model(model, chosen.chosen, plan, statistics=self.fisher)
        adopt(model, left=chosen.left, made={})
        if start:
            about = lora_config(LoRA(), rank=self.rank, alpha=self.rank, target_modules=list(grids), start="lq")
            model = get_peft_model(model, about)
            set_start(model, done.factors)
        found = perplexity(model, self.tokenizer, self.held, context=128, batch=32)
        return math.log(found.perplexity), bits_of([weight.layout for weight in done.weights.values()])


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--known", help="text as the model was made of; default: stories")
    parser.add_argument("--budget", type=float, default=2.75)
    parser.add_argument("--rank", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(args.model, args.known, args.rank, args.budget, Path(folder))
        found = perplexity(subject.dense, subject.tokenizer, subject.held, context=128, batch=32)
        rows: list[tuple[str, str, float, float]] = [("full precision", "", math.log(found.perplexity), 32.0)]
        grids = {"plan": ("qlora", False), "plan, Fisher": ("qlora", True)}
        for name, (method, fisher) in grids.items():
            rows.append((name, "rounded", *subject.loss(subject.planned(method, fisher=fisher), start=False)))
            with_part = subject.planned("lq-lora", fisher=fisher)
            rows.append((name, f"LQ, rank {args.rank}", *subject.loss(with_part, start=True, fisher=fisher)))
        for name, each in subject.uniform().items():
            rows.append((name, "rounded", *subject.loss(each, start=False)))
            rows.append((name, f"LQ, rank {args.rank}", *subject.loss(each, start=True)))
    columns = ("grid", "model", "held-out loss", "true bits")
    table(f"{args.model}, at most {args.budget} bits", columns, sorted(rows, key=lambda row: (row[1], row[2])))
    figures = {"budget": args.budget, "rank": args.rank, "rows": [dict(zip(columns, row, strict=True)) for row in rows]}
    store(f"planned-{Path(args.model).name}", figures)


if __name__ == "__main__":
    main()
