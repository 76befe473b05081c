"""`quadapt quantize`: a dense model in, a quantized one out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quadapt.config import Grid, QuantizeConfig
from quadapt.data import Calibration
from quadapt.errors import ConfigError
from quadapt.hf.blocks import BlockFiles
from quadapt.hf.context import MOST_CONTEXT, positions_of
from quadapt.hf.kinds import kind_of_model
from quadapt.hf.loading import load_model, load_processor
from quadapt.hf.quantizer import adopt, base_config
from quadapt.hf.saving import save_quantized
from quadapt.hf.start import GRIDS, START, write_grids, write_start
from quadapt.hf.workspace import Workspace, check_output
from quadapt.jobs import dry
from quadapt.jobs.embeddings import rounded_embeddings, write_dense
from quadapt.jobs.identity import earlier_job, inputs_of, job_of
from quadapt.jobs.publish import publishes
from quadapt.jobs.ready import check_length
from quadapt.jobs.source import Place, dense_folder, device_of, within_memory
from quadapt.jobs.statistics import statistics_for
from quadapt.jobs.tasking import kind_in, reading_of
from quadapt.model.begun import dense_again
from quadapt.model.layer import LayerRow, Quantization
from quadapt.model.quantize import bits_of, quantize_model
from quadapt.model.select import select
from quadapt.model.trial import check_reads, check_runs
from quadapt.quant.weight import Layout
from quadapt.report.memory import measured_peak
from quadapt.report.ui import UI
from quadapt.tasks import Data, Task, task_of

Calibrating = tuple[Task, Data]
"""What a model does, and rows of that to calibrate on."""


@publishes
def quantize(config: QuantizeConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt quantize` and return a summary of the model it made.

    Raises:
        QuadaptError: Input cannot be used, see the message.
    """
    folder, quantization, device = dense_folder(config.model), config.spec.quantization, device_of(config)
    if quantization.needs_data and not config.calibration_data:
        raise ConfigError(
            f"rounding={quantization.rounding.name!r} needs text to calibrate on. Give --calibration-data FILE, or use "
            "--rounding nearest"
        )
    own = config.spec.method.start.name
    if own != "zero":
        ui.say(f"{config.method} starts its adapter by {own}: tune does so; here the base is made alone")
    if config.spec.method.tune_first.tunes:
        ui.say(f"{config.method} tunes the dense model first: tune does so; here it is quantized as it is")
    if config.dry_run:
        return dry.quantize(config, ui)
    output = Path(config.output)
    check_output(output, overwrite=config.overwrite, inputs=inputs_of(config))
    calibration = None
    if config.calibration_data and quantization.needs_data:
        task = task_of(None, kind_in(folder.name, trust_remote_code=config.trust_remote_code))
        calibration = task, task.read(config.calibration_data, reading_of(config))
    sketch = dry.sketch(folder.name, config, target_modules=config.target_modules)
    if config.calibration_length:
        check_length(sketch.model, config.calibration_length, "calibration_length", ui)
    place = dry.place_of(config, folder.name, device, ui, target_modules=config.target_modules)
    dry.check_quantizing(config, folder.name, place, ui, target_modules=config.target_modules)
    job = job_of("quantize", config, earlier_job(output))
    with (
        Workspace(output, job, overwrite=config.overwrite, needs=2 * sketch.bytes_on_disk) as space,
        measured_peak(device) as peak,
    ):
        if space.finished is not None:
            return space.finished
        if space.resumed:
            ui.say(f"going on with {space.path}")
        summary = quantize_into(
            space.path,
            config,
            ui,
            target_modules=config.target_modules,
            calibrating=calibration,
            place=place,
        )
        summary["peak_memory"] = peak()
        result = {"output": config.output, **summary}
        space.commit("blocks", result=result)
    ui.say(f"wrote {config.output}")
    return result


