"""Where training starts, at 4, 3 and 2 bits: output error of the layers, held-out loss before and after tuning.

    python -m benchmarks.starts --model embedded              # questions about stories
    python -m benchmarks.starts --model FOLDER --data FILE    # text

NormalFloat in groups of 32 with 16-bit scales and shifts; zero is QLoRA. Ranges: as QLoRA (largest magnitude), and by
the entropy of codes (ICQ). One learning rate for each width, the best for zero on the first seed. True bits count the
adapter as 16-bit floats: on small matrices a rank costs bits. Starts are calibrated on text as the model was made of
(`--known`); errors of outputs, and *known*, the loss at the start, are on such text held out, since the task's own
loss says nothing before training. The other losses are on the held-out text of the task. Each run is kept in
`benchmarks/results/starts-MODEL.json`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Kept, table
from benchmarks.methods import Task
from quadapt.data import Collator, Rows, calibration_batches, pad_token_id, read
from quadapt.demo.stories import narratives
from quadapt.evaluate import perplexity
from quadapt.hf.loading import load_model
from quadapt.hf.peft_layer import adapted_layers, declared_params, lora_config
from quadapt.hf.quantizer import adopt
from quadapt.hf.start import set_start
from quadapt.methods import Recipe
from quadapt.model.layer import Quantization
from quadapt.model.quantize import bits_of, quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.nn.adapters import LoRA
from quadapt.nn.starts import STARTS, Zero
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.statistics import MOMENT, StatisticsFiles, gather_second_moments
from quadapt.train import Run, train

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
NAMES = ("zero", "loftq", "lq", "lq-frozen", "quailora", "cloq", "zero-twice")
"""What is compared: a start by its name; `frozen`, where its factors stay and a fresh adapter trains beside them; and
zero with an adapter of twice the rank, which is what is served there."""

RANGES = ("minmax", "icq")
GROUP = 32
PARTS = ("seen", "held")


class Starts:
    """A task, with the dense model's second moments on text that it knows: to calibrate on, and held out."""

    def __init__(self, task: Task, rank: int, known: str | None, folder: Path) -> None:
        self.task, self.rank = task, rank
        if known is None:
            known = str(folder / "stories.txt")
            Path(known).write_text("\n".join(each.text for each in narratives(0, 600, "held_out")), encoding="utf-8")
        text = Path(known).read_text(encoding="utf-8")
        cut = int(0.8 * len(text))
        for name, part in (("seen.txt", text[:cut]), ("held.txt", text[cut : cut + 40_000])):
            (folder / name).write_text(part, encoding="utf-8")
        dense = load_model(task.model, dtype="float32")
        self.dense = {name: layer.weight.detach() for name, layer in select(dense).chosen.items()}
        self.held = read(str(folder / "held.txt"))
        self.moments = {part: self._gathered(dense, folder / part, read(str(folder / f"{part}.txt"))) for part in PARTS}

    def _gathered(self, dense: nn.Module, folder: Path, rows: Rows) -> StatisticsFiles:
        """Second moments on some text."""
        files = StatisticsFiles(folder)
        text = calibration_batches(rows, self.task.tokenizer, length=self.task.length, sequences=64, seed=0).batches
        gather_second_moments(dense, select(dense).chosen, text, files)
        return files

    def begun(self, name: str, bits: int, range_: str) -> Any:
        """The adapted model before training."""
        from peft import get_peft_model

        start, _, how = name.partition("-")
        adapter, rank = LoRA(train_start=how != "frozen"), 2 * self.rank if how == "twice" else self.rank
        model = load_model(self.task.model, dtype="float32")
        shifted = range_ == "icq"
        format = Format(levels="nf", bits=bits, group_size=GROUP, zero="float" if shifted else "none")
        selection = select(model)
        plan = Quantization(
            format=format,
            storage=Storage(offsets="fp16" if shifted else "absent"),
            rounding=Nearest(range="icq" if shifted else "minmax"),
            start=STARTS[start]() if start != "zero" else Zero(),
            rank=rank,
        )
        done = quantize_model(model, selection.chosen, plan, statistics=self.moments["seen"])
        adopt(model, left=selection.left, made={})
        settings = lora_config(adapter, rank=rank, alpha=rank, target_modules=list(self.dense), start=start)
        adapted = get_peft_model(model, settings)
        set_start(adapted, done.factors)
        return adapted

    def errors(self, model: Any) -> dict[str, list[float]]:
        """Relative error of each layer: of its output on held-out text, and of its weight."""
        found: dict[str, list[float]] = {"output errors": [], "weight errors": []}
        for name, layer in adapted_layers(model).items():
            W, H = self.dense[name].double(), self.moments["held"][name][MOMENT].double()
            E = W - layer.dense_adapted().double()
            found["output errors"].append(float((((E @ H) * E).sum() / ((W @ H) * W).sum()).sqrt()))
            found["weight errors"].append(float(E.norm() / W.norm()))
        return found

    def run(self, start: str, bits: int, range_: str, rate: float, seed: int) -> dict[str, Any]:
        """Begin and tune once."""
        from transformers.trainer_utils import set_seed

        set_seed(seed)
        model = self.begun(start, bits, range_)
        errors = self.errors(model)
        task = self.task
        before, known = task.loss(model), self.known(model)
        recipe = Recipe(
            learning_rate=rate, rank=self.rank, alpha=self.rank, schedule="linear", warmup_ratio=0.1, max_grad_norm=1.0
        )
        run = Run(
            recipe=recipe,
            max_steps=task.steps,
            batch_size=task.batch,
            gradient_accumulation=1,
            seed=seed,
            save_steps=10 * task.steps,
        )
        with tempfile.TemporaryDirectory() as folder:
            train(model, task.data.data, run, Path(folder), collate=Collator(pad_token_id(task.tokenizer)))
        return {
            **errors,
            "known": known,
            "before": before,
            "after": task.loss(model),
            "bits": self.bits(model),
        }

    def known(self, model: Any) -> float:
        """Loss on text as the model was made of."""
        found = perplexity(model, self.task.tokenizer, self.held, context=self.task.length, batch=32)
        return math.log(found.perplexity)

    def bits(self, model: nn.Module) -> float:
        """True bits per weight, the adapter as 16-bit floats included."""
        layouts = [layer.layout for layer in quantized_layers(model).values()]
        weights = sum(layout.out * layout.columns for layout in layouts)
        served = sum(each.numel() for each, declared in declared_params(model) if declared.serves)
        return bits_of(layouts) + 16 * served / weights


