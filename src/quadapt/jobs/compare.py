"""`quadapt compare`: methods and widths beside each other, each with the learning rate that suits it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock

from quadapt.config import CompareConfig
from quadapt.data import encode, read
from quadapt.errors import ConfigError, MissingDependency, require
from quadapt.exporters.llama_quantize import quantizer
from quadapt.files import sweep, write_json, writing
from quadapt.hf.context import positions_of
from quadapt.hf.kinds import kind_of
from quadapt.hf.loading import load_tokenizer, read_config
from quadapt.hf.notes import NOTE
from quadapt.hf.outputs import check_disk
from quadapt.hf.reading import read_json
from quadapt.jobs import dry
from quadapt.jobs.cells import LORA, WHOLE, Cell, Runs, possible
from quadapt.jobs.identity import job_of
from quadapt.jobs.parts import parts_of
from quadapt.jobs.source import check_writes, dense_folder, versions
from quadapt.jobs.tune import MOST_LENGTH
from quadapt.methods import METHODS
from quadapt.report.choice import recommended
from quadapt.report.ui import UI

RESULT, PAGE = "compare.json", "index.html"
"""Names of the files with the figures, and of the page that shows them."""

PILOT, FEWEST, PASSES = 4, 8, 3
"""Steps of a trial run; the fewest steps that a comparison makes; the most passes over the data that a budget buys."""

MORE_RATES = 4
"""How many rates beyond the given ones are tried, as long as the best lies at the edge."""

_SETS_STEPS = (
    "budget_minutes",
    "max_steps",
    "batch_size",
    "gradient_accumulation",
    "seq_len",
    "rank",
    "device",
    "dtype",
)


def compare(config: CompareConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt compare` and return its figures.

    Raises:
        QuadaptError: Input cannot be used, the budget is too small, or the page cannot be made; see the message.
    """
    if config.page:
        require("plotly", "report")
    dense_folder(config.model)
    about = read_config(config.model, trust_remote_code=config.trust_remote_code)
    check_writes(kind_of(about), config.model, "compare")
    for name in config.methods:
        if name not in METHODS:
            _ = METHODS[name]  # says what there is
    folder = Path(config.output)
    _check(folder)
    check_disk(folder, 0)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            return _compared(config, folder, ui)
    except filelock.Timeout:
        raise ConfigError(
            f"another quadapt is at work in {config.output!r}. Wait for it, or use another --output"
        ) from None


def _check(folder: Path) -> None:
    """Raise ConfigError unless the folder is new, empty or of an earlier comparison."""
    if folder.is_dir() and any(item.name != ".lock" for item in folder.iterdir()):
        note = read_json(folder / NOTE) if (folder / NOTE).exists() else {}
        if note.get("kind") != "comparison":
            raise ConfigError(f"output={str(folder)!r} exists and is no comparison. Use another --output")


def _compared(config: CompareConfig, folder: Path, ui: UI) -> dict[str, Any]:
    sweep(folder)
    write_json(folder / NOTE, {"kind": "comparison"})
    runs = Runs(config, parts_of(config, folder / "data"), folder / "runs", ui)
    rate = float(config.rates[0])
    cells = [(name, bits) for bits in config.widths for name in config.methods]
    left_out = {cell: possible(runs, Cell(*cell, rate, FEWEST, 0)) for cell in cells}
    for (name, bits), why in left_out.items():
        if why:
            ui.say(f"left out: {name} at {bits} bits: {why}")
    cells = [cell for cell in cells if not left_out[cell]]
    if not cells:
        raise ConfigError(next(iter(left_out.values())))
    said = [f"{name} at {bits} bits: {why}" for (name, bits), why in left_out.items() if why]
    plan = _plan(config, runs, cells, folder / "plan.json", ui)
    runs.full = plan["steps"]
    found = _Grid(config, runs, plan["steps"], ui)
    points = found.points(cells, plan["seeds"], said)
    result = {
        "kind": "quadapt comparison",
        "model": Path(config.model).name if Path(config.model).exists() else config.model,
        "data": list(config.data),
        "steps": plan["steps"],
        "seeds": max(len(point["losses"]) for point in points),
        "batch": config.batch_size * config.gradient_accumulation,
        "rank": config.rank,
        "budget_minutes": config.budget_minutes,
        "spent_seconds": runs.spent,
        "versions": versions(),
        "points": points,
        "search": found.trails,
        "left_out": said,
        "tolerance": config.tolerance,
        "recommendation": recommended(points, config.tolerance),
    }
    write_json(folder / RESULT, result)
    ui.table("on test data", _COLUMNS, [_row(point) for point in points])
    ui.show(result["recommendation"]["words"])
    if config.page:
        from quadapt.report.page import page

        with writing(folder / PAGE) as temporary:
            temporary.write_text(page(result), encoding="utf-8")
        ui.say(f"wrote {folder / PAGE}")
    return {"output": config.output, **{name: value for name, value in result.items() if name != "search"}}


