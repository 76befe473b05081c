"""What people serve: our exact files against the usual route, by their bytes, each measured in llama.cpp itself.

    python -m benchmarks.served --model FOLDER --data FILE

The usual route: LoRA over the dense model, merged, then llama.cpp's quantizer, with and without an importance matrix of
the training text. Ours: a method's file, in llama.cpp's own blocks, which holds exactly the model that was trained. All
are given as many tokens: those of Block-AP count as steps of LoRA. Rates are searched on a part of the text that is
neither trained on nor tested on, on the first seed, over a grid that is wide enough that no best lies on its edge;
what does not depend on the rate, a model tuned first and its quantized base, is made once for all of them. Loss
is in nats per token, on the test part, computed by llama.cpp from the file. Each run is kept in
`benchmarks/results/served-MODEL.json`; given again, the script goes on with what is missing.

Needs `pip install llama-cpp-python` (built from source) beside the package.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import llama
from benchmarks.files import Files, against, dense, files_of
from benchmarks.measure import Kept, table
from benchmarks.stages import Stages
from quadapt.config import ExportConfig, MergeConfig, TuneConfig, checked
from quadapt.data import Collator, encode, pad_token_id, read
from quadapt.evaluate import perplexity
from quadapt.exporters.gguf import export_gguf
from quadapt.exporters.gguf_metadata import family_of, namer
from quadapt.hf.loading import load_model, load_tokenizer
from quadapt.jobs.export import export
from quadapt.jobs.merge import merge
from quadapt.jobs.tune import tune
from quadapt.methods import Recipe, Run
from quadapt.model.select import select
from quadapt.report.ui import UI
from quadapt.train import train

LORA_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
FINISH_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3)
"""Learning rates to search; those of scales and offsets are half of them. A finish after tuning wants lower ones."""

SEQUENCES, EPOCHS = 64, {4: 2, 3: 4, 2: 8}
"""Block-AP: how many calibration sequences, and how often it passes over them at each width."""

METHODS: dict[str, dict[str, Any]] = {
    "recover": {"method": "recover", "keep_targets": False},
    "recover-gptq": {"method": "recover", "rounding": "gptq", "keep_targets": False},
    "l4q": {"method": "l4q"},
    "qa-lora": {"method": "qa-lora"},
    "lota-qaf": {"method": "lota-qaf", "omega": 0.5},
}
"""Ours, each over the grid of llama.cpp's K-quants of its width. `recover-gptq` rounds the tuned model by GPTQ, which
trains nothing: all steps are left for tuning."""

TUNED_FIRST = ("recover", "recover-gptq")


@dataclass(frozen=True)
class Text:
    """The parts of one text, in the order in which it runs: to train on, to choose rates by, and to test on."""

    train: Path
    choose: Path
    test: Path

    @classmethod
    def of(cls, path: str, folder: Path) -> Text:
        """Cut a text: 85 %, 5 % and 10 %, of the last two at most 40,000 characters."""
        text = Path(path).read_text(encoding="utf-8")
        first, second = int(0.85 * len(text)), int(0.9 * len(text))
        parts = {
            "train": text[:first],
            "choose": text[first:second][:40_000],
            "test": text[second:][:40_000],
        }
        for name, part in parts.items():
            (folder / f"{name}.txt").write_text(part, encoding="utf-8")
        return cls(**{name: folder / f"{name}.txt" for name in parts})


class Served:
    """A model and a text; makes files by every route, and measures them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.text = args, folder, Text.of(args.data, folder)
        self.tokenizer = load_tokenizer(args.model)
        self.data = encode(read(str(self.text.train)), self.tokenizer, seq_len=args.length, packing=False)
        test = encode(read(str(self.text.test)), self.tokenizer, seq_len=args.length, packing=False)
        self.windows = [list(ids) for ids in test.data["input_ids"] if len(ids) > 1]
        self.stages = Stages(folder / "stages")

    # --- the usual route ---

    def lora(self, rate: float, seed: int) -> dict[str, Any]:
        """LoRA over the dense model: its loss where rates are chosen, and the dense file's."""
        start = time.process_time()
        model = self._lora(rate, seed)
        found = {"seconds": time.process_time() - start, "choose": self.loss(model)}
        file = self._dense_file(model, rate, seed)
        return {**found, "loss": llama.loss(file, self.windows), "bytes": file.stat().st_size}

    def _lora(self, rate: float, seed: int) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers.trainer_utils import set_seed

        dense = load_model(self.args.model, dtype="float32")
        names = list(select(dense).chosen)
        set_seed(seed)
        about = LoraConfig(r=self.args.rank, lora_alpha=self.args.rank, target_modules=names, task_type="CAUSAL_LM")
        model = get_peft_model(dense, about)  # type: ignore[arg-type]
        recipe = Recipe(learning_rate=rate, rank=self.args.rank, schedule="linear", warmup_ratio=0.1, max_grad_norm=1.0)
        run = Run(
            recipe=recipe, max_steps=self.args.steps, batch_size=self.args.batch, gradient_accumulation=1, seed=seed
        )
        with tempfile.TemporaryDirectory() as folder:
            collate = Collator(pad_token_id(self.tokenizer))
            train(model, self.data.data, replace(run, save_steps=10**6), Path(folder), collate=collate)
        return model.merge_and_unload().eval()  # type: ignore[operator]

    def _dense_file(self, model: Any, rate: float, seed: int) -> Path:
        """The dense GGUF in 16 bits, and the importance of each input beside it."""
        file = self.folder / f"lora-{rate:g}-{seed}.gguf"
        if not file.exists():
            np.savez(file.with_suffix(".npz"), **self._importance(model))
            export_gguf(model.half(), self.tokenizer, file, dense="f16")
        return file

    @torch.no_grad()
    def _importance(self, model: Any) -> dict[str, np.ndarray]:
        """Mean square of the inputs of each matrix over some of the training text, by its name in the file."""
        name_of, sums, handles = namer(family_of(model), model.config.num_hidden_layers), {}, []
        count = [0]

        def watch(name: str) -> Any:
            def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                squares = inputs[0].double().square().flatten(0, -2).sum(0)
                sums[name] = sums.get(name, 0) + squares

            return see

        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                tied = name == "lm_head" and model.config.tie_word_embeddings
                key = "token_embd.weight" if tied else name_of(f"{name}.weight")
                handles.append(layer.register_forward_pre_hook(watch(key)))
        for ids in self.data.data["input_ids"][:SEQUENCES]:
            model(input_ids=torch.tensor([list(ids)]))
            count[0] += len(ids)
        for handle in handles:
            handle.remove()
        return {name: (total / count[0]).float().numpy() for name, total in sums.items()}

    def usual(self, kind: str, weighted: int, rate: float, seed: int) -> dict[str, Any]:
        """The tuned model in one of llama.cpp's mixtures."""
        file, target = self.folder / f"lora-{rate:g}-{seed}.gguf", self.folder / "usual.gguf"
        if not file.exists():
            self._dense_file(self._lora(rate, seed), rate, seed)
        importance = dict(np.load(file.with_suffix(".npz"))) if weighted else None
        try:
            llama.quantize(file, target, kind, importance)
        except llama.RefusedError:
            return {"refused": True}
        return {"loss": llama.loss(target, self.windows), "bytes": target.stat().st_size}

    # --- ours ---

    def ours(self, name: str, bits: int, epochs: int, rate: float, seed: int) -> dict[str, Any]:
        """One run by the commands: tune, merge, export; the certificate's verdict stands beside the loss."""
        more, start = METHODS[name], time.process_time()
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            adapter, merged, file = (str(Path(place) / each) for each in ("adapter", "merged", "model.gguf"))
            first = {"first_learning_rate": self.best_lora()} if name in TUNED_FIRST else {}
            block_ap = {"calibration_epochs": epochs} if epochs else {}
            with self.stages.shared(f"{name}-{bits}-{epochs}-{seed}"):
                said = tune(
                    checked(
                        TuneConfig,
                        {
                            "model": self.args.model,
                            "data": str(self.text.train),
                            "output": adapter,
                            "bits": bits,
                            "scales": "k-quant",
                            "embeddings": self.args.embeddings,
                            "dtype": "float32",
                            "max_steps": self.args.steps - SEQUENCES * epochs // self.args.batch,
                            "batch_size": self.args.batch,
                            "gradient_accumulation": 1,
                            "seed": seed,
                            "seq_len": self.args.length,
                            "rank": self.args.rank,
                            "alpha": self.args.rank,
                            "learning_rate": rate,
                            "grid_learning_rate": rate / 2,
                            "calibration_sequences": SEQUENCES,
                            "calibration_length": self.args.length,
                            "save_steps": 10**6,
                            "schedule": "linear",
                            "warmup_ratio": 0.1,
                            "max_grad_norm": 1.0,
                            **more,
                            **first,
                            **block_ap,
                        },
                    ),
                    UI(quiet=True),
                )
            certificate = merge(checked(MergeConfig, {"adapter": adapter, "output": merged}), UI(quiet=True))
            export(checked(ExportConfig, {"model": merged, "output": file}), UI(quiet=True))
            model = load_model(merged, dtype="float32")
            return {
                "choose": self.loss(model),
                "loss": llama.loss(Path(file), self.windows),
                "bytes": Path(file).stat().st_size,
                "bits": certificate["bits_per_weight"],
                "verdict": certificate["certificate"]["verdict"],
                "steps": said["steps"] + (said.get("tuned_first") or {"steps": 0})["steps"],
                "seconds": time.process_time() - start,
            }

    # --- what is chosen ---

    def loss(self, model: Any) -> float:
        """Loss in torch on the part by which rates are chosen, in nats per token."""
        found = perplexity(model, self.tokenizer, read(str(self.text.choose)), context=self.args.length, batch=32)
        return float(torch.tensor(found.perplexity).log())

    def best_lora(self) -> float:
        """The rate of LoRA that is best on the first seed."""
        return best(self.kept, LORA_RATES, "lora")

    kept: Kept

    def run(self, route: str, *key: Any) -> dict[str, Any]:
        """Make what a key names."""
        return {"lora": self.lora, "usual": self.usual, "ours": self.ours}[route](*key)