def report(
    kept: Kept, widths: list[int], seeds: int, names: Sequence[str], ranges: Sequence[str]
) -> Iterator[tuple[object, ...]]:
    """Rows of the table."""
    for bits in widths:
        rate = min(RATES, key=lambda rate: kept.get("zero", bits, "minmax", rate, 0)["after"])
        for range_ in ranges:
            zero = kept.get("zero", bits, range_, rate, 0)["output errors"]
            for name in names:
                runs = [kept.get(name, bits, range_, rate, seed) for seed in range(seeds)]
                first, after = runs[0], [run["after"] for run in runs]
                pairs = list(zip(first["output errors"], zero, strict=True))
                better = sum(mine < theirs for mine, theirs in pairs) / len(pairs)
                errors = [statistics.mean(first[f"{kind} errors"]) for kind in ("weight", "output")]
                losses = first["known"], first["before"], statistics.mean(after), max(after) - min(after)
                yield bits, name, range_, f"{rate:g}", *errors, f"{better:.0%}", *losses, first["bits"]


def main() -> None:
    """Measure what is missing, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", help="text; default: questions about stories")
    parser.add_argument("--known", help="text as the model was made of; default: stories")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--starts", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--ranges", nargs="+", choices=RANGES, default=RANGES)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    task = Task(args.model, args.data, args.steps, args.batch, args.length)
    about = {name: getattr(args, name) for name in ("steps", "batch", "length", "rank")} | {"group": GROUP}
    columns = (
        *("bits", "start", "range", "rate", "weight error", "output error", "below zero's", "known", "before"),
        *("after", "spread", "true bits"),
    )
    with tempfile.TemporaryDirectory() as folder:
        starts = Starts(task, args.rank, args.known, Path(folder))
        kept = Kept(f"starts-{Path(args.model).name}", about, starts.run)
        table(
            f"{args.model}, {args.steps} steps",
            columns,
            list(report(kept, args.bits, args.seeds, args.starts, args.ranges)),
        )


if __name__ == "__main__":
    main()
