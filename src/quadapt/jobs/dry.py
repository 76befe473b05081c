"""What a job would do and need, found out from shapes alone: nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from quadapt.config import Grid, PrepareConfig, QuantizeConfig, TuneConfig
from quadapt.errors import CheckpointError, ResourceError, locate
from quadapt.hf.checkpoint import skeleton
from quadapt.hf.context import MOST_CONTEXT, context_of
from quadapt.hf.loading import load_model, quantization_of, read_config
from quadapt.jobs.source import Place, device_of, not_read, teacher_name
from quadapt.model.embeddings import check_embeddings
from quadapt.model.quantize import bits_of
from quadapt.model.select import select
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.rounding import BlockRounding
from quadapt.quant.weight import Layout
from quadapt.report import memory
from quadapt.report.memory import MemoryEstimate
from quadapt.report.ui import UI
from quadapt.statistics import FISHER


@dataclass(frozen=True)
class Sketch:
    """A quantized model of which only the shapes are there, on the meta device."""

    model: nn.Module
    """The model on the meta device, with quantized layers in place."""

    layouts: Mapping[str, Layout]
    """The layout of each quantized layer, by the name of the layer."""

    left: Mapping[str, str]
    """Why each other matrix is not quantized."""

    context: int
    """How many positions the model was made for."""

    largest: int
    """How many weights the largest quantized matrix has."""

    dense: int
    """The bytes of the dense model, as it is loaded to be quantized."""

    part: int
    """The bytes of the largest block of the dense model, or of what lies outside the blocks if that is more."""

    bytes_on_disk: int
    """The bytes that the quantized checkpoint takes on disk."""

    source: str
    """The dense model, by name: this one, or what it was made of; empty if nobody knows."""


def sketch(name: str, config: Grid, *, target_modules: Sequence[str] = ()) -> Sketch:
    """The model that `config` would make of `name`, or the one that lies there, if it is quantized.

    Raises:
        CheckpointError: It names no known class, or its files lack a tensor, or have one too many.
        ConfigError: No layer would be quantized, or a name matches none.
        ShapeError: Some matrix cannot be quantized; the message names it.
    """
    machine: Any = config
    about = read_config(name, trust_remote_code=machine.trust_remote_code, head=config.head)
    why = not_read(name, about)
    if why:
        raise CheckpointError(why)
    quantized = quantization_of(name, about)
    load_model(name, device="meta", trust_remote_code=machine.trust_remote_code, head=config.head)  # is all there?
    stored = getattr(about, "dtype", None)
    dtype = stored if machine.dtype == "auto" else getattr(torch, machine.dtype)
    if quantized is not None:
        del about.quantization_config
    model, source = skeleton(about, dtype=dtype, trust_remote_code=machine.trust_remote_code), name
    wider = (
        1.0 if machine.dtype == "float32" else (stored or torch.float32).itemsize / next(model.parameters()).itemsize
    )
    dense, part = (int(wider * size) for size in (memory.parameter_bytes(model), memory.largest_part(model)))
    if quantized is not None:
        layouts, left, source = quantized.layouts, quantized.left, str(quantized.made.get("source") or "")
    else:
        selection, quantization = (
            select(model, target_modules=target_modules, skip=config.skip, part=config.part),
            config.spec.quantization,
        )
        quantization.check(selection.chosen)
        if config.embeddings != "float":
            check_embeddings(model, config.embeddings, selection.chosen, dtype)
        left, layouts = selection.left, {}
        for layer, linear in selection.chosen.items():
            with locate(layer):
                wanted = quantization.layout(layer, linear.out_features, linear.in_features)
                layouts[layer] = quantization.rounding.stored(wanted)
    adapter = config.spec.method.adapter
    if quantized is None and adapter.base == "float":  # quantizes in its forward: the base stays dense
        layouts = {layer: adapter.layout_of(model.get_submodule(layer).get_parameter("weight")) for layer in layouts}
        return _sketched(model, layouts, left, about, (dense, part), source)
    for layer, layout in layouts.items():
        bias = model.get_submodule(layer).bias
        model.set_submodule(layer, QuantLinear(layout, bias=bias is not None, device="meta", dtype=dtype))
    return _sketched(model, layouts, left, about, (dense, part), source)


def _sketched(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    left: Mapping[str, str],
    about: Any,
    dense: tuple[int, int],
    source: str,
) -> Sketch:
    largest = max(layout.out * layout.columns for layout in layouts.values())
    return Sketch(model, layouts, left, context_of(about), largest, *dense, memory.parameter_bytes(model), source)


def quantize(config: QuantizeConfig, ui: UI) -> dict[str, Any]:
    """Say what `quadapt quantize` would make and how much memory it needs, without any weights."""
    found = sketch(config.model, config, target_modules=config.target_modules)
    place = place_of(config, config.model, device_of(config), ui, target_modules=config.target_modules)
    return show(found, quantizing(config, found, place), ui)


def place_of(
    config: QuantizeConfig | TuneConfig | PrepareConfig,
    name: str,
    device: str,
    ui: UI,
    *,
    target_modules: Sequence[str] = (),
    most_length: int = MOST_CONTEXT,
) -> Place:
    """Decide where the model `name` is to be while `device` quantizes it, and say so if it does not fit there."""
    if device == "cpu" or config.offload != "auto":
        return Place(device, "cpu" if config.offload == "cpu" else device)
    _, free = memory.machine_bytes(device)
    found = sketch(name, config, target_modules=target_modules)
    needed = quantizing(config, found, Place(device, device), most_length=most_length).total
    if needed <= free:
        return Place(device, device)
    ui.say(
        f"{device} has {free / 1e9:.1f} GB free, and about {needed / 1e9:.1f} GB are needed: the model stays on the "
        "CPU, one block at a time goes there (as with --offload cpu)"
    )
    return Place(device, "cpu")


def quantizing(
    config: QuantizeConfig | TuneConfig | PrepareConfig, found: Sketch, place: Place, *, most_length: int = MOST_CONTEXT
) -> MemoryEstimate:
    """Memory that quantizing will take on the device that computes. Uses up the sketch's model."""
    quantization, apart = config.spec.quantization, place.home != place.device
    columns = max(layout.columns for layout in found.layouts.values())
    step = memory.quantizing_bytes(found.largest, columns, calibrated=quantization.needs_text)
    if isinstance(quantization.rounding, BlockRounding):
        step = memory.block_training_bytes(found.model, found.layouts)
    if quantization.needs_text:
        step += memory.routed_moment_bytes(found.model)
        length = config.calibration_length or min(found.context, most_length)
        step += memory.step_bytes(found.model, 8, length, trains=False)
        if FISHER in quantization.start.needs:
            step += memory.step_bytes(found.model, 1, length)
        if not apart:
            step += config.calibration_sequences * length * memory.hidden_bytes(found.model)
    weights = found.part if apart else found.dense + found.bytes_on_disk
    return MemoryEstimate(libraries=memory.library_bytes(place.device), weights=weights, adapters=0, step=step)


