"""Quantize a model in place, block by block, keeping each finished block so that an interrupted run can go on.

Float weights are read where they lie (a checkpoint that is mapped into memory is paged in and out by the system), one
layer at a time; a finished block is handed to a :class:`Keeper`, which may put it on disk and give back tensors mapped
from there.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from quadapt.calibrate import BlockWalk
from quadapt.errors import ConfigError, locate
from quadapt.model.select import find_blocks, matches
from quadapt.nn.block_ap import BlockAP, BlockAPLinear
from quadapt.nn.quant_linear import QuantLinear
from quadapt.nn.starts import Begun, Start, Zero
from quadapt.nn.starts.fit import objective
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest, Rounding, ScaleUnderflow, Statistics
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """What became of one layer; a row of the report."""

    name: str
    """Full name of the layer."""

    out: int
    """Output features."""

    columns: int
    """Input features."""

    format: str
    """Short name of the grid, and the rounding if it is not the one asked for."""

    bits_per_weight: float
    """True bits per weight, all stored bytes counted."""

    error: float
    """Relative error of the weights: norm of the change over norm of the weights."""

    seconds: float
    """Time it took."""

    note: str = ""
    """What was done other than asked, and why."""

    block_error: tuple[float, float] | None = None
    """Where a block is quantized as a whole: relative error of its output on held-out text, before and after."""

    start_error: tuple[float, float] | None = None
    """Where training starts from more than the quantized weight: relative error of the layer's output (of the weight,
    where no second moment is known), without and with the start."""


@dataclass(frozen=True)
class Done:
    """A finished unit: a block, or what lies outside the blocks."""

    weights: dict[str, QuantWeight]
    """Quantized matrices, by layer."""

    rows: list[LayerRow]
    """What became of each layer."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """`up` and `down` that training starts from, by layer, where a start gave some (`nn/starts`)."""


class Keeper(Protocol):
    """Where finished blocks go."""

    def find(self, unit: str) -> Done | None:
        """A unit that an earlier run finished, or None."""

    def keep(self, unit: str, done: Done) -> Done:
        """Keep a finished unit; return what to go on with."""


class InMemory:
    """A keeper that keeps nothing but the model itself."""

    def find(self, unit: str) -> None:
        return None

    def keep(self, unit: str, done: Done) -> Done:
        return done


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How each layer is to be quantized."""

    format: Format
    """The grid."""

    storage: Storage
    """How scales and offsets are held."""

    rounding: Rounding
    """From weights to codes."""

    layers: Mapping[str, tuple[Format, Storage]] = field(default_factory=dict)
    """Layers that have a grid and storage of their own, by name."""

    start: Start = field(default_factory=Zero)
    """Where an adapter over the quantized layers starts."""

    rank: int = 0
    """Of that adapter."""

    pooled: bool = False
    """Whether that adapter sees inputs summed over groups: its start is folded into the offsets."""

    adapted: Sequence[str] = ()
    """Layers that get the adapter, by name or a part of it; empty for all. The others start at zero."""

    def __post_init__(self) -> None:
        if self.rounding.scope == "block" and not isinstance(self.start, Zero):
            raise ConfigError(
                f"start={self.start.name!r} fits what rounding changed about a matrix; {self.rounding.name} trains the "
                "matrix itself. Use start='zero', or another rounding"
            )

    def layout(self, name: str, out: int, columns: int) -> Layout:
        """Layout of the layer `name`."""
        format, storage = self.layers.get(name, (self.format, self.storage))
        return Layout(format=format, storage=storage, out=out, columns=columns)

    @property
    def needs_data(self) -> bool:
        """Whether the rounding needs calibration data."""
        return bool(self.rounding.needs)

    @property
    def needs_text(self) -> bool:
        """Whether the rounding or the start does."""
        return bool(self.rounding.needs | self.start.needs)


Progress = Callable[[Sequence[str]], Iterator[str]]
"""Wraps the names of the units to work on, like `tqdm`."""


