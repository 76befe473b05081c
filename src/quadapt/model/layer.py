"""Quantize one layer as asked, and say what became of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from quadapt.errors import ConfigError, ShapeError, locate
from quadapt.model.select import matches
from quadapt.nn.starts import Begun, Start, Zero
from quadapt.nn.starts.fit import objective
from quadapt.quant.fixed import total
from quadapt.quant.format import Format
from quadapt.quant.rounding import BlockRounding, Rounding, ScaleUnderflow, Statistics
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """What became of one layer; a row of the report."""

    name: str
    """The full name of the layer in the model."""

    out: int
    """How many output features the layer has."""

    columns: int
    """How many input features the layer has."""

    format: str
    """The short name of the grid, and of the rounding if it is not the one asked for."""

    bits_per_weight: float
    """How many bits are stored for each weight, all stored bytes counted."""

    error: float
    """The relative error of the weights: the norm of the change over the norm of the weights."""

    seconds: float
    """How long quantizing the layer took, in seconds."""

    note: str = ""
    """What was done other than asked, and why; empty if nothing was."""

    block_error: tuple[float, float] | None = None
    """The relative error of the block's output on held-out text, before and after, if a block is quantized as a
    whole."""

    start_error: tuple[float, float] | None = None
    """The relative error of the layer's output (of the weight, where no second moment is known), without and with the
    start, if training starts from more than the quantized weight."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How each layer is to be quantized."""

    format: Format
    """The grid of every layer that has none of its own in `layers`."""

    storage: Storage
    """How scales and offsets are held."""

    rounding: Rounding
    """The rounding, which turns weights into codes."""

    layers: Mapping[str, tuple[Format, Storage]] = field(default_factory=dict)
    """The layers that have a grid and storage of their own, by name."""

    start: Start = field(default_factory=Zero)
    """What an adapter over the quantized layers starts from."""

    rank: int = 0
    """The rank of the adapter over the quantized layers."""

    pooled: bool = False
    """Whether that adapter sees inputs summed over groups: its start is folded into the offsets."""

    adapted: Sequence[str] = ()
    """Layers that get the adapter, by name or a part of it; empty for all. The others start at zero."""

    def __post_init__(self) -> None:
        if isinstance(self.rounding, BlockRounding) and self.start.fits:
            raise ConfigError(
                f"start={self.start.name!r} fits what rounding changed about a matrix; {self.rounding.name} trains the "
                "matrix itself. Use start='zero', or another rounding"
            )

    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Shapes `(out, in)` of exactly the layers that are to be quantized, if `layers` is a plan by budget: none may be
    missing, and none may get another grid."""

    def check(self, layers: Mapping[str, nn.Linear]) -> None:
        """Raise ConfigError unless the rounding serves these layers, and a plan by budget was made for them."""
        for name, linear in layers.items():
            with locate(name):
                self.rounding.check(self.layout(name, linear.out_features, linear.in_features))
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
        """The layout of the layer `name`, of `out` rows and `columns` inputs."""
        format, storage = self.layers.get(name, (self.format, self.storage))
        return Layout.fitting(format, storage, out, columns)

    def shortened(self, name: str, layout: Layout) -> str:
        """A note for the layer `name` if its rows do not fit the storage that was asked for; else an empty string."""
        format, storage = self.layers.get(name, (self.format, self.storage))
        if (format, storage) == (layout.format, layout.storage):
            return ""
        return (
            f"{layout.name} for {storage.label(format)}, as llama.cpp does: {layout.columns} inputs are no whole "
            "super-blocks"
        )

    @property
    def needs_data(self) -> bool:
        """Whether the rounding needs calibration data."""
        return bool(self.rounding.needs)

    @property
    def needs_text(self) -> bool:
        """Whether the rounding or the start does."""
        return bool(self.rounding.needs | self.start.needs)


def quantize_layer(
    name: str,
    weight: Tensor,
    quantization: Quantization,
    statistics: Statistics,
    *,
    unseen: str = "lies outside the blocks",
) -> tuple[Begun, LayerRow]:
    """Quantize one weight matrix. What cannot be done as asked is done in the nearest way, with a note.

    Layers without statistics are rounded to nearest; `unseen` says why there are none. Scales that fp16 cannot hold
    become fp32.
    """
    clock, layout = time.perf_counter(), quantization.layout(name, *weight.shape)
    rounding, start, notes = quantization.rounding, quantization.start, list[str]()
    if quantization.shortened(name, layout):
        notes.append(quantization.shortened(name, layout))
    if not rounding.needs <= statistics.keys():
        rounding = rounding.without_data()
        notes.append(f"rounded to nearest: {unseen}")
    if quantization.adapted and not any(matches(name, pattern) for pattern in quantization.adapted):
        start = Zero()
    if not start.needs <= statistics.keys():
        start = Zero()
        notes.append(f"no {quantization.start.name} start: {unseen}")

    def begin(layout: Layout) -> Begun:
        quantize = partial(rounding, layout=layout, statistics=statistics)
        return start(weight, quantize, quantization.rank, statistics, pooled=quantization.pooled)

    try:
        begun = begin(layout)
    except ScaleUnderflow as error:
        begun = begin(widened(name, layout, quantization, error))
        notes.append(f"fp32 scales: {error}")
    row = row_of(name, begun.weight, weight, time.perf_counter() - clock, "; ".join(notes))
    if start.fits:
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


def widened(name: str, layout: Layout, quantization: Quantization, why: ScaleUnderflow) -> Layout:
    """The layer's layout with fp32 for the scales (and float offsets) that fp16 cannot hold.

    Raises:
        ShapeError: The layer's bits are planned, and fp32 would take more; or its scales are going to train.
    """
    if quantization.rounding.stored(layout) != layout:
        raise ShapeError(str(why)) from why
    if name in quantization.shapes:
        raise ShapeError(f"{why}, and make the plan anew without this layer (--skip): its bits are spent") from why
    return replace(layout, storage=layout.storage.widened())


def row_of(
    name: str,
    quantized: QuantWeight,
    weight: Tensor,
    seconds: float,
    note: str,
    block_error: tuple[float, float] | None = None,
) -> LayerRow:
    """The report's row for a layer that has been quantized."""
    layout = quantized.layout
    return LayerRow(
        name=name,
        out=layout.out,
        columns=layout.columns,
        format=layout.name,
        bits_per_weight=layout.bits_per_weight,
        error=relative_error(quantized, weight),
        seconds=seconds,
        note=note,
        block_error=block_error,
    )


def relative_error(quantized: QuantWeight, weight: Tensor) -> float:
    """Norm of what quantization changed over the norm of the weight; 0 for a weight of zeros."""
    norm = total(weight.float().square())
    return float((total((quantized.dequantize() - weight.float()).square_()) / norm).sqrt()) if norm > 0 else 0.0
