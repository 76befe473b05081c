"""Quantize a model in place, block by block, keeping each finished block so that an interrupted run can go on.

Float weights are read where they lie (a checkpoint that is mapped into memory is paged in and out by the system), one
layer at a time; a finished block is handed to a :class:`Keeper`, which may put it on disk and give back tensors mapped
from there. Where another device computes than the one that holds the model, a block at a time is brought to it, and
codes come back.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quadapt.calibrate import LEAST_TOKENS, Batch, BlockWalk
from quadapt.errors import ConfigError, locate
from quadapt.model.layer import LayerRow, Quantization, quantize_layer, row_of, widened
from quadapt.model.select import find_blocks, matches
from quadapt.nn.quant_linear import QuantLinear
from quadapt.nn.resident import indexed, moved, resident
from quadapt.quant.rounding import BlockRounding, ScaleUnderflow, Statistics
from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True)
class Done:
    """A finished unit: a block, or what lies outside the blocks."""

    weights: dict[str, QuantWeight]
    """The quantized matrices, by the names of their layers."""

    rows: list[LayerRow]
    """What became of each layer, as rows of the report."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """`up` and `down` that training starts from, by layer, where a start gave some (`nn/starts`)."""


class Keeper(Protocol):
    """The place where finished blocks are kept, for a run that goes on later."""

    def find(self, unit: str) -> Done | None:
        """A unit that an earlier run finished, or None."""

    def keep(self, unit: str, done: Done) -> Done:
        """Keep a finished unit; return what to go on with."""


OUTSIDE = "outside the blocks"
"""The unit of all layers that lie in no block."""


class InMemory:
    """A keeper that keeps nothing but the model itself."""

    def find(self, unit: str) -> None:
        return None

    def keep(self, unit: str, done: Done) -> Done:
        return done


Progress = Callable[[Sequence[str]], Iterator[str]]
"""Wraps the names of the units to work on, like `tqdm`."""


def quantize_model(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    quantization: Quantization,
    *,
    batches: Sequence[Batch] = (),
    statistics: Mapping[str, Statistics] | None = None,
    keeper: Keeper | None = None,
    progress: Progress = iter,
    device: torch.device | str | None = None,
) -> Done:
    """Replace linear layers by quantized ones, in place.

    Args:
        model: The dense model, in evaluation mode.
        layers: The layers to quantize, by full name (`Selection.chosen`).
        quantization: How each layer is to be quantized.
        batches: What to calibrate on (token ids, or inputs by name); needed if the rounding needs statistics.
        statistics: Statistics of the full-precision model, by layer; needed if the start needs some.
        keeper: Where finished blocks go; by default they stay in memory alone.
        progress: Wraps the list of units (blocks, then what lies outside them), to show how far the work is.
        device: Where to compute. Default: where the model is. It stays there; so do the quantized layers.

    Returns:
        All layers, with a row for each in the order of the walk.

    Raises:
        ShapeError: A weight is not finite, or does not fit; the message names the layer.
        CalibrationError: Statistics are needed and cannot be had.
    """
    quantization.check(layers)
    blocks = find_blocks(model, layers)
    outside = [name for name in layers if not any(name.startswith(f"{block}.") for block in blocks)]
    units = {block: inside for block in blocks if (inside := [each for each in layers if each.startswith(f"{block}.")])}
    there = next(model.parameters()).device if device is None else indexed(device)
    worker = _Worker(model, dict(layers), quantization, keeper or InMemory(), statistics or {}, there)
    with _walk(model, {unit: blocks[unit] for unit in units}, batches, there, quantization) as walk:
        order = list(units) if walk is None else walk.order
        for unit in progress([*order, *([OUTSIDE] if outside else [])]):
            names = units.get(unit, outside)
            worker.unit(unit, names, walk if unit in units else None)
            if walk is not None and unit in units:
                walk.advance(unit)
    worker.finish()
    return worker.all


def _walk(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    device: torch.device,
    quantization: Quantization,
) -> AbstractContextManager[BlockWalk | None]:
    """The walk through a model's blocks, if its rounding needs one."""
    if not quantization.needs_data:
        return nullcontext()
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no list of blocks with layers to quantize, which "
            f"rounding={quantization.rounding.name!r} walks through. Use rounding 'nearest' (--rounding nearest)"
        )
    rounding = quantization.rounding
    return BlockWalk(
        model, blocks, batches, device, rounding.batch_size if isinstance(rounding, BlockRounding) else None
    )


