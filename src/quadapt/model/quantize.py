"""Quantize a model in place, block by block, keeping each finished block so that an interrupted run can go on.

Float weights are read where they lie (a checkpoint that is mapped into memory is paged in and out by the system), one
layer at a time; a finished block is handed to a :class:`Keeper`, which may put it on disk and give back tensors mapped
from there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor, nn

from quadapt.calibrate import BlockWalk
from quadapt.errors import ConfigError, ShapeError, locate
from quadapt.model.select import find_blocks, matches
from quadapt.nn.quant_linear import QuantLinear
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


class Keeper(Protocol):
    """Where finished blocks go."""

    def find(self, unit: str) -> tuple[dict[str, QuantWeight], list[LayerRow]] | None:
        """A unit that an earlier run finished, or None."""

    def keep(self, unit: str, weights: dict[str, QuantWeight], rows: list[LayerRow]) -> dict[str, QuantWeight]:
        """Keep a finished unit; return the weights to go on with."""


class InMemory:
    """A keeper that keeps nothing but the model itself."""

    def find(self, unit: str) -> None:
        return None

    def keep(self, unit: str, weights: dict[str, QuantWeight], rows: list[LayerRow]) -> dict[str, QuantWeight]:
        return weights


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

    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Shapes `(out, in)` of exactly the layers that are to be quantized, if `layers` is a plan by budget: none may be
    missing, and none may get another grid."""

    def check(self, layers: Mapping[str, nn.Linear]) -> None:
        """Raise ConfigError unless a plan by budget was made for these layers."""
        found = {name: (linear.out_features, linear.in_features) for name, linear in layers.items()}
        if not self.shapes or found == dict(self.shapes):
            return
        for name in (*self.shapes, *found):
            have, want = found.get(name), self.shapes.get(name)
            if have != want:
                why = (
                    f"{name} is not to be quantized here, or not in the model"
                    if have is None
                    else f"{name} is not planned"
                    if want is None
                    else f"{name} is {have[0]} x {have[1]} here, {want[0]} x {want[1]} in the plan"
                )
                raise ConfigError(
                    f"the plan was made for another model or other layers: {why}. Give the model, --target-modules and "
                    "--skip of the plan, or make another: quadapt plan"
                )

    def layout(self, name: str, out: int, columns: int) -> Layout:
        """Layout of the layer `name`."""
        format, storage = self.layers.get(name, (self.format, self.storage))
        return Layout(format=format, storage=storage, out=out, columns=columns)

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is needed."""
        return bool(self.rounding.needs)


Progress = Callable[[Sequence[str]], Iterator[str]]
"""Wraps the names of the units to work on, like `tqdm`."""


def quantize_model(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    plan: Plan,
    *,
    batches: Sequence[Tensor] = (),
    keeper: Keeper | None = None,
    progress: Progress = iter,
) -> list[LayerRow]:
    """Replace linear layers by quantized ones, in place.

    Args:
        model: In evaluation mode.
        layers: Those to quantize, by full name (`Selection.chosen`).
        plan: How.
        batches: Token ids `[sequences, length]` to calibrate on; needed if the rounding needs statistics.
        keeper: Where finished blocks go; by default they stay in memory alone.
        progress: Wraps the list of units (blocks, then what lies outside them), to show how far the work is.

    Returns:
        A row for each layer, in the order of the walk.

    Raises:
        ShapeError: A weight is not finite, or does not fit; the message names the layer.
        CalibrationError: Statistics are needed and cannot be had.
    """
    plan.check(layers)
    blocks = find_blocks(model)
    outside = [name for name in layers if not any(name.startswith(f"{block}.") for block in blocks)]
    units = {block: [name for name in layers if name.startswith(f"{block}.")] for block in blocks}
    worker = _Worker(model, dict(layers), plan, keeper or InMemory())
    walk = BlockWalk(model, blocks, batches) if plan.needs_data and any(units.values()) else None
    for unit in progress([*units, *(["outside the blocks"] if outside else [])]):
        names = units.get(unit, outside)
        worker.unit(unit, names, walk if unit in units else None)
        if walk is not None and unit in units:
            walk.advance(unit, blocks[unit])
    return worker.rows


class _Worker:
    def __init__(self, model: nn.Module, layers: dict[str, nn.Linear], plan: Plan, keeper: Keeper) -> None:
        self.model, self.layers, self.plan, self.keeper = model, layers, plan, keeper
        self.rows: list[LayerRow] = []

    def unit(self, unit: str, names: list[str], walk: BlockWalk | None) -> None:
        """Quantize the layers of one block, or take them from an earlier run."""
        found = self.keeper.find(unit)
        if found is not None:
            weights, rows = found
        else:
            weights, rows = self._quantize(unit, names, walk)
            weights = self.keeper.keep(unit, weights, rows)
        self.rows += rows
        for name, weight in weights.items():
            self._replace(name, weight)

    def _quantize(
        self, unit: str, names: list[str], walk: BlockWalk | None
    ) -> tuple[dict[str, QuantWeight], list[LayerRow]]:
        weights: dict[str, QuantWeight] = {}
        rows = []
        for stage, statistics in self._gathered(unit, self._stages(unit, names, walk), walk):
            for name in stage:
                with locate(name):
                    weights[name], row = quantize_layer(name, self.layers[name].weight.detach(), self.plan, statistics)
                rows.append(row)
                self._replace(name, weights[name])
        return weights, rows

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


def quantize_layer(name: str, weight: Tensor, plan: Plan, statistics: Statistics) -> tuple[QuantWeight, LayerRow]:
    """Quantize one weight matrix by plan. What cannot be done as asked is done in the nearest way, with a note.

    Outside the blocks there are no statistics: such layers are rounded to nearest. Scales that fp16 cannot hold become
    fp32.
    """
    start = time.perf_counter()
    layout, rounding, note = plan.layout(name, *weight.shape), plan.rounding, ""
    if rounding.needs and not statistics:
        rounding, note = Nearest(), "rounded to nearest: lies outside the blocks"
    try:
        quantized = rounding(weight, layout, statistics)
    except ScaleUnderflow as error:
        if name in plan.shapes:
            raise ShapeError(
                f"{error}, and make the plan anew without this layer (--skip): its bits are spent"
            ) from error
        offsets = "fp32" if layout.storage.offsets == "fp16" else layout.storage.offsets
        layout = replace(layout, storage=replace(layout.storage, scales="fp32", offsets=offsets))
        quantized, note = rounding(weight, layout, statistics), f"fp32 scales: {error}"
    row = LayerRow(
        name=name,
        out=layout.out,
        columns=layout.columns,
        format=layout.format.name,
        bits_per_weight=quantized.layout.bits_per_weight,
        error=relative_error(quantized, weight),
        seconds=time.perf_counter() - start,
        note=note,
    )
    return quantized, row


def relative_error(quantized: QuantWeight, weight: Tensor) -> float:
    """Norm of what quantization changed over the norm of the weight; 0 for a weight of zeros."""
    norm = weight.float().norm()
    return float((quantized.dequantize() - weight.float()).norm() / norm) if norm > 0 else 0.0


def bits_of(layouts: Sequence[Layout]) -> float:
    """True bits per weight over several matrices."""
    weights = sum(layout.out * layout.columns for layout in layouts)
    if not weights:
        raise ConfigError("there is no quantized layer")
    return sum(layout.bits for layout in layouts) / weights


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