def quantize_into(
    path: Path,
    config: Grid,
    ui: UI,
    *,
    target_modules: Sequence[str],
    calibrating: Calibrating | None,
    place: Place,
    most_length: int = MOST_CONTEXT,
    source: Path | None = None,
) -> dict[str, Any]:
    """Quantize `config.model` into a folder that exists, going on from the blocks that are finished in it.

    Args:
        path: Folder in the making; finished blocks are kept in its folder `blocks`.
        config: The settings of `quadapt quantize` or of `quadapt tune`.
        ui: Where progress and the report are shown.
        target_modules: Quantize these layers alone.
        calibrating: What the model does, and rows of that to calibrate on, if the rounding needs some.
        place: The devices to calibrate and quantize on.
        most_length: Longest default calibration sequence.
        source: What is quantized in the place of `config.model`: that model, tuned first.

    Returns:
        The summary that is also written into `quadapt.json`; of a base that is dense again, none.
    """
    original, code = config.model, config.trust_remote_code  # type: ignore[attr-defined]
    name, seed = original if source is None else str(source), config.seed  # type: ignore[attr-defined]
    quantization, dtype = config.spec.quantization, config.dtype  # type: ignore[attr-defined]
    # Weights are quantized as they are stored: a cast before would be one more rounding. Widening is none.
    kept = "float32" if dtype == "float32" else "auto"
    with within_memory(place):
        head = config.head if source is None else None
        model = load_model(name, dtype=kept, device=place.home, trust_remote_code=code, head=head)
    tokenizer = load_processor(name, kind_of_model(model), trust_remote_code=code)
    selection = select(model, target_modules=target_modules, skip=config.skip, part=config.part)
    check_reads(model, selection.chosen)
    rounded = rounded_embeddings(model, config, selection.chosen, ui)
    calibration = None
    if quantization.needs_text:
        assert calibrating is not None
        calibration = calibration_for(config, calibrating, tokenizer, model, most_length)
        cut = isinstance(calibration.batches[0], torch.Tensor) and config.calibration_length is None
        ui.say(
            f"calibrating on {calibration.sequences} sequences of {calibration.length} tokens of {calibration.source}"
            + (", which is all there is" if calibration.length < min(positions_of(model), most_length) else "") * cut
        )
    batches = calibration.batches if calibration else []
    with within_memory(place):
        statistics = statistics_for(quantization.start.needs, name, model, selection.chosen, batches, ui, place.device)
        done = quantize_model(
            model,
            selection.chosen,
            quantization,
            batches=batches,
            statistics=statistics,
            keeper=BlockFiles(path / "blocks"),
            progress=lambda units: ui.over("quantizing", units),
            device=place.device,
        )
    if config.spec.dense_base:
        dtypes = {name: layer.weight.dtype for name, layer in selection.chosen.items()}
        write_grids(path / GRIDS, dense_again(model, done.weights, quantization, dtypes))
        show_layers({name: weight.layout for name, weight in done.weights.items()}, ui, rows=done.rows)
        write_dense(model, tokenizer, path)
        return {}
    if dtype != "auto":
        model.to(getattr(torch, dtype))
    made = {
        "method": config.method,
        **({"plan": config.plan} if config.plan else {}),
        **rounded.made,
        "rounding": _described(quantization),
        **({} if source is None else {"tuned_first": config.spec.method.tune_first.name}),
        "source": str(Path(original).resolve()) if Path(original).exists() else original,
    }
    if calibration:
        made["calibration"] = {
            "data": calibration.source,
            "sequences": calibration.sequences,
            "length": calibration.length,
            "seed": seed,
        }
    if quantization.start.name != "zero":
        made["start"] = {"kind": quantization.start.name, **asdict(quantization.start), "rank": quantization.rank}
    if done.factors:
        write_start(path / START, done.factors)
    adopt(model, left=selection.left, made=made, besides=rounded.digest)
    check_runs(model)
    return write_model(model, tokenizer, path, done.rows, made, ui)