def tune(config: TuneConfig, name: str, ui: UI, *, seq_len: int) -> dict[str, Any]:
    """Say what `quadapt tune` would train and how much memory it needs, without any weights."""
    found = sketch(name, config)
    first = tuning_first(config, name, seq_len=seq_len)
    if first is not None:
        ui.show(f"estimated peak memory {first.total / 1e6:.0f} MB while the dense model is tuned, and then:")
    return show(found, tuning(config, found, seq_len=seq_len), ui)


def tuning_first(config: TuneConfig, name: str, *, seq_len: int) -> MemoryEstimate | None:
    """Memory that tuning the dense model takes, before it is quantized; None if it is not tuned."""
    from quadapt.jobs.first import trainable

    if not config.spec.method.tune_first.tunes:
        return None
    device = device_of(config)
    about = read_config(name, trust_remote_code=config.trust_remote_code, head=config.head)
    dtype = getattr(about, "dtype", None) if config.dtype == "auto" else getattr(torch, config.dtype)
    dense = skeleton(about, dtype=dtype, trust_remote_code=config.trust_remote_code)
    weights, model = memory.parameter_bytes(dense), trainable(dense, config, on_meta=True)
    trains = memory.parameter_bytes(model, lambda parameter: parameter.requires_grad)
    if config.run.gradient_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    step = memory.taken_by_step(memory.step_bytes(model, config.run.batch_size, seq_len), device)
    return MemoryEstimate(libraries=memory.library_bytes(device), weights=weights, adapters=4 * trains, step=step)


