"""Every method at 4, 3 and 2 bits, equal steps: held-out loss of what one would serve.

    python -m benchmarks.methods --model embedded              # questions about stories
    python -m benchmarks.methods --model FOLDER --data FILE    # text

Learning rates are searched for each method and width on the first seed, over the same grid; the best serves all seeds.
Each run is kept in `benchmarks/results/methods-MODEL.json`; given again, the script goes on with what is missing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Kept, table
from quadapt.data import Collator, Rows, calibration_batches, encode, pad_token_id, read
from quadapt.demo.stories import rows, stories, write_jsonl
from quadapt.evaluate import perplexity
from quadapt.hf.loading import load_model, load_tokenizer
from quadapt.hf.merge import merge
from quadapt.hf.peft_layer import lora_config
from quadapt.hf.quantizer import adopt
from quadapt.methods import Method, Recipe, method_named
from quadapt.model.layer import Quantization
from quadapt.model.quantize import bits_of, quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.quant.rounding import Nearest
from quadapt.train import Run, train

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
GROUP, RANK = 32, 16
NAMES = (
    "l4q",
    "lr-qat",
    "peqa",
    "peqa-grouped",
    "e2e-qp",
    "qa-lora",
    "qa-lora-scales",
    "qat-lora",
    "qlora",
    "gptq-lora",
)
EMBEDDED = Path(__file__).parents[1] / "src" / "quadapt" / "demo" / "model"


def at(name: str, bits: int) -> Method:
    """A method on the grid that all are compared on; PEQA keeps its one scale a row, unless it is called grouped."""
    method = method_named(name.removesuffix("-grouped"))
    group = method.format.group_size if name == "peqa" else GROUP
    return method.with_format(replace(method.format, bits=bits, group_size=group))


class Task:
    """A model, text to train on, and held-out text."""

    def __init__(self, model: str, data: str | None, steps: int, batch: int, length: int) -> None:
        self.model = str(EMBEDDED) if model == "embedded" else model
        self.steps, self.batch, self.length = steps, batch, length
        self.tokenizer = load_tokenizer(self.model)
        with tempfile.TemporaryDirectory() as folder:
            if data is None:
                self.rows, self.held = (
                    self._questions(Path(folder), *part) for part in (("train", 1), ("held_out", 0))
                )
            else:
                self.rows, self.held = self._halves(Path(folder), data)
        self.data = encode(self.rows, self.tokenizer, seq_len=length, packing=False)
        self.text = calibration_batches(self.rows, self.tokenizer, length=length, sequences=64, seed=0).batches

    def _questions(self, folder: Path, split: Any, train_: int) -> Rows:
        path = folder / f"{split}.jsonl"
        write_jsonl(path, rows(stories(0, self.steps * self.batch if train_ else 300, split)))
        return read(str(path))

    def _halves(self, folder: Path, data: str) -> tuple[Rows, Rows]:
        text = Path(data).read_text(encoding="utf-8")
        cut = int(0.95 * len(text))
        for name, part in (("train.txt", text[:cut]), ("held.txt", text[cut : cut + 40_000])):
            (folder / name).write_text(part, encoding="utf-8")
        return read(str(folder / "train.txt")), read(str(folder / "held.txt"))

    def base(self, method: Method | None) -> nn.Module:
        """What the method's adapter trains over."""
        model = load_model(self.model, dtype="float32")
        if method is None or method.adapter.base == "float":
            return model
        format, storage, rounding = method.base()
        selection = select(model)
        quantize_model(
            model, selection.chosen, Quantization(format=format, storage=storage, rounding=rounding), batches=self.text
        )
        return adopt(model, left=selection.left, made={})

    def loss(self, model: Any) -> float:
        """Held-out loss, in nats for each token that bears loss."""
        found = perplexity(model, self.tokenizer, self.held, context=self.length, batch=32)
        return float(torch.tensor(found.perplexity).log())

    def tuned(self, name: str, bits: int, rate: float, seed: int) -> dict[str, Any]:
        """One run: loss as trained, merged, and merged and requantized, as far as there are such."""
        from peft import LoraConfig, get_peft_model
        from transformers.trainer_utils import set_seed

        method = None if name == "lora" else at(name, bits)
        base, start = self.base(method), time.process_time()
        set_seed(seed)
        names = [
            layer for layer, module in base.named_modules() if isinstance(module, nn.Linear) and layer != "lm_head"
        ]
        about = (
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, task_type="CAUSAL_LM")
            if method is None
            else lora_config(method.adapter, rank=RANK, alpha=RANK, target_modules=names)
        )
        model = get_peft_model(base, about)  # type: ignore[arg-type]
        recipe = Recipe(
            learning_rate=rate, rank=RANK, alpha=RANK, schedule="linear", warmup_ratio=0.1, max_grad_norm=1.0
        )
        run = Run(
            recipe=recipe,
            max_steps=self.steps,
            batch_size=self.batch,
            gradient_accumulation=1,
            seed=seed,
            save_steps=10 * self.steps,
        )
        with tempfile.TemporaryDirectory() as folder:
            train(model, self.data.data, run, Path(folder), collate=Collator(pad_token_id(self.tokenizer)))
        found: dict[str, Any] = {"as trained": self.loss(model), "CPU seconds": time.process_time() - start}
        if method is None:
            return found
        exact = method.adapter.exactness == "exact"
        merged, certificate = merge(model, requantize=None if exact else Nearest(range="mse"))
        kind = "merged" if exact else "requantized"
        layouts = [layer.layout for layer in quantized_layers(merged).values()]
        return {**found, kind: self.loss(merged), "verdict": certificate.verdict, "bits": bits_of(layouts)}

    def run(self, name: str, bits: int, rate: float, seed: int) -> dict[str, Any]:
        """Tune, or at rate 0 only round."""
        return self.tuned(name, bits, rate, seed) if rate else self.untuned(bits)

    def untuned(self, bits: int) -> dict[str, Any]:
        """Rounding alone, on the grid of QA-LoRA."""
        model = self.base(at("qa-lora", bits))
        return {"merged": self.loss(model), "bits": bits_of([each.layout for each in quantized_layers(model).values()])}