def quantize_model(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    plan: Plan,
    *,
    batches: Sequence[Tensor] = (),
    statistics: Mapping[str, Statistics] | None = None,
    keeper: Keeper | None = None,
    progress: Progress = iter,
) -> Done:
    """Replace linear layers by quantized ones, in place.

    Args:
        model: In evaluation mode.
        layers: Those to quantize, by full name (`Selection.chosen`).
        plan: How.
        batches: Token ids `[sequences, length]` to calibrate on; needed if the rounding needs statistics.
        statistics: Of the full-precision model, by layer; needed if the start needs some (`quadapt.statistics`).
        keeper: Where finished blocks go; by default they stay in memory alone.
        progress: Wraps the list of units (blocks, then what lies outside them), to show how far the work is.

    Returns:
        All layers, with a row for each in the order of the walk.

    Raises:
        ShapeError: A weight is not finite, or does not fit; the message names the layer.
        CalibrationError: Statistics are needed and cannot be had.
    """
    blocks = find_blocks(model)
    outside = [name for name in layers if not any(name.startswith(f"{block}.") for block in blocks)]
    units = {block: [name for name in layers if name.startswith(f"{block}.")] for block in blocks}
    worker = _Worker(model, dict(layers), plan, keeper or InMemory(), statistics or {})
    walk = BlockWalk(model, blocks, batches) if plan.needs_data and any(units.values()) else None
    for unit in progress([*units, *(["outside the blocks"] if outside else [])]):
        names = units.get(unit, outside)
        worker.unit(unit, names, walk if unit in units else None)
        if walk is not None and unit in units:
            walk.advance(unit, blocks[unit])
    return worker.all


class _Worker:
    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Linear],
        plan: Plan,
        keeper: Keeper,
        statistics: Mapping[str, Statistics],
    ) -> None:
        self.model, self.layers, self.plan, self.keeper, self.statistics = model, layers, plan, keeper, statistics
        self.all = Done({}, [])

    def unit(self, unit: str, names: list[str], walk: BlockWalk | None) -> None:
        """Quantize the layers of one block, or take them from an earlier run."""
        found = self.keeper.find(unit)
        if walk is not None and self.plan.rounding.scope == "block":
            walk.advance_dense(unit, self.model.get_submodule(unit))  # before anything in it is replaced
        done = found or self.keeper.keep(unit, self._quantize(unit, names, walk))
        self.all.weights.update(done.weights)
        self.all.rows.extend(done.rows)
        self.all.factors.update(done.factors)
        for name, weight in done.weights.items():
            self._replace(name, weight)

    def _quantize(self, unit: str, names: list[str], walk: BlockWalk | None) -> Done:
        if names and walk is not None and isinstance(self.plan.rounding, BlockAP):
            return self._fit(unit, names, walk, self.plan.rounding)
        done = Done({}, [])
        for stage, statistics in self._gathered(unit, self._stages(unit, names, walk), walk):
            for name in stage:
                known = {**statistics, **self.statistics.get(name, {})}
                with locate(name):
                    begun, row = quantize_layer(name, self.layers[name].weight.detach(), self.plan, known)
                done.rows.append(row)
                done.weights[name] = begun.weight
                if begun.factors is not None:
                    done.factors[name] = begun.factors
                self._replace(name, begun.weight)
        return done

    def _fit(self, unit: str, names: list[str], walk: BlockWalk, rounding: BlockAP) -> Done:
        """Train a block as a whole."""
        start, fitted, notes = time.perf_counter(), dict[str, BlockAPLinear](), dict[str, str]()
        for name in names:
            linear = self.layers[name]
            layout = self.plan.layout(name, *linear.weight.shape)
            with locate(name):
                rounding.check(layout)
                try:
                    fitted[name], notes[name] = BlockAPLinear(linear, layout, rounding.range), ""
                except ScaleUnderflow as error:
                    fitted[name] = BlockAPLinear(linear, in_fp32(layout), rounding.range)
                    notes[name] = f"fp32 scales: {error}"
            self.model.set_submodule(name, fitted[name])
        block = self.model.get_submodule(unit)
        with locate(unit):
            errors = rounding.fit(block, list(fitted.values()), walk.examples(unit, rounding.batch_size))
        weights, seconds = {name: layer.quantized() for name, layer in fitted.items()}, time.perf_counter() - start
        rows = [
            row_of(name, weight, self.layers[name].weight.detach(), seconds / len(names), notes[name], errors)
            for name, weight in weights.items()
        ]
        return Done(weights, rows)

    def _gathered(
        self, unit: str, stages: list[list[str]], walk: BlockWalk | None
    ) -> Iterable[tuple[list[str], Statistics]]:
        """Each stage with its statistics: gathered in its turn, or all before the first if the rounding says so."""
        if walk is None:
            return [(stage, {}) for stage in stages]

        def gather(stage: list[str]) -> Statistics:
            block, first = self.model.get_submodule(unit), self.model.get_submodule(stage[0])
            return {"second_moment": walk.second_moment(unit, block, first)}

        found = ((stage, gather(stage)) for stage in stages)
        return found if getattr(self.plan.rounding, "true_sequential", True) else list(found)

    def _stages(self, unit: str, names: list[str], walk: BlockWalk | None) -> list[list[str]]:
        """Layers that share their statistics, in order; each stage is calibrated on the quantized ones before it."""
        if walk is None:
            return [names]
        return walk.stages(unit, self.model.get_submodule(unit), {name: self.layers[name] for name in names})

    def _replace(self, name: str, weight: QuantWeight) -> None:
        bias = self.layers[name].bias
        self.model.set_submodule(name, QuantLinear.of(weight, None if bias is None else bias))


