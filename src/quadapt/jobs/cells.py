"""The runs of a comparison: each is tuned, merged and measured by the commands, and what it found is kept in a file."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from quadapt.config import CompareConfig, EvalConfig, MergeConfig, TuneConfig, checked
from quadapt.errors import ConfigError, ExportError, QuadaptError
from quadapt.files import remove, sweep, write_json
from quadapt.hf.loading import read_config
from quadapt.hf.notes import partial_of
from quadapt.hf.reading import read_json
from quadapt.jobs.anchors import DENSE, quantize_as_usual, tune_dense
from quadapt.jobs.evaluate import evaluate
from quadapt.jobs.identity import identity, job_of
from quadapt.jobs.merge import merge
from quadapt.jobs.parts import Parts
from quadapt.jobs.shared import Shared
from quadapt.jobs.source import dense_folder
from quadapt.jobs.tune import tune
from quadapt.report.ui import UI
from quadapt.report.weights import gguf_bits, weights_of

LORA = "lora"
"""The name of the anchor: LoRA over the dense model, in its own precision."""

WHOLE = 16
"""The width that stands for full precision."""

CURVE = 6
"""How often held-out loss is measured in the course of a whole run."""


class Inner(UI):
    """Progress of the commands within a comparison, without what they say."""

    def __init__(self, outer: UI) -> None:
        super().__init__(as_json=True, quiet=outer.quiet)

    def say(self, text: str) -> None:
        """Leave out a message of the inner command."""

    def show(self, text: str) -> None:
        """Leave out a part of the inner command's result."""

    def _lines(self, label: str) -> Any:
        return lambda *_: None


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    method: str
    """The name of the method; `lora` for the anchor in full precision."""

    bits: int
    """The width of codes; 16 for full precision."""

    rate: float
    """The learning rate of the adapter."""

    steps: int
    """How many optimizer steps there are."""

    seed: int
    """The seed of the run."""

    def __str__(self) -> str:
        where = "full precision" if self.bits == WHOLE else f"{self.bits} bits"
        return f"{self.method}, {where}, rate {self.rate:g}, {self.steps} steps, seed {self.seed}"