# --- how many steps -------------------------------------------------------------------------------------------------


def _plan(config: CompareConfig, runs: Runs, cells: Sequence[tuple[str, int]], path: Path, ui: UI) -> dict[str, Any]:
    """Steps and seeds of the comparison: as given, or as trial runs say; decided once for a budget and the data."""
    job = job_of("compare", config)
    about = {"settings": {name: job["settings"].get(name) for name in _SETS_STEPS}, "inputs": job["inputs"]}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    if config.max_steps and config.budget_minutes is None:
        return {"steps": config.max_steps, "seeds": config.seeds}
    if path.exists():
        found = read_json(path)
        if found.get("key") == key:
            return {**found, "seeds": config.seeds}
    sequences = _sequences(config, runs)
    per_pass = math.ceil(sequences / (config.batch_size * config.gradient_accumulation))
    plan: dict[str, Any] = {"key": key, "steps": config.max_steps or per_pass}
    if config.budget_minutes is not None and not config.max_steps:
        steps = _affordable(config, runs, cells, 60 * config.budget_minutes)
        plan["steps"] = min(steps, PASSES * per_pass)
        ui.say(f"{plan['steps']} steps for each run, by trial runs of {PILOT} steps")
    write_json(path, plan)
    return {**plan, "seeds": config.seeds}


def _sequences(config: CompareConfig, runs: Runs) -> int:
    """How many sequences the part to train on makes."""
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    model = dry.sketch(config.model, runs.settings(Cell(LORA, WHOLE, 1e-3, FEWEST, 0))).model
    length = config.seq_len or min(positions_of(model), MOST_LENGTH)
    return len(encode(read(str(runs.parts.train)), tokenizer, seq_len=length, packing=False).data)