def quantize_layer(name: str, weight: Tensor, plan: Plan, statistics: Statistics) -> tuple[Begun, LayerRow]:
    """Quantize one weight matrix by plan. What cannot be done as asked is done in the nearest way, with a note.

    Outside the blocks there are no statistics: such layers are rounded to nearest. Scales that fp16 cannot hold become
    fp32.
    """
    clock, layout = time.perf_counter(), plan.layout(name, *weight.shape)
    rounding, start, notes = plan.rounding, plan.start, list[str]()
    if not rounding.needs <= statistics.keys():
        rounding = Nearest()
        notes.append("rounded to nearest: lies outside the blocks")
    if plan.adapted and not any(matches(name, pattern) for pattern in plan.adapted):
        start = Zero()
    if not start.needs <= statistics.keys():
        start = Zero()
        notes.append(f"no {plan.start.name} start: lies outside the blocks")

    def begin(layout: Layout) -> Begun:
        quantize = partial(rounding, layout=layout, statistics=statistics)
        return start(weight, quantize, plan.rank, statistics, pooled=plan.pooled)

    try:
        begun = begin(layout)
    except ScaleUnderflow as error:
        begun = begin(in_fp32(layout))
        notes.append(f"fp32 scales: {error}")
    row = row_of(name, begun.weight, weight, time.perf_counter() - clock, "; ".join(notes))
    if not isinstance(start, Zero):
        row = replace(row, start_error=start_error(begun, weight, statistics))
    return begun, row


def start_error(begun: Begun, weight: Tensor, statistics: Statistics) -> tuple[float, float]:
    """Relative error of a layer's output (of its weight, without a second moment) before training.

    Without the start's low-rank term, and with it: `|| (W - Q - up down) X || / || W X ||`. What was folded into
    offsets counts on both sides.
    """
    moment = statistics.get("dense_second_moment")
    W = weight.double()
    H = None if moment is None else moment.to(W.device, W.dtype)
    E = W - begun.weight.dequantize().double()
    factors = None if begun.factors is None else (begun.factors[0].double(), begun.factors[1].double())
    whole = objective(W, H)
    without, with_ = (math.sqrt(max(0.0, objective(E, H, each)) / whole) if whole else 0.0 for each in (None, factors))
    return without, with_


def in_fp32(layout: Layout) -> Layout:
    """The same with scales (and float offsets) that fp16 cannot hold."""
    offsets = "fp32" if layout.storage.offsets == "fp16" else layout.storage.offsets
    return replace(layout, storage=replace(layout.storage, scales="fp32", offsets=offsets))


def row_of(
    name: str,
    quantized: QuantWeight,
    weight: Tensor,
    seconds: float,
    note: str,
    block_error: tuple[float, float] | None = None,
) -> LayerRow:
    """What became of a layer."""
    layout = quantized.layout
    return LayerRow(
        name=name,
        out=layout.out,
        columns=layout.columns,
        format=layout.format.name,
        bits_per_weight=layout.bits_per_weight,
        error=relative_error(quantized, weight),
        seconds=seconds,
        note=note,
        block_error=block_error,
    )


def relative_error(quantized: QuantWeight, weight: Tensor) -> float:
    """Norm of what quantization changed over the norm of the weight; 0 for a weight of zeros."""
    norm = weight.float().norm()
    return float((quantized.dequantize() - weight.float()).norm() / norm) if norm > 0 else 0.0


def bits_of(layouts: Sequence[Layout]) -> float:
    """True bits per weight over several matrices."""
    weights = sum(layout.out * layout.columns for layout in layouts)
    if not weights:
        raise ConfigError("there is no quantized layer")
    return sum(layout.bits_per_weight * layout.out * layout.columns for layout in layouts) / weights


def quantized_layers(model: nn.Module, patterns: Sequence[str] = ()) -> dict[str, QuantLinear]:
    """Quantized layers of a model (inside adapters too), by name; those that match some pattern if there are any."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {
        name: layer for name, layer in found.items() if not patterns or any(matches(name, each) for each in patterns)
    }


def fingerprint(weights: Mapping[str, QuantWeight]) -> str:
    """SHA-256 over the digests of all quantized layers: the identity of a quantized base."""
    lines = "".join(f"{name}:{weight.digest()}\n" for name, weight in sorted(weights.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