def best(kept: Kept, rates: Sequence[float], *key: Any) -> float:
    """The rate of least loss on the first seed, on the part that is for choosing.

    From the middle of the grid downhill, so that few rates are run; it says so where the best lies on an edge.
    """
    at = (len(rates) - 1) // 2
    value = {}

    def of(index: int) -> float:
        if index not in value:
            value[index] = kept.get(*key, rates[index], 0)["choose"]
        return float(value[index])

    while True:
        around = [each for each in (at - 1, at, at + 1) if 0 <= each < len(rates)]
        lowest = min(around, key=of)
        if lowest == at:
            break
        at = lowest
    if at in (0, len(rates) - 1):
        print(f"note: the best rate of {key} is {rates[at]:g}, an edge of the grid", flush=True)
    return rates[at]


def make(served: Served, widths: Sequence[int], names: Sequence[str]) -> None:
    """All files of both routes that are missing."""
    kept, seeds, rate = served.kept, range(served.args.seeds), served.best_lora()
    keys: list[tuple[Any, ...]] = [("lora", rate)]
    for kind in llama.TYPES:
        weights = (1,) if kind in llama.NEEDS_IMPORTANCE else (0, 1)
        keys += [("usual", kind, weighted, rate) for weighted in weights]
    for key in keys:
        for seed in seeds:
            kept.get(*key, seed)
    for name in names:
        for bits in widths:
            own = ("ours", name, bits, EPOCHS[bits] if name == "recover" else 0)
            found = best(kept, FINISH_RATES if name in TUNED_FIRST else RATES, *own)
            for seed in seeds:
                kept.get(*own, found, seed)