def end(run: dict[str, Any]) -> float:
    """Loss of what the method hands over."""
    return run.get("merged", run["as trained"])


def report(kept: Kept, widths: list[int], seeds: int) -> Iterator[tuple[object, ...]]:
    """Rows of the table: mean and spread over the seeds, at the learning rate that is best on the first."""
    for bits in [16, *widths]:
        for name in ("lora",) if bits == 16 else ("untuned", *NAMES):
            if name == "untuned":
                run = kept.get(name, bits, 0, 0)
                yield bits, "rounding (GPTQ), untuned", "", run["merged"], "", "", run["bits"], ""
                continue
            rate = min(RATES, key=lambda rate: end(kept.get(name, bits, rate, 0)))
            runs = [kept.get(name, bits, rate, seed) for seed in range(seeds)]
            losses = [end(run) for run in runs]
            again = statistics.mean(run["requantized"] for run in runs) if "requantized" in runs[0] else ""
            spread = max(losses) - min(losses)
            seconds = statistics.mean(run["CPU seconds"] for run in runs)
            yield bits, name, f"{rate:g}", statistics.mean(losses), spread, again, runs[0].get("bits", 16.0), seconds


def main() -> None:
    """Measure what is missing, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", help="text; default: questions about stories")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    task = Task(args.model, args.data, args.steps, args.batch, args.length)
    about = {name: getattr(args, name) for name in ("steps", "batch", "length")} | {"group": GROUP, "rank": RANK}
    kept = Kept(f"methods-{Path(args.model).name}", about, task.run)
    columns = ("bits", "method", "rate", "held-out loss", "spread", "requantized", "true bits", "CPU seconds")
    table(f"{args.model}, {args.steps} steps", columns, list(report(kept, args.bits, args.seeds)))


if __name__ == "__main__":
    main()
