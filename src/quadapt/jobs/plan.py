"""`quadapt plan`: which layer gets how many bits, so that the whole fits a budget and errs least.

The table of errors takes time, the plan made from it seconds. So every matrix's row of the table is kept in a folder,
`plan-errors` beside the output unless `cache` says otherwise: an interrupted run goes on there, and another budget for
the same model and method is a matter of seconds. A file's name is the digest of all that its numbers depend on.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quadapt.budget import BudgetPlan, Candidate, Option, adapter_bits, candidates, measure, solve
from quadapt.budget.table import GAIN, MORE_TURNS, TOLERANCE, TURNS
from quadapt.config import PlanConfig
from quadapt.errors import CalibrationError, CheckpointError, ConfigError, locate
from quadapt.files import sweep
from quadapt.hf.folder import Folder
from quadapt.hf.loading import load_model
from quadapt.hf.workspace import Workspace, check_disk, check_output, write_json
from quadapt.jobs.identity import earlier_job, inputs_of, job_of
from quadapt.jobs.source import Place, dense_folder, device_of, within_memory
from quadapt.jobs.statistics import statistics_for
from quadapt.jobs.tasking import calibrated_on
from quadapt.methods import Method, method_named
from quadapt.model.select import select
from quadapt.quant.weight import hash_tensor
from quadapt.report import memory
from quadapt.report.plan import draw, show_plan
from quadapt.report.ui import UI
from quadapt.statistics import FISHER

BYTES_PER_WEIGHT = 40
"""Memory for measuring a matrix: the dense one, what is left of it, products and what torch needs between."""


def plan(config: PlanConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt plan` and return a summary of the plan.

    Raises:
        QuadaptError: Input cannot be used, or the budget is too small; see the message.
    """
    folder, device, chosen = dense_folder(config.model), device_of(config), method_named(config.method)
    more = set(chosen.start.needs) - {"fisher"}
    if more:
        raise ConfigError(
            f"method={config.method!r} starts from {', '.join(sorted(more))}, which plan does not gather. Plan for "
            "lq-lora or qlora"
        )
    output = Path(config.output)
    if output.suffix == ".png":
        raise ConfigError(f"output={config.output!r}: the figure beside the plan has that name. Use --output plan.json")
    check_output(output, overwrite=config.overwrite, inputs=inputs_of(config), folder=False)
    check_disk(output.parent, 0)
    places = {path.name: path for path in (output, output.with_suffix(".png"))}
    job = job_of("plan", config, earlier_job(output))
    with Workspace(output, job, overwrite=config.overwrite, keeps=False, places=places, folder=False) as space:
        if space.finished is not None:
            return space.finished
        found = _found(config, folder, device, chosen, ui)
        made = space.path / output.name
        write_json(made, {**found.as_json(), "fisher": config.fisher})
        show_plan(found, ui)
        drawn = str(output.with_suffix(".png")) if draw(found, made.with_suffix(".png"), ui) else None
        result = {name: value for name, value in found.as_json().items() if name != "layers"}
        result = {"output": config.output, "figure": drawn, **result, "layers": len(found.layers)}
        space.commit(result=result)
    ui.say(f"wrote {config.output}. Next: quadapt quantize {config.model} --plan {config.output} --output FOLDER")
    return result


def _found(config: PlanConfig, folder: Folder, device: str, chosen: Method, ui: UI) -> BudgetPlan:
    """Measure what is not in the table yet, and choose."""
    ways, rank = candidates(chosen), config.value("rank") or chosen.recipe.rank
    measured = rank if chosen.start.fits else 0
    model = load_model(folder.name, dtype="auto", device="cpu", trust_remote_code=config.trust_remote_code)
    linears = select(model, target_modules=config.target_modules, skip=config.skip).chosen
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    _check_budget(config, chosen, ways, shapes, rank)
    fisher = _fisher(config, model, linears, device, ui)
    table = _Table(chosen, ways, measured, fisher, _cache(config), device)
    errors = table.fill(linears, ui)
    options = {
        name: [replace(each, bits=each.bits + _extra(config, chosen, each, shapes[name], rank)) for each in row]
        for name, row in errors.items()
    }
    weights = sum(out * columns for out, columns in shapes.values())
    with _silent_stdout():
        solution = solve(options, int(config.budget * weights))
    return BudgetPlan.of(
        solution,
        shapes,
        method=config.method,
        model={"name": folder.name, "weights": table.digest},
        budget=config.budget,
        rank=measured,
        adapters=config.count_adapters,
    )


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Nothing reaches the process's stdout: HiGHS leaves a line of its own there, between a program and its JSON."""
    flush = ctypes.CDLL(None).fflush  # C's own buffer, which would be written out later
    sys.stdout.flush()
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _extra(config: PlanConfig, chosen: Method, option: Option, shape: tuple[int, int], rank: int) -> int:
    """Bits of the adapter over a matrix, if they count."""
    if config.count_adapters is None:
        return 0
    return adapter_bits(chosen, option.candidate.layout(*shape), rank, config.count_adapters)


def _check_budget(
    config: PlanConfig, chosen: Method, ways: Sequence[Candidate], shapes: Mapping[str, tuple[int, int]], rank: int
) -> None:
    """Raise ConfigError before any work if nothing fits the budget."""
    least = 0
    for shape in shapes.values():
        sizes = (way.layout(*shape).bits + _extra(config, chosen, Option(way, 0, 0.0), shape, rank) for way in ways)
        least += min(sizes)
    weights = sum(out * columns for out, columns in shapes.values())
    if least > int(config.budget * weights):
        counted = f", adapters of rank {rank} as {config.count_adapters} included" if config.count_adapters else ""
        raise ConfigError(
            f"budget={config.budget:g}: these layers take at least {_up(least / weights)} bits per weight{counted}. "
            "Raise the budget"
        )