def draw(found: Sequence[Files], title: str, path: Path) -> None:
    """Loss against bytes, with the front of each route."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for route in dict.fromkeys(each.route for each in found if each.route != "lora"):
        mine = sorted((each for each in found if each.route == route), key=lambda each: each.megabytes)
        (line,) = axes.plot([each.megabytes for each in mine], [each.loss for each in mine], "o", label=route)
        front = [each for at, each in enumerate(mine) if all(each.loss < other.loss for other in mine[:at])]
        axes.plot([each.megabytes for each in front], [each.loss for each in front], color=line.get_color())
    lora = dense(found)
    axes.axhline(lora.loss, linestyle="--", color="grey", label=f"{lora.label} ({lora.megabytes:.1f} MB)")
    axes.set(xlabel="size of the GGUF file, MB", ylabel="loss in llama.cpp, nats per token", title=title)
    axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Make what is missing, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="text")
    parser.add_argument("--name", help="what results are called; default: the folder of the model")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=232, help="of LoRA; those of Block-AP count among ours")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--embeddings", default="q6_k", choices=("float", "q8_0", "q6_k"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.name = args.name or Path(args.model).name
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    about = {name: getattr(args, name) for name in ("steps", "length", "rank", "embeddings", "batch")}
    about |= {"sequences": SEQUENCES}
    with tempfile.TemporaryDirectory() as folder:
        served = Served(args, Path(folder))
        served.kept = Kept(f"served-{args.name}", about, served.run)
        make(served, args.bits, args.methods)
        found = files_of(served.kept.runs)
    title, name = f"{args.name}, {args.steps} steps", f"served-{args.name}.svg"
    spreads = {each.key: max(each.losses) - min(each.losses) for each in found}
    columns = ("file", "rate", "MB", "loss in llama.cpp", "spread")
    table(title, columns, [(each.label, each.rate, each.megabytes, each.loss, spreads[each.key]) for each in found])
    columns = ("ours", "MB", "loss", "best of the usual route", "ours less its", "ours less LoRA's")
    rows: list[tuple[object, ...]] = []
    for ours, rival in against(found):
        beside = ("none is as small", "") if rival is None else (rival.label, ours.loss - rival.loss)
        rows.append((ours.label, ours.megabytes, ours.loss, *beside, ours.loss - dense(found).loss))
    table("against files that are no larger", columns, rows)
    draw(found, title, Path(__file__).parents[1] / "docs" / "figures" / name)


if __name__ == "__main__":
    main()