class Runs:
    """Makes runs, or finds them where an earlier call has made them.

    Args:
        config: The settings of the comparison.
        parts: The parts of the data.
        folder: Where runs are kept: a folder for each, named after what it is and a digest of all that decides on it.
        ui: Where progress is shown.
    """

    def __init__(self, config: CompareConfig, parts: Parts, folder: Path, ui: UI) -> None:
        self.config, self.parts, self.folder, self.ui = config, parts, folder, ui
        self.inner, self.shared = Inner(ui), Shared(folder / "shared")
        self.full = 0
        self.lora_rate: float | None = None
        self.used: dict[Path, float] = {}

    def settings(self, cell: Cell) -> TuneConfig:
        """The settings of `quadapt tune` for a run.

        Raises:
            ConfigError: The method does not have this width, or a further setting is none of the method's.
        """
        given, lora = self.config, cell.method == LORA
        values: dict[str, Any] = {
            "model": given.model,
            "data": [str(self.parts.train)],
            "eval_data": [str(self.parts.choose)],
            "keep": "last",
            "eval_steps": math.ceil(cell.steps / CURVE) if cell.steps == self.full else 0,
            "output": str(self.folder / "adapter"),
            "max_steps": cell.steps,
            "seed": cell.seed,
            **{name: getattr(given, name) for name in ("batch_size", "gradient_accumulation", "seq_len", "rank")},
            **{
                name: getattr(given, name)
                for name in ("dtype", "device", "trust_remote_code", "strict", "max_bad_rows")
            },
            "alpha": given.rank,
            "schedule": "linear",
            "warmup_ratio": 0.1,
            "max_grad_norm": 1.0,
        }
        if lora:
            own = {"method": "recover", "bits": 4, "first_learning_rate": cell.rate}
            return checked(TuneConfig, {**values, **own}, f"{cell.method}: ")
        own = {
            "method": cell.method,
            "bits": cell.bits,
            "learning_rate": cell.rate,
            "grid_learning_rate": cell.rate / 2,
        }
        found = checked(TuneConfig, {**values, **own, **self._further(cell.method)}, f"{cell.method}: ")
        if (
            found.spec.method.tune_first.name == "lora"
            and self.lora_rate
            and found.value("first_learning_rate") is None
        ):
            return checked(TuneConfig, {**found.model_dump(exclude_unset=True), "first_learning_rate": self.lora_rate})
        return found

    def _further(self, method: str) -> dict[str, Any]:
        """Settings that were given for all methods, and those for this one, which go first."""
        found: dict[str, Any] = {}
        for only in (False, True):
            for each in self.config.settings:
                name, _, value = each.partition("=")
                owner, dot, own = name.strip().rpartition(".")
                if bool(dot) == only and owner in ("", method):
                    try:
                        found[own] = yaml.safe_load(value)
                    except yaml.YAMLError:
                        raise ConfigError(f"--set {each!r}: the value is not YAML. Put it in quotes") from None
        return found

    def place(self, cell: Cell) -> Path:
        """The folder of a run."""
        job = job_of("compare", self.settings(cell))
        kept = {name: job[name] for name in ("version", "settings", "inputs")}
        digest = _digest({"method": cell.method, **kept, "choose": identity(str(self.parts.choose))})
        width = "" if cell.bits == WHOLE else f"-{cell.bits}bit"
        return self.folder / f"{cell.method}{width}" / f"rate{cell.rate:g}-steps{cell.steps}-seed{cell.seed}-{digest}"

    def tuned(self, cell: Cell, *, kept: bool = False) -> dict[str, Any]:
        """What training found: `choose`, the loss by which rates are chosen; `curve`, `held_out`, `seconds`, `bits`, ..

        Args:
            cell: The run.
            kept: Whether the adapter itself is needed as well.
        """
        place = self.place(cell)
        note, adapter = place / "tuned.json", place / "adapter"
        if note.exists() and (adapter.exists() or not kept):
            return self._used(place, note)
        self.ui.say(f"{cell} ..")
        place.mkdir(parents=True, exist_ok=True)
        start, work = time.monotonic(), tune_dense if cell.method == LORA else self._tune
        if adapter.exists():  # it was killed between the last step and its note
            remove(adapter)
        try:
            said = work(self.settings(cell).model_copy(update={"output": str(adapter)}), self.inner)
        except ConfigError as error:
            if "the loss is" not in str(error):
                raise
            said = {"eval_loss": None, "losses": [], "diverged": str(error)}
            remove(partial_of(adapter))
        write_json(note, {**training_of(said), "wall": time.monotonic() - start})
        found = self._used(place, note)
        self.ui.say(f"  loss {_number(found['choose'])} where rates are chosen, {found['wall']:.0f} s")
        return found

    def _tune(self, config: TuneConfig, ui: UI) -> dict[str, Any]:
        return tune(config, ui, shared=self.shared)

    def _used(self, place: Path, note: Path) -> dict[str, Any]:
        """What a note holds; the time that its run has taken counts once."""
        found = read_json(note)
        self.used[note] = float(found.get("wall", 0.0))
        return found

    @property
    def spent(self) -> float:
        """Seconds that all runs of this comparison have taken, whenever they were made."""
        return sum(self.used.values())

    def discard(self, cell: Cell) -> None:
        """Remove the weights of a run that was tried and not chosen; its figures stay."""
        place = self.place(cell)
        if (place / "tuned.json").exists():
            for name in ("adapter", "merged"):
                remove(place / name)

    def measured(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """Figures of what a run leads to, by route: `merged`, or `as trained` and `requantized`, or `dense`."""
        place = self.place(cell)
        note = place / f"figures-{self._asked()}.json"
        if not note.exists():
            self.tuned(cell, kept=True)
            sweep(place)
            start = time.monotonic()
            routes = self._routes(cell, place)
            write_json(note, {"routes": routes, "wall": time.monotonic() - start})
            if cell.seed and cell.method != LORA:  # of the anchor, files of few bits are made yet
                self.discard(cell)
        return dict(self._used(place, note)["routes"])

    def _routes(self, cell: Cell, place: Path) -> dict[str, dict[str, Any]]:
        adapter, merged = place / "adapter", place / "merged"
        if cell.method == LORA:
            dense = adapter / DENSE
            return {
                "dense": {
                    **self._eval(dense),
                    "bits": _dense_bits(str(dense), self.config.trust_remote_code),
                    "bytes": _bytes(dense),
                }
            }
        stored = self.tuned(cell)["bits"]
        if self.settings(cell).spec.method.adapter.exactness != "none":
            return {"merged": self._merged(adapter, merged, cell, requantize=False)}
        size = _bytes(adapter) + _bytes(adapter / "base")
        trained = {**self._eval(adapter), "bits": stored["with_adapter"], "bytes": size}
        return {"as trained": trained, "requantized": self._merged(adapter, merged, cell, requantize=True)}

    def _merged(self, adapter: Path, merged: Path, cell: Cell, *, requantize: bool) -> dict[str, Any]:
        remove(merged)
        shared = {name: getattr(self.config, name) for name in ("dtype", "device", "trust_remote_code")}
        values = {"adapter": str(adapter), "output": str(merged), "requantize": requantize, **shared}
        said = merge(checked(MergeConfig, values), self.inner)
        certificate = {name: value for name, value in said["certificate"].items() if name not in ("layers", "probe")}
        certificate["codes_changed"] = sum(layer["codes_changed"] for layer in said["certificate"]["layers"])
        found = {
            **self._eval(merged),
            "bits": said["bits"]["merged"],
            "bytes": _bytes(merged),
            "certificate": certificate,
        }
        if cell.seed == 0:
            base = adapter / "base"
            quantized = base.exists() and "quantization_config" in read_json(base / "config.json")
            code = self.config.trust_remote_code
            found |= weights_of(
                self.config.model, str(merged), str(base) if quantized else None, trust_remote_code=code
            )
        return found

    def usual(self, lora: Cell, bits: int) -> dict[str, Any]:
        """Figures of the usual route from a run of the anchor; where it does not go, `refused` says why."""
        place = self.place(lora)
        note, file = place / f"usual-{bits}bit-{self._asked()}.json", place / f"usual-{bits}bit.gguf"
        if not note.exists():
            self.measured(lora)
            start = time.monotonic()
            if not (place / "adapter").exists():
                self.tuned(lora, kept=True)
            try:
                kind = quantize_as_usual(place / "adapter" / DENSE, file, bits)
                found = {**self._eval(file), "bits": gguf_bits(file), "bytes": file.stat().st_size, "mixture": kind}
            except ExportError as error:
                found = {"refused": str(error)}
            write_json(note, {**found, "wall": time.monotonic() - start})
            remove(file)
        return self._used(place, note)

    def untuned(self) -> dict[str, Any]:
        """Figures of the model as it was given."""
        note = self.folder / f"untuned-{self._asked()}.json"
        if not note.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            given = dense_folder(self.config.model)
            sizes = {"bits": _dense_bits(given.name, self.config.trust_remote_code), "bytes": _bytes(given.path)}
            write_json(note, {**self._eval(self.config.model), **sizes, "wall": time.monotonic() - start})
        return self._used(self.folder, note)

    def _asked(self) -> str:
        """A digest of what figures depend on beside the model that is measured."""
        job = job_of("compare", self._asking(self.config.model))
        return _digest({name: job[name] for name in ("settings", "inputs")})

    def _asking(self, model: Path | str) -> EvalConfig:
        given = self.config
        shared = {name: getattr(given, name) for name in ("dtype", "device", "trust_remote_code", "batch_size")}
        values = {"model": str(model), "data": [str(self.parts.test)], "samples": given.samples, **shared}
        return checked(EvalConfig, {**values, "context": given.seq_len})

    def _eval(self, model: Path | str) -> dict[str, Any]:
        """Figures on the part that is reported on."""
        return figures_of(evaluate(self._asking(model), self.inner))


def figures_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a page shows of what `quadapt eval` has said: loss, share of exact answers, samples."""
    match = said.get("exact_match")
    return {
        "loss": said["perplexity"]["loss"],
        "tokens": said["perplexity"]["tokens"],
        "exact": None if match is None else match["accuracy"],
        "samples": (match or said).get("samples", []),
    }


def training_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a page shows of what `quadapt tune` has said; steps of a tuning that came first count on."""
    first = said.get("tuned_first") or {}
    logs = [(0, first.get("losses") or [])] if first else []
    logs.append((int(first.get("steps", 0)), said.get("losses") or []))
    curve = [[begun + log["step"], log["loss"]] for begun, logged in logs for log in logged if "loss" in log]
    held_out = [
        [begun + log["step"], log["eval_loss"]] for begun, logged in logs for log in logged if "eval_loss" in log
    ]
    return {
        "choose": said.get("eval_loss"),
        "curve": curve,
        "held_out": held_out,
        "seconds": said.get("seconds", 0.0) + first.get("seconds", 0.0),
        "peak_memory": said.get("peak_memory"),
        "trainable_parameters": said.get("trainable_parameters"),
        "bits": said.get("bits"),
        "diverged": said.get("diverged", ""),
    }


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]


def _dense_bits(name: str, trust_remote_code: bool = False) -> float:
    """Bits of a weight of a dense model, as it lies on the disk."""
    dtype = getattr(read_config(name, trust_remote_code=trust_remote_code), "dtype", None)
    return float(8 * dtype.itemsize) if isinstance(dtype, torch.dtype) else float(WHOLE)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def possible(runs: Runs, cell: Cell) -> str:
    """Why a run cannot be; empty if it can."""
    try:
        _ = runs.settings(cell).spec
    except QuadaptError as error:
        return str(error)
    return ""