def tuning(config: TuneConfig, found: Sketch, *, seq_len: int, tokens: Sequence[int] = ()) -> MemoryEstimate:
    """Memory that training will take. Uses up the sketch's model."""
    from quadapt.jobs.adapt import adapt

    device, weights = device_of(config), found.bytes_on_disk
    model = adapt(found.model, config.spec, tokens=tokens, on_meta=True)
    trainable = memory.parameter_bytes(model, lambda parameter: parameter.requires_grad)
    if config.run.gradient_checkpointing:
        model.activation_checkpointing_enable()
    pairs = config.spec.method.objective.pairs
    sequences = config.run.batch_size * (2 if pairs else 1)  # of a pair, both answers go through the model at once
    teacher, step = _teacher(config, found, seq_len), memory.step_bytes(model, sequences, seq_len)
    extra = 0 if teacher is None else memory.taken_by_step(teacher.beyond(3 * trainable + step), device)
    return MemoryEstimate(
        libraries=memory.library_bytes(device),
        weights=weights,
        adapters=4 * trainable,
        step=memory.taken_by_step(step, device),
        teacher=extra,
    )


@dataclass(frozen=True)
class _Teaching:
    """The bytes that a teacher takes: `asking` while it answers, `using` for what is made of an answer in a step."""

    asking: int
    using: int
    kept: bool

    def beyond(self, step: int) -> int:
        """What it takes beyond a step of training; a teacher whose answers are kept is gone when training begins."""
        return max(self.using, self.asking - step) if self.kept else self.asking + self.using


def _teacher(config: TuneConfig, found: Sketch, length: int) -> _Teaching | None:
    """Memory that the objective's teacher takes; None if it has none. Uses up no model of the sketch.

    Raises:
        ConfigError: What it says cannot be compared with what the model says.
    """
    objective = config.spec.method.objective
    targets = objective.targets
    if targets is None:
        return None
    about = read_config(teacher_name(config, found.source), trust_remote_code=config.trust_remote_code)
    dtype = getattr(about, "dtype", None) if config.dtype == "auto" else getattr(torch, config.dtype)
    model = skeleton(about, dtype=dtype, trust_remote_code=config.trust_remote_code)
    targets.check(found.model, model)
    tokens = config.run.batch_size * length
    using, whole = (targets.step_bytes(model, tokens, kept=kept) for kept in (objective.keep_targets, False))
    weights = memory.parameter_bytes(model)
    asking = weights + memory.step_bytes(model, config.run.batch_size, length, trains=False)
    return _Teaching(asking + objective.keep_targets * whole, using, objective.keep_targets)


def check_quantizing(
    config: QuantizeConfig | TuneConfig | PrepareConfig,
    name: str,
    place: Place,
    ui: UI,
    *,
    target_modules: Sequence[str] = (),
    most_length: int = MOST_CONTEXT,
) -> None:
    """Raise ResourceError if the machine lacks the memory to quantize, before that begins.

    What is mapped from files need not fit, so that of a model on the CPU one block counts.
    """
    found = sketch(name, config, target_modules=target_modules)
    cast = config.dtype == "float32" and found.dense > memory.parameter_bytes(found.model)
    weights = found.dense if cast else found.part
    estimate = quantizing(config, found, place, most_length=most_length)
    if place.device == "cpu":
        estimate = replace(estimate, weights=weights)
    check_fits(estimate, place.device, ui, advice="Use a shorter --calibration-length, or --rounding nearest")


def check_fits(
    estimate: MemoryEstimate,
    device: str,
    ui: UI,
    *,
    advice: str = "Use a smaller --batch-size or --seq-len, --gradient-checkpointing, or fewer --bits",
) -> None:
    """Raise ResourceError if the machine lacks the memory; warn if others use what is missing."""
    total, available = memory.machine_bytes(device)
    if estimate.total > total:
        raise ResourceError(
            f"about {estimate.total / 1e9:.1f} GB of memory are needed, {device} has {total / 1e9:.1f} GB. {advice}"
        )
    if estimate.total > available:
        ui.say(
            f"warning: about {estimate.total / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are free. "
            f"{advice}"
        )


def show(found: Sketch, estimate: MemoryEstimate, ui: UI) -> dict[str, Any]:
    """Print the result of a dry run, and return it."""
    from quadapt.jobs.quantize import show_layers, show_left

    show_layers(found.layouts, ui, every=True)
    show_left(found.left, ui)
    bits = bits_of(list(found.layouts.values()))
    ui.show(f"{bits:.3f} true bits per quantized weight, {found.bytes_on_disk / 1e6:.1f} MB on disk")
    parts = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in estimate.as_dict().items() if name != "total")
    ui.show(f"estimated peak memory {estimate.total / 1e6:.0f} MB ({parts})")
    return {
        "layers": {name: layout.name for name, layout in found.layouts.items()},
        "left": dict(found.left),
        "bits_per_weight": bits,
        "memory": estimate.as_dict(),
        "file_bytes": found.bytes_on_disk,
    }
