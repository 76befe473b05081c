"""What every method's model is in every export format, run by the engine of that format beside quadapt itself.

    python -m benchmarks.formats

A Llama of random weights is tuned for some steps by each method, at its defaults and in some other forms, merged where
that is exact, and exported to each format. What `quadapt export --format ?` says of it is stored; what can be written
is loaded by the engine that serves it, and the largest difference of its logits from our own in float32 is taken (of
llama.cpp, of log-probabilities). Then each engine reads and writes tokens with a larger model: tokens per second of
time on the CPU, in one thread.

Each cell is kept in `benchmarks/results/formats.json`; given again, the script goes on with what is missing. Engines
that are not installed are named and left out; all of them: `pip install 'quadapt[mlx,onnx,openvino,torchao,serve]' hqq
gptqmodel optimum`.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quadapt
from benchmarks.engines import ENGINES, Engine, Running, of_torch
from benchmarks.measure import Kept, environment
from quadapt.config import ExportConfig, MergeConfig, TuneConfig, checked
from quadapt.demo.stories import stories
from quadapt.errors import QuadaptError
from quadapt.exporters.formats import EXPORTERS
from quadapt.hf.folder import find_base, open_folder
from quadapt.hf.loading import load_tokenizer
from quadapt.jobs.export import export
from quadapt.jobs.merge import merge
from quadapt.jobs.tune import tune
from quadapt.methods import METHODS, method_named
from quadapt.report.ui import UI

QUIET = UI(quiet=True)
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    "qa-lora --bits 2": {"method": "qa-lora", "bits": 2},
    "qa-lora --bits 8": {"method": "qa-lora", "bits": 8},
    "l4q --bits 8": {"method": "l4q", "bits": 8},
    "l4q --bits 8 --zero none": {"method": "l4q", "bits": 8, "zero": "none"},
    "l4q --zero integer": {"method": "l4q", "zero": "integer"},
    "l4q --scales k-quant": {"method": "l4q", "scales": "k-quant"},
    "peqa --quant-type nf": {"method": "peqa", "levels": "nf", "group_size": 64},
    "peqa --quant-type nf-qlora": {"method": "peqa", "levels": "nf-qlora", "group_size": 64},
    "peqa --quant-type iq4-nl": {"method": "peqa", "levels": "iq4-nl", "group_size": 32},
}
"""What is tuned: every method at its defaults, and some forms that are made for a format."""

ADAPTERS = ("lora", "nf8")
"""Formats of an adapter alone: PEFT runs the first over the dense base, quadapt the second."""

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}
LARGE: dict[str, Any] = SIZES | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "initializer_range": 0.02,
}
TOKENIZER = str(files("quadapt.demo") / "model")
STEPS, LENGTH = 6, 48
PROMPT, WRITTEN, READ = 32, 32, 128


def dense(sizes: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama of random weights, with norms that are not trivial."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(load_tokenizer(TOKENIZER)), **sizes, **ends)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@dataclass(frozen=True)
class Tuned:
    """A model that was tuned."""

    folder: Path
    """Merged, or the adapter if it does not merge."""

    adapter: Path
    """The adapter."""

    verdict: str
    """The certificate's word on the merge; empty if there is none."""

    ids: list[int]
    """The tokens that models are compared on."""

    logits: Tensor
    """Our own after each of them, float32."""

    answers: dict[str, dict[str, Any]]
    """What `--format ?` says, by format."""