def _affordable(config: CompareConfig, runs: Runs, cells: Sequence[tuple[str, int]], seconds: float) -> int:
    """The steps for each run with which the whole grid fits into so many seconds.

    Raises:
        ConfigError: Not even the fewest do.
    """
    runs.full = PILOT
    middle = float(sorted(config.rates, key=float)[len(config.rates) // 2])
    runs.lora_rate = middle
    rungs = halving(len(config.rates))
    in_steps = sum(count * share for count, share in rungs) + config.seeds - 1
    tunings = sum(count for count, _ in rungs) + config.seeds - 1
    fixed, each = runs.untuned()["wall"], 0.0
    for name, bits in [(LORA, WHOLE), *{name: (name, bits) for name, bits in cells}.values()]:
        cell = Cell(name, bits, middle, PILOT, 0)
        tuned = runs.tuned(cell)
        before = runs.spent
        runs.measured(cell)
        widths = 1 if name == LORA else sum(other == name for other, _ in cells)
        fixed += widths * (tunings * (tuned["wall"] - tuned["seconds"]) + config.seeds * (runs.spent - before))
        each += widths * in_steps * tuned["seconds"] / PILOT
        runs.discard(cell)
    runs.lora_rate = None
    steps = math.floor((seconds - runs.spent - fixed) / each)
    if steps < FEWEST:
        least = math.ceil((runs.spent + fixed + FEWEST * each) / 60)
        raise ConfigError(
            f"budget_minutes={config.budget_minutes:g}: {FEWEST} steps for each run take {least} minutes here. Use "
            f"--budget-minutes {least} or more, or fewer --methods, --bits, --rates or --seeds"
        )
    return steps


def halving(count: int) -> list[tuple[int, float]]:
    """How many rates each round of successive halving tries, and on which share of the steps; the last tries one."""
    rounds = max(0, count.bit_length() - 1)
    return [(max(1, count >> turn), 1 / 2 ** (rounds - turn)) for turn in range(rounds + 1)]


# --- the grid -------------------------------------------------------------------------------------------------------


_Run = tuple[dict[str, Any], dict[str, Any]]
"""What the training of a run has found, and the figures of the models that came of it, by route."""


class _Grid:
    """All runs of a comparison, in the order in which they tell most."""

    def __init__(self, config: CompareConfig, runs: Runs, steps: int, ui: UI) -> None:
        self.config, self.runs, self.steps, self.ui = config, runs, steps, ui
        self.trails: list[dict[str, Any]] = []

    def points(self, cells: Sequence[tuple[str, int]], seeds: int, left_out: list[str]) -> list[dict[str, Any]]:
        """Every model of the comparison, anchors first; what is left out is added to the list of words."""
        runs = self.runs
        untuned = runs.untuned()
        lora = self._chosen(LORA, WHOLE)
        runs.lora_rate = lora.rate
        chosen = [lora, *(self._chosen(*cell) for cell in cells)]
        usual, made, files = self._usual(left_out), list[list[_Run]](), list[dict[int, dict[str, Any]]]()
        for seed in range(seeds):
            if seed and self.config.budget_minutes and runs.spent > 60 * self.config.budget_minutes:
                left_out.append(f"seed {seed} and those after it, since the time was spent")
                break
            seeded = [replace(cell, seed=seed) for cell in chosen]
            made.append([(runs.tuned(cell), runs.measured(cell)) for cell in seeded])
            files.append({bits: runs.usual(seeded[0], bits) for bits in usual})
            if seed:
                runs.discard(seeded[0])
        points = [_point("untuned", "the model as it was given", [untuned])]
        for at, cell in enumerate(chosen):
            points += [_routed(cell, route, [row[at] for row in made]) for route in made[0][at][1]]
        for bits in usual:
            points += _by_llama(bits, [row[bits] for row in files], left_out)
        return points

    def _usual(self, left_out: list[str]) -> tuple[int, ...]:
        """The widths that llama.cpp's quantizer is asked for."""
        if not self.config.usual:
            return ()
        try:
            quantizer()
        except MissingDependency as error:
            left_out.append(f"the usual route: {error}")
            self.ui.say(f"left out: the usual route: {error}")
            return ()
        return self.config.widths

    def _chosen(self, method: str, bits: int) -> Cell:
        """The run with the best rate, by successive halving; beyond the given rates where the best is at the edge."""
        rates = sorted({float(rate) for rate in self.config.rates})
        trail: dict[float, dict[str, Any]] = {}
        alive, last = rates, Cell(method, bits, rates[0], self.steps, 0)
        rounds = halving(len(rates))
        for turn, (_, share) in enumerate(rounds):
            steps = max(2, math.ceil(self.steps * share))
            tried = {rate: Cell(method, bits, rate, steps, 0) for rate in alive}
            losses = {rate: self._loss(cell, trail) for rate, cell in tried.items()}
            if turn == 0 and len(rates) > 1:
                self._beyond(method, bits, steps, losses, trail)
            alive = sorted(losses, key=lambda rate: (losses[rate], rate))[
                : rounds[turn + 1][0] if turn + 1 < len(rounds) else 1
            ]
            last = Cell(method, bits, alive[0], steps, 0)
            for rate in losses:
                if rate not in alive or steps != self.steps:
                    self.runs.discard(Cell(method, bits, rate, steps, 0))
        if losses[last.rate] == math.inf:
            raise ConfigError(
                f"{method} at {bits} bits: training diverged with every rate that was tried. Give lower --rates, or "
                "--dtype float32"
            )
        name = "LoRA in full precision" if method == LORA else f"{method}, {bits} bits"
        self.trails.append({"label": name, "rate": last.rate, "tried": list(trail.values())})
        return last

    def _loss(self, cell: Cell, trail: dict[Any, Any]) -> float:
        found = self.runs.tuned(cell)["choose"]
        trail[cell.rate, cell.steps] = {"rate": cell.rate, "steps": cell.steps, "choose": found}
        return math.inf if found is None else float(found)

    def _beyond(self, method: str, bits: int, steps: int, losses: dict[float, float], trail: dict[Any, Any]) -> None:
        """Try further rates as long as the best one is the largest or the smallest; adds them to `losses`."""
        ordered = sorted(losses)
        ratio = (ordered[-1] / ordered[0]) ** (1 / (len(ordered) - 1))
        for _ in range(MORE_RATES):
            best = min(losses, key=lambda rate: (losses[rate], rate))
            if best not in (min(losses), max(losses)):
                return
            rate = float(f"{best * ratio if best == max(losses) else best / ratio:.2g}")
            losses[rate] = self._loss(Cell(method, bits, rate, steps, 0), trail)


# --- what is said of a model ----------------------------------------------------------------------------------------


def _by_llama(bits: int, figures: Sequence[dict[str, Any]], left_out: list[str]) -> list[dict[str, Any]]:
    """The model of the usual route at a width; none, and a word, where llama.cpp refuses it."""
    if "refused" in figures[0]:
        left_out.append(f"the usual route to {bits} bits: {figures[0]['refused']}")
        return []
    return [{**_point("usual", f"LoRA, then llama.cpp's {figures[0]['mixture']}", figures), "width": bits}]


def _routed(cell: Cell, route: str, found: Sequence[_Run]) -> dict[str, Any]:
    """A model by the run that it comes from and its route."""
    labels = {"dense": "LoRA in full precision", "merged": f"{cell.method}, {cell.bits} bits"}
    label = labels.get(route, f"{cell.method}, {cell.bits} bits, {route}")
    tuned = [each for each, _ in found]
    point = _point(route, label, [figures[route] for _, figures in found])
    return {
        **point,
        "method": cell.method,
        "width": None if cell.bits == WHOLE else cell.bits,
        "rate": cell.rate,
        "choose": [each["choose"] for each in tuned],
        "seconds": sum(each["seconds"] for each in tuned) / len(tuned),
        "peak_memory": max(each["peak_memory"] for each in tuned),
        "curve": tuned[0]["curve"],
        "held_out": tuned[0]["held_out"],
    }


def _point(route: str, label: str, figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A model by its figures, which are of several seeds; what is no number is of the first."""
    first = figures[0]
    losses = [each["loss"] for each in figures]
    exact = [each["exact"] for each in figures if each["exact"] is not None]
    return {
        "key": label,
        "label": label,
        "route": route,
        "bits": first["bits"],
        "bytes": first["bytes"],
        "losses": losses,
        "loss": sum(losses) / len(losses),
        "exact": sum(exact) / len(exact) if exact else None,
        "tokens": first["tokens"],
        "samples": first["samples"],
        **{name: first[name] for name in ("certificate", "layers", "codes") if name in first},
    }


_COLUMNS = ("model", "true bits", "MB", "loss", "spread", "exact", "rate", "seconds")


def _row(point: dict[str, Any]) -> tuple[object, ...]:
    return (
        point["label"],
        f"{point['bits']:.2f}",
        f"{point['bytes'] / 1e6:.2f}" if point["bytes"] else "",
        f"{point['loss']:.4f}",
        f"{max(point['losses']) - min(point['losses']):.4f}",
        "" if point["exact"] is None else f"{point['exact']:.1%}",
        f"{point['rate']:g}" if "rate" in point else "",
        f"{point['seconds']:.0f}" if "seconds" in point else "",
    )
