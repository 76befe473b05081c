"""`quadapt demo`: the embedded model learns to answer questions, by every method at 4, 3 and 2 bits.

Nothing is downloaded. All rows are trained on the same questions for the same number of steps; what is compared is what
is left of the training in the model that one would serve.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quadapt.calibrate import Batch
from quadapt.config import DemoConfig
from quadapt.data import Collator, Rows, calibration_batches, encode, pad_token_id, read
from quadapt.demo.stories import rows, stories, write_jsonl
from quadapt.errors import MissingDependency
from quadapt.evaluate import exact_match, generate_samples, perplexity
from quadapt.exporters import gguf
from quadapt.hf.loading import load_model, load_tokenizer
from quadapt.hf.merge import Certificate, merge
from quadapt.hf.peft_layer import lora_config
from quadapt.hf.quantizer import adopt, base_config
from quadapt.hf.saving import save_quantized
from quadapt.hf.workspace import Workspace, remove, write_json
from quadapt.jobs.identity import job_of
from quadapt.methods import Recipe, method_named
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.nn.adapters import Adapter, LoRA, Pooled
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest, Rounding
from quadapt.quant.storage import Storage
from quadapt.report.ui import UI
from quadapt.train import Run, train

STEPS, BATCH, TEST_STORIES, LENGTH = 80, 16, 200, 128
RANK = 16
RECIPE = Recipe(
    learning_rate=3e-3, rank=RANK, alpha=RANK, schedule="linear", warmup_ratio=0.1, max_grad_norm=1.0, source="ours"
)
"""One for every row. Of learning rates 3e-3, 5e-3 and 1e-2 the first is best for QA-LoRA, and within 0.3 % of the best
held-out perplexity for full-precision LoRA."""

PRECISION = "full precision"


@dataclass(frozen=True)
class Row:
    """A model, and how it does on held-out questions."""

    bits: int
    """The width of the codes in bits; 16 stands for full precision."""

    model: str
    """What the model is, in a few words."""

    perplexity: float
    """The perplexity per token of the right answers."""

    accuracy: float
    """The share of questions that were answered exactly right."""

    bits_per_weight: float
    """True bits per linear weight, adapters included as they are stored."""

    megabytes: float
    """The size of the model's weight files in megabytes."""

    certificate: str = ""
    """What the merge kept, where there was one."""