def _up(bits: float) -> str:
    """Rounded up to a number that is a feasible budget."""
    return f"{int(bits * 1000 + 1) / 1000:.3f}"


def _cache(config: PlanConfig) -> Path:
    folder = Path(config.cache) if config.cache else Path(config.output).parent / "plan-errors"
    check_disk(folder.parent, 0)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"cache={str(folder)!r} is a file. Name a folder with --cache")
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    return folder


Fisher = Callable[[str], Mapping[str, Tensor]]
"""Fisher information of a layer, as statistics; empty if none is asked for."""


def _fisher(config: PlanConfig, model: nn.Module, linears: Mapping[str, nn.Linear], device: str, ui: UI) -> Fisher:
    """Fisher information from a file, or gathered on text."""
    if config.fisher is None:
        return lambda _: {}
    if Path(config.fisher).suffix == ".safetensors":
        return _from_file(config.fisher, linears)
    text = calibrated_on([config.fisher], config.model, model, config)
    with within_memory(Place(device, "cpu")):
        files = statistics_for({FISHER}, config.model, model, linears, text.batches, ui, device)
    assert files is not None
    return files.__getitem__


def _from_file(name: str, linears: Mapping[str, nn.Linear]) -> Fisher:
    if not Path(name).is_file():
        raise CheckpointError(f"fisher={name!r} does not exist. It is a safetensors file, a tensor for each layer")
    try:
        with safe_open(name, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise CheckpointError(f"{name}: is damaged, or not safetensors ({error})") from error
    for layer, linear in linears.items():
        shape = tuple(linear.weight.shape)
        if shapes.get(layer) != shape:
            have = f"is {shapes[layer]}" if layer in shapes else "is missing"
            raise CalibrationError(f"{name}: {layer} {have}, the weight is {shape}. Gather it on this very model")

    def of(layer: str) -> Mapping[str, Tensor]:
        with safe_open(name, framework="pt") as file:
            return {FISHER: file.get_tensor(layer).float()}

    return of


class _Table:
    """Errors of all layers: from the cache, or measured, several matrices at once."""

    def __init__(
        self, chosen: Method, ways: Sequence[Candidate], rank: int, fisher: Fisher, cache: Path, device: str
    ) -> None:
        self.method, self.ways, self.rank, self.fisher, self.cache, self.device = (
            chosen,
            ways,
            rank,
            fisher,
            cache,
            device,
        )
        self.digest = ""
        settings = [asdict(way) for way in ways], repr(chosen.start), repr(chosen.rounding), rank
        self._settings = json.dumps([*settings, TURNS, MORE_TURNS, TOLERANCE, GAIN], sort_keys=True)

    def fill(self, linears: Mapping[str, nn.Linear], ui: UI) -> dict[str, list[Option]]:
        """A row of the table for every layer, with progress. Large matrices go first: the end is not one of them."""
        largest = max(linear.weight.numel() for linear in linears.values())
        workers, threads = self._workers(largest), torch.get_num_threads()
        order = sorted(linears, key=lambda name: -linears[name].weight.numel())
        found: dict[str, tuple[str, list[Option]]] = {}
        pool = ThreadPoolExecutor(workers, "plan", initializer=torch.set_num_threads, initargs=(threads // workers,))
        try:
            with ui.working("measuring") as tick:
                waiting: dict[Future[tuple[str, list[Option]]], str] = {
                    pool.submit(self._row, name, linears[name].weight.detach()): name for name in order
                }
                while waiting:
                    tick(len(found), len(linears))
                    done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                    for future in done:
                        found[waiting.pop(future)] = future.result()
                tick(len(found), len(linears))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # new threads would inherit what the workers have set
        lines = "".join(f"{name}:{found[name][0]}\n" for name in sorted(found))
        self.digest = hashlib.sha256(lines.encode()).hexdigest()
        return {name: found[name][1] for name in linears}

    def _workers(self, largest: int) -> int:
        """How many matrices to measure at once: as many as there are threads and as fit into memory; one on a GPU."""
        if self.device != "cpu":
            return 1
        _, available = memory.machine_bytes(self.device)
        return max(1, min(torch.get_num_threads(), available // (BYTES_PER_WEIGHT * largest)))

    def _row(self, name: str, weight: Tensor) -> tuple[str, list[Option]]:
        """Digest of a matrix, and its row."""
        statistics = self.fisher(name)
        state = hashlib.sha256(f"{weight.dtype}{tuple(weight.shape)}".encode())
        hash_tensor(state, weight)
        digest = state.hexdigest()
        state.update(self._settings.encode())
        for tensor in statistics.values():
            hash_tensor(state, tensor)
        file = self.cache / f"{state.hexdigest()[:32]}.json"
        kept = self._kept(file, weight)
        if kept is not None:
            return digest, kept
        moved = {key: tensor.to(self.device) for key, tensor in statistics.items()}
        with locate(name), torch.no_grad():
            row = measure(weight.to(self.device), self.ways, self.method, rank=self.rank, statistics=moved)
        at = {way: index for index, way in enumerate(self.ways)}
        write_json(file, {"layer": name, "errors": {str(at[each.candidate]): each.error for each in row}})
        return digest, row

    def _kept(self, file: Path, weight: Tensor) -> list[Option] | None:
        """A row that an earlier run has measured; a damaged file counts as none."""
        try:
            errors = json.loads(file.read_text(encoding="utf-8"))["errors"]
            ways = {self.ways[int(index)]: float(error) for index, error in errors.items()}
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None
        return [Option(way, way.layout(*weight.shape).bits, error) for way, error in ways.items()] or None