def calibration_for(
    config: Grid, calibrating: Calibrating, tokenizer: Any, model: nn.Module, most_length: int
) -> Calibration:
    """What to calibrate on: as long as the model takes, up to `most_length`; shorter where there is little of it.

    Raises:
        DataError: There is less than one sequence of the length that the user gave, or hardly a token.
    """
    (task, rows), rounding = calibrating, config.spec.quantization.rounding
    return task.calibration(
        rows,
        tokenizer,
        model,
        length=config.calibration_length or min(positions_of(model), most_length),
        sequences=config.calibration_sequences,
        at_least=None if config.calibration_length else rounding.least_sequences,
        reading=reading_of(config),
    )


def write_model(
    model: nn.Module, tokenizer: Any, path: Path, rows: Sequence[LayerRow], made: Mapping[str, Any], ui: UI
) -> dict[str, Any]:
    """Save a quantized model with its report; show the report's summary."""
    layouts = base_config(model).layouts
    summary = {
        "made": dict(made),
        "bits_per_weight": bits_of(list(layouts.values())),
        "layers": len(layouts),
        "quantized_weights": sum(layout.out * layout.columns for layout in layouts.values()),
        "left": base_config(model).left,
        "rows": [asdict(row) for row in rows],
    }
    save_quantized(model, tokenizer, path, summary)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    show_layers(base_config(model).layouts, ui, rows=rows)
    show_left(base_config(model).left, ui)
    ui.show(f"{summary['bits_per_weight']:.3f} true bits per quantized weight, {size / 1e6:.2f} MB on disk")
    return {**summary, "file_bytes": size}


def show_layers(layouts: Mapping[str, Layout], ui: UI, *, rows: Sequence[LayerRow] = (), every: bool = False) -> None:
    """A table of the quantized layers, each of them or a row for each kind; error and time where they were measured."""
    measured = {row.name: row for row in rows}
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, layout in layouts.items():
        grid = measured[name].format if name in measured else layout.name
        key = (name if every else name.rpartition(".")[2], f"{layout.out} x {layout.columns}", grid)
        alike.setdefault((*key, f"{layout.bits_per_weight:.3f}"), []).append(name)
    table = []
    for (layer, *about), names in alike.items():
        cells = [layer if every else f"{len(names)} x {layer}", *about]
        if measured:
            cells.append(f"{sum(measured[name].error for name in names) / len(names):.4f}")
            cells.append(f"{sum(measured[name].seconds for name in names):.1f}")
        table.append(cells)
    columns = ("layer", "shape", "format", "bits", *(("error", "seconds") if measured else ()))
    ui.table("quantized", columns, table)
    begun = [row.start_error for row in rows if row.start_error]
    if begun:
        without, with_ = (sum(pair[at] for pair in begun) / len(begun) for at in (0, 1))
        ui.show(f"mean error at the start: {without:.4f} of the quantized layers alone, {with_:.4f} with the adapter")
    ends = {row.name.rpartition(".")[0]: row.block_error for row in rows if row.block_error}
    if ends:
        before, after = (sum(pair[at] for pair in ends.values()) / len(ends) for at in (0, 1))
        ui.show(f"output error of the blocks on held-out text: {before:.4f} at first, {after:.4f} when trained")
    for row in rows:
        if row.note:
            ui.show(f"{row.name}: {row.note}")


def show_left(left: Mapping[str, str], ui: UI) -> None:
    """What is not quantized, and why."""
    for reason, count in Counter(left.values()).items():
        names = [name for name, why in left.items() if why == reason]
        ui.show(f"not quantized ({reason}): {', '.join(names[:4])}{f' and {count - 4} more' if count > 4 else ''}")


def _described(quantization: Quantization) -> dict[str, Any]:
    return {"kind": quantization.rounding.name, **json.loads(json.dumps(asdict(quantization.rounding)))}