def demo(config: DemoConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt demo` and return its report.

    Raises:
        ConfigError: The output exists and is not to be replaced.
    """
    start = time.monotonic()
    output = Path(config.output)
    job = job_of("demo", config)
    with Workspace(output, job, overwrite=config.overwrite, keeps=False) as space:
        if space.finished is not None:
            return space.finished
        with _embedded() as source, tempfile.TemporaryDirectory() as scratch:
            bench = _Bench(source, Path(scratch), config.seed, ui)
            found = list(bench.rows(config.bits))
            said = _serve(bench, space.path)
        summary = {
            "rows": [asdict(row) for row in found],
            "seed": config.seed,
            "steps": STEPS,
            "seconds": time.monotonic() - start,
            "lines": said,
        }
        write_json(space.path / "report.json", summary)
        (space.path / "report.md").write_text(_markdown(found, summary), encoding="utf-8")
        space.commit(result=summary)
    columns = ("bits", "model", "perplexity", "exact answers", "true bits", "MB")
    ui.table("held-out questions", columns, [_cells(row) for row in found])
    for row in found:
        if row.certificate:
            ui.show(f"{row.model}, {row.bits} bits: {row.certificate}")
    for line in said:
        ui.show(line)
    ui.say(f"wrote {output}, {summary['seconds']:.0f} s in all")
    return summary


@contextmanager
def _embedded() -> Iterator[Path]:
    """The folder of the model that comes with the package."""
    with as_file(files("quadapt.demo") / "model") as folder:
        yield folder


class _Bench:
    """The models and the data of the demonstration."""

    def __init__(self, source: Path, scratch: Path, seed: int, ui: UI) -> None:
        self.source, self.scratch, self.seed, self.ui = source, scratch, seed, ui
        self.tokenizer = load_tokenizer(str(source))
        self.data = encode(self._rows("train", STEPS * BATCH), self.tokenizer, seq_len=LENGTH, packing=False)
        self.test = self._rows("held_out", TEST_STORIES)
        self.text = self._text()
        self.merged: dict[int, tuple[nn.Module, Certificate]] = {}

    def _rows(self, split: Any, count: int) -> Rows:
        path = self.scratch / f"{split}.jsonl"
        write_jsonl(path, rows(stories(self.seed, count, split)))
        return read(str(path))

    def _text(self) -> list[Batch]:
        """What GPTQ is calibrated on: the stories of the training questions."""
        path = self.scratch / "train.jsonl"
        return calibration_batches(
            read(str(path)), self.tokenizer, length=LENGTH, sequences=128, seed=self.seed
        ).batches

    def dense(self) -> nn.Module:
        """A new copy of the embedded model in float32."""
        return load_model(str(self.source), dtype="float32")

    def quantized(self, format: Format, storage: Storage, rounding: Rounding) -> nn.Module:
        """A new copy of the embedded model, quantized as the arguments say."""
        model = self.dense()
        selection = select(model)
        plan = Quantization(format=format, storage=storage, rounding=rounding)
        quantize_model(model, selection.chosen, plan, batches=self.text)
        adopt(model, left=selection.left, made={"source": "the embedded model"})
        return model

    def rows(self, widths: tuple[int, ...]) -> Iterator[Row]:
        """Every row of the table, in order."""
        dense = self.dense()
        yield self.measure(16, f"{PRECISION}, untuned", dense)
        yield self.measure(16, f"{PRECISION} LoRA", self.tuned(dense, None))
        for bits in widths:
            yield from self._at(bits)

    def _at(self, bits: int) -> Iterator[Row]:
        integers = Format(bits=bits, group_size=32)
        base = self.quantized(integers, Storage(), GPTQ())
        yield self.measure(bits, "rounded (GPTQ), untuned", base)
        qlora = method_named("qlora")
        normal = self.quantized(replace(qlora.format, bits=bits), qlora.storage, qlora.rounding)
        yield self.measure(bits, f"QLoRA (nf{bits}), as trained", self.tuned(normal, LoRA()))
        adapted = self.tuned(copy.deepcopy(base), LoRA())
        yield self.measure(bits, "LoRA over QA-LoRA's base, as trained", adapted)
        merged, certificate = merge(adapted, requantize=Nearest())
        yield self.measure(bits, "LoRA merged, requantized", merged, certificate)
        adapted = self.tuned(base, Pooled())
        yield self.measure(bits, "QA-LoRA, as trained", adapted)
        merged, certificate = merge(adapted)
        yield self.measure(bits, "QA-LoRA, merged", merged, certificate)
        self.merged[bits] = (merged, certificate)

    def tuned(self, model: nn.Module, adapter: Adapter | None) -> Any:
        """A model tuned on the training questions; without an adapter of ours, by PEFT's LoRA over dense weights."""
        from peft import LoraConfig, get_peft_model
        from transformers.trainer_utils import set_seed

        set_seed(self.seed)
        if adapter is None:
            about = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        else:
            about = lora_config(adapter, rank=RANK, alpha=RANK)
        tuned = get_peft_model(model, about)
        run = Run(
            recipe=RECIPE,
            max_steps=STEPS,
            batch_size=BATCH,
            gradient_accumulation=1,
            seed=self.seed,
            save_steps=10 * STEPS,
        )
        with self.ui.working("  training") as tick:
            folder = Path(tempfile.mkdtemp(dir=self.scratch))  # of its own: a run goes on from what lies in its folder
            train(tuned, self.data.data, run, folder, collate=Collator(pad_token_id(self.tokenizer)), tick=tick)
        return tuned

    def measure(self, bits: int, name: str, model: Any, certificate: Certificate | None = None) -> Row:
        """One row; says it as it is found."""
        found = perplexity(model, self.tokenizer, self.test, context=LENGTH, batch=64)
        answers = exact_match(model, self.tokenizer, self.test, max_new_tokens=8, batch=64)
        row = Row(
            bits, name, found.perplexity, answers.accuracy, _true_bits(model), _megabytes(model), str(certificate or "")
        )
        self.ui.say(f"{bits:>2} bits  {name}: {row.accuracy:.1%} exact answers, perplexity {row.perplexity:.3f}")
        return row


def _true_bits(model: Any) -> float:
    """Bits per linear weight: quantized layers as they are stored, dense ones 16; adapters as stored, in float32."""
    layers = quantized_layers(model)
    dense = [module for name, module in model.named_modules() if _is_dense(name, module)]
    weights = sum(layer.layout.out * layer.layout.columns for layer in layers.values())
    weights += sum(module.weight.numel() for module in dense)
    bits = sum(layer.layout.bits_per_weight * layer.layout.out * layer.layout.columns for layer in layers.values())
    bits += sum(16 * module.weight.numel() for module in dense)
    return (bits + 32 * _adapter_numbers(model)) / weights


def _is_dense(name: str, module: nn.Module) -> bool:
    kept = isinstance(module, nn.Linear) and not isinstance(module, QuantLinear)
    return kept and "lm_head" not in name and "lora_" not in name


def _adapter_numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)


def _megabytes(model: nn.Module) -> float:
    """Weights as they are stored: codes, scales and offsets; the rest in float16, as the embedded model comes."""
    base = sum(
        parameter.numel() * (2 if parameter.is_floating_point() else 1)
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    )
    return (base + 4 * _adapter_numbers(model)) / 1e6


def _serve(bench: _Bench, folder: Path) -> list[str]:
    """Save the merged models, export one, and let llama.cpp answer a question; returns what there is to say."""
    for bits, (model, certificate) in bench.merged.items():
        merged = folder / f"qa-lora-{bits}bit"
        merged.mkdir()
        note = {"made": dict(base_config(model).made), "certificate": certificate.as_dict()}
        save_quantized(model, bench.tokenizer, merged, note)
    bits, (model, _) = max(bench.merged.items())
    file = folder / f"qa-lora-{bits}bit.gguf"
    report = gguf.export_gguf(model, bench.tokenizer, file)
    lines = [f"{file.name}: {report.bytes / 1e6:.2f} MB", *report.notes]
    try:
        lines += _in_llama_cpp(bench, model, file)
    except MissingDependency as error:
        lines.append(f"llama.cpp was not run: {error}")
    return lines


def _in_llama_cpp(bench: _Bench, model: Any, file: Path) -> list[str]:
    """One question answered by llama.cpp, and how far its probabilities are from the merged model's."""
    from quadapt.exporters.llama_cpp import complete, differences

    tokenizer = bench.tokenizer
    question = bench.test.data[0]
    prompt = tokenizer(question["prompt"])["input_ids"]
    said = tokenizer.decode(complete(file, prompt, 8), skip_special_tokens=True).strip()
    ours = generate_samples(model, tokenizer, [question["prompt"]], max_new_tokens=8)[0].strip()
    prompts = [tokenizer(text)["input_ids"] for text in bench.test.data["prompt"][:16]]
    ids = [token for prompt in prompts for token in prompt][:200]
    rounded = float(differences(file, model, ids).nan_to_num(0).max())
    dense = file.with_name("dense.gguf")
    gguf.export_gguf(copy.deepcopy(model).dequantize(torch.float32), tokenizer, dense)
    exact = float(differences(dense, model, ids).nan_to_num(0).max())
    remove(dense)
    return [
        f"> {question['prompt']}",
        f"llama.cpp: {said}   merged model: {ours}   right: {question['completion'].strip()}",
        f"log-probabilities of llama.cpp and the merged model over {len(ids)} tokens differ by at most {rounded:.3f}:",
        f"its CPU kernels round activations to 8 bits before quantized layers (the same weights in F32: {exact:.1e})",
    ]


def _cells(row: Row) -> tuple[object, ...]:
    return (
        row.bits,
        row.model,
        f"{row.perplexity:.3f}",
        f"{row.accuracy:.1%}",
        f"{row.bits_per_weight:.2f}",
        f"{row.megabytes:.2f}",
    )


def _markdown(found: list[Row], summary: dict[str, Any]) -> str:
    """The report as a Markdown page for people."""
    lines = [
        "# quadapt demo",
        "",
        f"The embedded model, tuned for {STEPS} steps on questions about stories; seed {summary['seed']}, "
        f"{summary['seconds']:.0f} s.",
        "",
        "| bits | model | perplexity | exact answers | true bits | MB |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    lines += [f"| {' | '.join(str(cell) for cell in _cells(row))} |" for row in found]
    lines += ["", "Merges:", ""] + [
        f"* {row.model}, {row.bits} bits: {row.certificate}" for row in found if row.certificate
    ]
    return "\n".join([*lines, "", *(f"    {line}" for line in summary["lines"]), ""])