class Formats:
    """Makes cells of the table, each when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, dict[str, Tuned]()
        self.tokenizer = load_tokenizer(TOKENIZER)
        rows = [story.text for story in _stories()]
        self.text = folder / "text.txt"
        self.text.write_text("\n\n".join(rows), encoding="utf-8")
        self.ids = list(self.tokenizer(" ".join(rows[-20:])).input_ids)
        dense(SIZES).save_pretrained(folder / "dense")
        self.tokenizer.save_pretrained(folder / "dense")

    def tuned(self, row: str) -> Tuned:
        """The model of a row, tuned if it was not yet; only the last is kept on the disk."""
        if row not in self.made:
            for old in self.folder.glob("row-*"):
                shutil.rmtree(old)
            self.made = {}
            self.made[row] = self._tuned(row)
        return self.made[row]

    def _tuned(self, row: str) -> Tuned:
        place = Path(tempfile.mkdtemp(prefix="row-", dir=self.folder))
        adapter, merged = place / "adapter", place / "merged"
        settings = {
            "model": str(self.folder / "dense"),
            "data": str(self.text),
            "output": str(adapter),
            "dtype": "float32",
            "max_steps": STEPS,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "seq_len": 64,
            "rank": 8,
            "calibration_sequences": 8,
            "calibration_length": 64,
            **ROWS[row],
        }
        tune(checked(TuneConfig, settings), QUIET)
        verdict = ""
        if method_named(ROWS[row]["method"]).adapter.exactness != "none":
            found = merge(checked(MergeConfig, {"adapter": str(adapter), "output": str(merged)}), QUIET)
            verdict = found["certificate"]["verdict"]
        folder = merged if verdict else adapter
        model, _ = quadapt.load(folder, dtype="float32")
        asked = {"model": str(folder), "format": "?", "dtype": "float32"}
        answers = {each["format"]: each for each in export(checked(ExportConfig, asked), QUIET)["formats"]}
        if verdict:  # formats of adapters are asked about the adapter
            alone = export(checked(ExportConfig, {**asked, "model": str(adapter)}), QUIET)["formats"]
            answers |= {each["format"]: each for each in alone if each["format"] in ADAPTERS}
        ids = self.ids[:LENGTH]
        return Tuned(folder, adapter, verdict, ids, of_torch(model.eval()).read(ids), answers)

    def cell(self, row: str, format: str) -> dict[str, Any]:
        """What becomes of a row in a format."""
        tuned = self.tuned(row)
        answer = tuned.answers[format]
        found = {
            "row": row,
            "format": format,
            "merge": tuned.verdict,
            "holds": answer["holds"],
            "words": answer["words"],
        }
        if answer["holds"] == "no":
            return found
        output = self.folder / ("out.gguf" if format == "gguf" else "out")
        try:
            read = self._read(tuned, format, output)
        except QuadaptError as error:
            return {**found, "failed": str(error)}
        finally:
            for path in self.folder.glob("out*"):
                _remove(path)
        ours = tuned.logits.log_softmax(-1) if format == "gguf" else tuned.logits
        apart = (read[:, : ours.shape[1]] - ours).abs()
        return {**found, "largest": float(apart.max()), "mean": float(apart.mean()), "size": float(ours.std())}

    def _read(self, tuned: Tuned, format: str, output: Path) -> Tensor:
        """The logits of what is written, by its engine."""
        engine = ENGINES.get(format)
        source = tuned.adapter if format in ADAPTERS else tuned.folder
        settings = {"model": str(source), "format": format, "output": str(output)}
        export(checked(ExportConfig, settings | dict(engine.options if engine else {})), QUIET)
        if engine is not None:
            with engine.load(output, *EXPORTERS[format]().besides(output)) as running:
                return running.read(tuned.ids)
        base = find_base(open_folder(str(tuned.adapter)), None)
        if format == "nf8":
            return of_torch(quadapt.load(output, base=base, dtype="float32")[0].eval()).read(tuned.ids)
        if open_folder(base).kind == "quantized":
            to = {"model": base, "format": "hf", "output": str(self.folder / "out-base"), "dtype": "float32"}
            export(checked(ExportConfig, to), QUIET)
            base = to["output"]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return of_torch(PeftModel.from_pretrained(model, output).eval()).read(tuned.ids)

    def speed(self, name: str) -> dict[str, Any]:
        """Tokens per second of a larger model: read at once, and written one at a time."""
        format = name if name in ENGINES else ""
        settings = {"levels": "nf-qlora", "group_size": 64} if name == "bitsandbytes" else {"zero": "none"}
        model: Any = dense(LARGE)
        kind = "bfloat16" if name == "bf16" else "float32"
        if name not in ("bf16", "hf"):
            method = "qlora" if name == "bitsandbytes" else "qa-lora"
            model = quadapt.prepare(model, method=method, rounding="nearest", rank=8, **settings).unload()
        if not format:
            return {"engine": _OURS[name], **_timed(of_torch(model.to(getattr(torch, kind)).eval()), self.ids)}
        engine, output = ENGINES[format], self.folder / ("fast.gguf" if format == "gguf" else "fast")
        if name == "hf":
            model.save_pretrained(output)
        else:
            EXPORTERS[format].made(**engine.options).write(model, self.tokenizer, output)
        size = sum(file.stat().st_size for file in (output.rglob("*") if output.is_dir() else [output]))
        try:
            with engine.load(output) as running:
                return {"engine": engine.name, "bytes": size, **_timed(running, self.ids)}
        finally:
            _remove(output)

    def run(self, kind: str, *key: str) -> dict[str, Any]:
        """Make what a key names, with the versions that it was made by."""
        format = key[-1]
        found = self.speed(format) if kind == "speed" else self.cell(*key)
        engine = ENGINES.get(format)
        return {**found, "versions": engine.versions() if engine else "", "commit": environment()["commit"]}


_OURS = {"bf16": "transformers, bfloat16", "quadapt": "quadapt, float32"}
"""What runs without being exported: the dense model, and codes."""


def _stories() -> list[Any]:
    return list(stories(0, 200))


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _timed(running: Running, ids: list[int], rounds: int = 3) -> dict[str, float]:
    """Tokens per second: medians of some rounds, each on other tokens, which no cache holds."""
    found: dict[str, list[float]] = {"read": [], "written": []}

    def took(work: Callable[[], Any]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    reading = running.glance or running.read
    for at in range(rounds + 1):
        text, prompt, other = ids[at + 1 :][:READ], ids[at + 150 :][:PROMPT], ids[at + 300 :][:PROMPT]
        reads, whole, first = (
            took(lambda: reading(text)),  # noqa: B023 - called at once
            took(lambda: running.write(prompt, WRITTEN)),  # noqa: B023
            took(lambda: running.write(other, 0)),  # noqa: B023
        )
        if at:  # the first round compiles, and fills caches
            found["read"].append(reads)
            found["written"].append(whole - first)
    return {
        "read per second": READ / statistics.median(found["read"]),
        "written per second": WRITTEN / statistics.median(found["written"]),
    }


def main() -> None:
    """Make what is missing; say what failed and what was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--formats", nargs="+", default=list(EXPORTERS), choices=list(EXPORTERS))
    parser.add_argument("--no-speed", action="store_true", help="leave out tokens per second")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # writers of graphs tell of every node
    missing: dict[str, Engine] = {name: each for name, each in ENGINES.items() if each.missing()}
    for name, engine in missing.items():
        print(f"{name}: left out, {', '.join(engine.missing())} is not installed", flush=True)
    here = [name for name in args.formats if name not in missing]
    with tempfile.TemporaryDirectory() as folder:
        formats = Formats(Path(folder))
        kept = Kept("formats", {"sizes": SIZES, "large": LARGE, "steps": STEPS, "tokens": LENGTH}, formats.run)
        keys = [("cell", row, format) for row in args.rows for format in here]
        if not args.no_speed:
            keys += [("speed", name) for name in (*_OURS, *here) if name not in ADAPTERS]
        for key in keys:
            try:
                kept.get(*key)
            except Exception:  # the other cells are made all the same
                print(f"{' '.join(key)} failed:\n{traceback.format_exc()}", flush=True)


if __name__ == "__main__":
    main()