class _Worker:
    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Linear],
        quantization: Quantization,
        keeper: Keeper,
        statistics: Mapping[str, Statistics],
        device: torch.device,
    ) -> None:
        self.model, self.layers, self.quantization, self.keeper, self.statistics = (
            model,
            layers,
            quantization,
            keeper,
            statistics,
        )
        self.device = device
        self.all = Done({}, [])

    def unit(self, unit: str, names: list[str], walk: BlockWalk | None) -> None:
        """Quantize the layers of one block, or take them from an earlier run."""
        found = self.keeper.find(unit)
        if walk is not None and isinstance(self.quantization.rounding, BlockRounding):
            walk.advance_dense(unit)  # before anything in it is replaced
        done = self._home(found or self.keeper.keep(unit, self._quantize(unit, names, walk)))
        self.all.weights.update(done.weights)
        self.all.rows.extend(done.rows)
        self.all.factors.update(done.factors)
        for name, weight in done.weights.items():
            self._replace(name, self._product(name, weight))

    def _product(self, name: str, weight: QuantWeight) -> QuantWeight:
        """What the layer computes with before it is trained: what those after it are calibrated on."""
        layout = self.quantization.layout(name, weight.layout.out, weight.layout.columns)
        return self.quantization.rounding.product(weight, layout)

    def finish(self) -> None:
        """Put what is stored in the place of what the walk computed with, where that is something else."""
        for name, weight in self.all.weights.items():
            layer = self.model.get_submodule(name)
            if isinstance(layer, QuantLinear) and layer.layout != weight.layout:
                self._replace(name, weight)

    def _home(self, done: Done) -> Done:
        """A finished unit on the device that holds the model."""
        home = {name: self.layers[name].weight.device for name in done.weights}
        weights = {
            name: QuantWeight(weight.layout, moved(dict(weight.tensors), home[name]))
            for name, weight in done.weights.items()
        }
        return Done(weights, done.rows, {name: moved(pair, home[name]) for name, pair in done.factors.items()})

    def _quantize(self, unit: str, names: list[str], walk: BlockWalk | None) -> Done:
        if walk is None:
            return self._layers([(names, {})], "" if unit != OUTSIDE else "lies outside the blocks")
        with resident(self.model.get_submodule(unit), self.device):
            rounding = self.quantization.rounding
            if names and isinstance(rounding, BlockRounding):
                return self._fit(unit, names, walk, rounding)
            return self._layers(self._gathered(unit, names, walk))

    def _layers(self, stages: Iterable[tuple[list[str], Statistics]], unseen: str = "") -> Done:
        """Quantize layer by layer, each in its place before the next stage is asked for.

        `unseen` says why statistics may be missing, if it is not that too few tokens were sent to an expert.
        """
        unseen = unseen or f"an expert to which fewer than {LEAST_TOKENS} tokens were sent"
        done = Done({}, [])
        for stage, statistics in stages:
            for name in stage:
                known = {**statistics, **moved(dict(self.statistics.get(name, {})), self.device)}
                with locate(name), resident(self.layers[name], self.device):
                    begun, row = quantize_layer(
                        name, self.layers[name].weight.detach(), self.quantization, known, unseen=unseen
                    )
                    self._replace(name, self._product(name, begun.weight))
                done.rows.append(row)
                done.weights[name] = begun.weight
                if begun.factors is not None:
                    done.factors[name] = begun.factors
        return done

    def _fit(self, unit: str, names: list[str], walk: BlockWalk, rounding: BlockRounding) -> Done:
        """Train a block as a whole."""
        start, fitted, layouts, notes = time.perf_counter(), dict[str, Any](), dict[str, Layout](), dict[str, str]()
        for name in names:
            linear = self.layers[name]
            layouts[name], notes[name] = self.quantization.layout(name, *linear.weight.shape), ""
            with locate(name):
                rounding.check(layouts[name])
                try:
                    fitted[name] = rounding.layer(linear, layouts[name])
                    notes[name] = self.quantization.shortened(name, layouts[name])
                except ScaleUnderflow as error:
                    layouts[name] = widened(name, layouts[name], self.quantization, error)
                    fitted[name], notes[name] = rounding.layer(linear, layouts[name]), f"fp32 scales: {error}"
            self.model.set_submodule(name, fitted[name])
        block = self.model.get_submodule(unit)
        with locate(unit):
            errors = rounding.fit(block, list(fitted.values()), walk.examples())
        weights = {name: rounding.of_layer(layer) for name, layer in fitted.items()}
        seconds = time.perf_counter() - start
        rows = [
            row_of(name, weight, self.layers[name].weight.detach(), seconds / len(names), notes[name], errors)
            for name, weight in weights.items()
        ]
        return Done(weights, rows)

    def _gathered(self, unit: str, names: list[str], walk: BlockWalk) -> Iterable[tuple[list[str], Statistics]]:
        """Layers that share their statistics, in order, each group calibrated on the quantized ones before it.

        If the rounding says so, all statistics are gathered before the first layer is quantized.
        """
        layers = {name: self.layers[name] for name in names}
        moments = walk.moments(unit, walk.stages(unit, layers), layers)
        found = ((stage, {} if moment is None else {"second_moment": moment}) for stage, moment in moments)
        return found if self.quantization.rounding.true_sequential else list(found)

    def _replace(self, name: str, weight: QuantWeight) -> None:
        bias = self.layers[name].bias
        self.model.set_submodule(name, QuantLinear.of(weight, None if bias is None else bias))


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


def fingerprint(weights: Mapping[str, QuantWeight], besides: str = "") -> str:
    """SHA-256 over the digests of all quantized layers: the identity of a quantized base.

    Args:
        weights: The quantized matrices of the model, by layer.
        besides: Digest of what merges have changed outside of these; empty if nothing.
    """
    return fingerprint_of_digests({name: weight.digest() for name, weight in weights.items()}, besides)


def fingerprint_of_digests(digests: Mapping[str, str], besides: str = "") -> str:
    """SHA-256 over the digests of all quantized layers, given by name, and of what merges have changed `besides`."""
    lines = "".join(f"{name}:{digest}\n" for name, digest in sorted(digests.items()))
    lines += f"besides:{besides}\n" if besides else ""
    return hashlib.sha256(lines.encode()).hexdigest()
