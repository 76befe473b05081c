"""A quantized checkpoint in, the same format out: what is learned between, and whether other readers see all of it.

    python -m benchmarks.roundtrip --model FOLDER --data FILE

The dense model is rounded by GPTQ at 4 bits and written as GPTQ, AWQ and compressed-tensors, as if others had made
these folders. Each is tuned by its scales alone (`e2e-qp`) and by its codes and scales (`code-lora`), merged, and
written in its own format. Loss is in nats per token on a part of the text that is not trained on: of the folder that
was given, of the merged model, and of the folder that came out, dequantized by another reader (compressed-tensors' own
code; for GPTQ and AWQ the slow readers of `tests/reference`, written from the formats' descriptions). Rates are
searched on a part of their own, on the first format and seed.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tests.reference import awq_pack_numpy, gptq_pack_numpy
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.measure import Kept, table
from benchmarks.served import Text, best
from quadapt.config import ExportConfig, MergeConfig, QuantizeConfig, TuneConfig, checked
from quadapt.data import read
from quadapt.evaluate import perplexity
from quadapt.hf.folder import open_folder
from quadapt.hf.loading import load, load_model, load_tokenizer
from quadapt.jobs.export import export
from quadapt.jobs.merge import merge
from quadapt.jobs.quantize import quantize
from quadapt.jobs.tune import tune
from quadapt.model.quantize import quantized_layers
from quadapt.report.ui import UI

FORMATS = ("gptq", "awq", "compressed-tensors")
METHODS = {"by scales": "e2e-qp", "by codes": "code-lora"}
RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3, 0.128, 0.256)
QUIET = UI(quiet=True)


GROUP = 32
READERS: dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]] = {
    "gptq": partial(gptq_pack_numpy.read, bits=4, version=2),
    "awq": partial(awq_pack_numpy.read, group_size=GROUP),
}


class Roundtrip:
    """A model and a text, in and out of formats."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.text = args, folder, Text.of(args.data, folder)
        self.tokenizer = load_tokenizer(args.model)
        made = {"rounding": "gptq", "range": "mse", "zero": "integer", "group_size": GROUP, "bits": 4}
        about = {"model": args.model, "output": str(folder / "base"), "calibration_data": str(self.text.train), **made}
        quantize(checked(QuantizeConfig, {**about, "calibration_length": args.length, "dtype": "float16"}), QUIET)
        for format in FORMATS:
            self.write("base", format, str(self.given(format)))

    def given(self, format: str) -> Path:
        """The folder that is tuned."""
        return self.folder / f"given-{format}"

    def write(self, model: str, format: str, output: str) -> None:
        """Export a folder."""
        export(checked(ExportConfig, {"model": str(self.folder / model), "format": format, "output": output}), QUIET)

    def loss(self, model: Any, part: str) -> float:
        """Loss on a part of the text, in nats per token."""
        rows = read(str(getattr(self.text, part)))
        found = perplexity(model, self.tokenizer, rows, context=self.args.length, batch=32)
        return float(torch.tensor(found.perplexity).log())

    def read_by_others(self, format: str, folder: Path) -> Any:
        """A dense model of what another reader makes of a folder."""
        if format not in READERS:
            from transformers import CompressedTensorsConfig

            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
            ).eval()
        model, state = load_model(self.args.model, dtype="float32"), load_file(folder / "model.safetensors")
        own: dict[str, Tensor] = {name: each for name, each in state.items() if name.endswith((".weight", ".bias"))}
        for name in quantized_layers(load_model(str(folder), dtype="float32")):
            parts = {part: state[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "scales")}
            if f"{name}.g_idx" in state:
                parts["g_idx"] = state[f"{name}.g_idx"].numpy()
            own[f"{name}.weight"] = torch.from_numpy(READERS[format](parts).copy()).float()
        missing, unexpected = model.load_state_dict(own, strict=False)
        assert not unexpected, unexpected
        assert set(missing) <= {"lm_head.weight"}, missing
        return model

    def run(self, format: str, method: str, rate: float, seed: int) -> dict[str, Any]:
        """Tune a folder, merge, write it back, and measure on the way."""
        given = self.given(format)
        assert open_folder(str(given)).importer is not None
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            adapter, merged, output = (str(Path(place) / each) for each in ("adapter", "merged", "output"))
            settings = {
                "model": str(given),
                "data": str(self.text.train),
                "output": adapter,
                "method": method,
                "dtype": "float32",
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
                **({"rank": 16, "alpha": 16, "grid_learning_rate": rate / 2} if method == "code-lora" else {}),
            }
            tune(checked(TuneConfig, settings), QUIET)
            certificate = merge(checked(MergeConfig, {"adapter": adapter, "output": merged}), QUIET)["certificate"]
            self.write(merged, format, output)
            before, after = (load(str(each), dtype="float32")[0] for each in (given, merged))
            return {
                "verdict": certificate["verdict"],
                "choose": self.loss(after, "choose"),
                "before": self.loss(before, "test"),
                "merged": self.loss(after, "test"),
                "reloaded": self.loss(self.read_by_others(format, Path(output)), "test"),
            }


def main() -> None:
    """Make what is missing, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trip = Roundtrip(args, Path(folder))
        kept = Kept(f"roundtrip-{Path(args.model).name}", {"steps": args.steps, "length": args.length}, trip.run)
        for said, method in METHODS.items():
            rate = best(kept, RATES, FORMATS[0], method)
            for format in FORMATS:
                runs = [kept.get(format, method, rate, seed) for seed in range(args.seeds)]
                means = [sum(run[name] for run in runs) / len(runs) for name in ("before", "merged", "reloaded")]
                rows.append((format, f"{said} ({method})", rate, *means, ", ".join({run["verdict"] for run in runs})))
    columns = ("format", "tuned", "rate", "loss before", "merged", "read by others", "merge")
    table(f"{Path(args.model).name}: in and out again, 4 bits", columns, rows)


if __name__ == "__main__":
    main()
