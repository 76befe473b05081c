"""`quadapt tune`: quantize a model if it is not yet, train an adapter over it, write both into one folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from quadapt.config import TuneConfig
from quadapt.data import check_loss
from quadapt.errors import ConfigError
from quadapt.hf.context import positions_of
from quadapt.hf.folder import Folder, open_folder
from quadapt.hf.kinds import kind_of, kind_of_model
from quadapt.hf.loading import holder_of, load_processor, read_config, read_quantization
from quadapt.hf.start import GRIDS, START
from quadapt.hf.vocabulary import token_ids
from quadapt.hf.workspace import Workspace, check_output, remove
from quadapt.jobs import dry
from quadapt.jobs.continued import Earlier, going_on
from quadapt.jobs.embeddings import dense_base
from quadapt.jobs.first import CHECKPOINTS, TUNED, Stages, tuned_first
from quadapt.jobs.identity import earlier_job, inputs_of, job_of
from quadapt.jobs.publish import publishes
from quadapt.jobs.quantize import Calibrating, calibration_for, quantize_into
from quadapt.jobs.ready import check_length, check_reporter, disk_needs, look_over
from quadapt.jobs.shared import Shared, bring, keep
from quadapt.jobs.source import Place, device_of
from quadapt.jobs.tasking import Lesson, reading_of, tuned_for, with_head
from quadapt.jobs.training import Over, fit
from quadapt.report.ui import UI
from quadapt.tasks import Data, Task, task_of

MOST_LENGTH = 1024
"""Longest default training sequence, in tokens."""


@publishes
def tune(config: TuneConfig, ui: UI, shared: Shared | None = None) -> dict[str, Any]:
    """Run `quadapt tune` and return what training measured.

    Args:
        config: The settings.
        ui: Where progress and the report are shown.
        shared: What other runs have made before their adapters trained, if some of it can be taken over.

    Raises:
        QuadaptError: Input cannot be used, see the message.
    """
    folder, earlier = open_folder(config.model), None
    if folder.kind == "adapter":
        config, earlier = going_on(config, folder)
        folder, shared = earlier.base, None
    config, task, rows = _settled(config, folder, earlier)
    _check_run(config)
    device, chosen = device_of(config), config.spec.method
    quantizes = folder.kind == "model" and (chosen.adapter.base != "float" or chosen.begins_rounded)
    makes_base = quantizes or config.head is not None or (folder.kind == "model" and config.embeddings != "float")
    found = dry.sketch(folder.name, config)
    seq_len = config.seq_len or task.length(positions_of(found.model), MOST_LENGTH)
    check_length(found.model, seq_len, "seq_len", ui)
    if quantizes and config.calibration_length:
        check_length(found.model, config.calibration_length, "calibration_length", ui)
    if config.dry_run:
        return dry.tune(config, folder.name, ui, seq_len=seq_len)
    output = Path(config.output)
    check_output(output, overwrite=config.overwrite, inputs=[folder.name, *inputs_of(config)])
    holder = folder.name if earlier is None else holder_of(earlier.folder, folder.name)
    tokenizer = load_processor(holder, kind_of_model(found.model), trust_remote_code=config.trust_remote_code)
    rows = rows or rows_of(config, task)
    lesson = encoded(config, task, rows, tokenizer, found.model.config, seq_len, ui)
    own = task.read(config.calibration_data, reading_of(config)) if config.calibration_data else rows[0]
    calibration: Calibrating = (task, own)
    look_over(config, found, folder.name, lesson, ui)
    place = Place(device, device)
    if quantizes:
        place = dry.place_of(config, folder.name, device, ui, most_length=seq_len)
        _check_quantizing(config, found, place, calibration, tokenizer, seq_len, ui)
    tokens = token_ids(config.train_tokens, tokenizer)
    estimate = dry.tuning(config, found, seq_len=seq_len, tokens=tokens)
    sequences = len(lesson.data.data)
    stages = None if earlier is not None else Stages.of(config, sequences)
    run = config.run if stages is None else stages.then
    tokens_read = lesson.data.report.tokens * run.reads(sequences) // sequences
    needs = disk_needs(config, found, estimate.adapters // 4, tokens_read, quantizes=quantizes)
    needs += found.dense * (makes_base and not quantizes)
    dry.check_fits(estimate, device, ui)
    about_base = {} if earlier is None else {"base": folder.name}
    if earlier is None:
        needs += _first_needs(config, folder.name, found.dense, seq_len, ui)
    job = job_of("tune", config, earlier_job(output), **about_base)
    with Workspace(output, job, overwrite=config.overwrite, needs=needs) as space:
        if space.finished is not None:
            return space.finished
        if space.resumed:
            ui.say(f"going on with {space.path}")
        bring(shared, config, space.path)
        base, tuned, about = folder.path, None, dict[str, Any]()
        if stages is not None:
            name = TUNED if makes_base else "base"
            tuned, about = tuned_first(config, space, folder, lesson, stages.first, ui, name=name)
            base = tuned
        if makes_base:
            base = _make_base(space.path, config, ui, place, calibration, seq_len, tuned)
        keep(shared, config, space.path)
        over = Over(folder=folder, base=base, run=run, earlier=earlier, tuned=tuned, first=about)
        summary = fit(config, space, over, lesson, ui)
        result = {"output": config.output, **summary}
        space.commit("checkpoints", CHECKPOINTS, "targets", START, GRIDS, TUNED, result=result)
    next_step = "merge" if chosen.adapter.exactness != "none" else "export --format lora"
    ui.say(f"wrote {config.output}. Next: quadapt {next_step} {config.output} --output FOLDER")
    return result


def _settled(
    config: TuneConfig, folder: Folder, earlier: Earlier | None
) -> tuple[TuneConfig, Task, tuple[Data, Data | None] | None]:
    """The settings with the usual method for a model and with the head that it gets, its task, and rows if read by now.

    Rows are read this early only where they decide on the head.
    """
    about = read_config(folder.name, trust_remote_code=config.trust_remote_code)
    kind = kind_of(about)
    if earlier is None:
        writes = task_of(config.task, kind).name == "causal-lm" and not config.prefers
        config = config.usual(quantized=folder.kind == "quantized", whole=_whole(config, folder), writes=writes)
        _check(config, folder)
    task = tuned_for(config, kind)
    if kind.name in task.kinds and not config.labels and config.problem == "auto":
        return config, task, None
    rows = rows_of(config, task)
    return with_head(config, task, about, kind, folder, rows[0]), task, rows


def _whole(config: TuneConfig, folder: Folder) -> bool:
    """Whether a model is quantized to integers, with zero-points that are whole numbers or none."""
    if folder.kind != "quantized":
        return False
    about = read_quantization(folder.name, trust_remote_code=config.trust_remote_code)
    layouts = [] if about is None else about.layouts.values()
    return all(each.format.levels == "int" and not each.storage.of_offsets.free for each in layouts)


def _check_quantizing(
    config: TuneConfig,
    found: dry.Sketch,
    place: Place,
    calibration: Calibrating,
    tokenizer: Any,
    seq_len: int,
    ui: UI,
) -> None:
    """Raise QuadaptError if quantizing will lack memory or text: before a tuning that may come first."""
    dry.check_quantizing(config, config.model, place, ui, most_length=seq_len)
    if config.spec.quantization.needs_text:
        calibration_for(config, calibration, tokenizer, found.model, min(2048, seq_len))


def _first_needs(config: TuneConfig, name: str, dense: int, seq_len: int, ui: UI) -> int:
    """Check that there is memory to tune the dense model first, if that is done; the bytes that it writes."""
    first = dry.tuning_first(config, name, seq_len=seq_len)
    if first is None:
        return 0
    advice = "Use a smaller --batch-size or --seq-len, or --tune-first none"
    dry.check_fits(first, device_of(config), ui, advice=advice)
    return dense


def _check(config: TuneConfig, folder: Folder) -> None:
    """Raise QuadaptError if the settings do not go with what the folder holds."""
    chosen = config.spec.method
    if folder.kind == "quantized" and config.given():
        raise ConfigError(
            f"{config.given()[0]} has no meaning here: {config.model!r} is quantized already. Leave it out, or give "
            "the dense model"
        )
    dense = chosen.adapter.base == "float" and not chosen.begins_rounded
    if config.offload != "auto" and (folder.kind == "quantized" or dense):
        why = (
            f"{config.model!r} is quantized already"
            if folder.kind == "quantized"
            else f"{config.method} trains over it"
        )
        raise ConfigError(
            f"offload={config.offload!r} says where the dense model is while it is quantized, and {why}. Leave it out"
        )
    if folder.kind == "quantized" and chosen.adapter.base != "codes":
        raise ConfigError(
            f"method={config.method!r} starts from the dense model, and {config.model!r} is quantized. Give the dense "
            "one"
        )
    if folder.kind == "quantized" and chosen.tune_first.tunes:
        raise ConfigError(
            f"tune_first={chosen.tune_first.name!r} tunes the dense model, and {config.model!r} is quantized already. "
            "Give the dense model, or use --tune-first none"
        )
    if folder.kind == "quantized" and chosen.start.name != "zero":
        raise ConfigError(
            f"start={chosen.start.name!r} fits what quantization changes, and {config.model!r} is quantized already. "
            "Give the dense model, or use --start zero"
        )


def _check_run(config: TuneConfig) -> None:
    """Raise ConfigError if the settings of training contradict each other, or need what is not installed."""
    patience = config.run.early_stopping
    if (config.value("keep") == "best" or patience) and not (config.eval_data or config.eval_split):
        wanted = f"early_stopping={patience}" if patience else "keep='best'"
        raise ConfigError(f"{wanted} goes by the loss on held-out data. Give --eval-data or --eval-split")
    check_reporter(config.run.report_to)


def rows_of(config: TuneConfig, task: Task) -> tuple[Data, Data | None]:
    """Rows to train on, and held-out ones."""
    reading = reading_of(config)
    rows = task.read(config.data, reading)
    if config.eval_data:
        return rows, task.read(config.eval_data, reading, held_out=True)
    return task.split(rows, config.eval_split, config.run.seed) if config.eval_split else (rows, None)


def encoded(
    config: TuneConfig,
    task: Task,
    rows: tuple[Data, Data | None],
    tokenizer: Any,
    about: Any,
    seq_len: int,
    ui: UI,
) -> Lesson:
    """Training and held-out sequences; says what became of the data, and shows one example with its mask."""
    reading, measured = reading_of(config), rows[1]
    data = task.encode(rows[0], tokenizer, about, length=seq_len, reading=reading)
    for line in data.report.lines():
        ui.say(line)
    ui.say(f"an example: {data.report.example}")
    check_loss(data.report)
    if measured is None:
        return Lesson(task, tokenizer, data, None)
    kept = task.encode(measured, tokenizer, about, length=seq_len, reading=reading)
    check_loss(kept.report)
    for line in kept.report.lines() if config.eval_data else kept.report.lines()[:1]:
        ui.say(f"held out: {line}")
    return Lesson(task, tokenizer, data, kept)


def _make_base(
    path: Path,
    config: TuneConfig,
    ui: UI,
    place: Place,
    calibration: Calibrating,
    seq_len: int,
    tuned: Path | None,
) -> Path:
    """The base, made inside the output folder unless an interrupted run has made it.

    It is quantized; for a method that trains over the dense matrices it is the dense model with rounded embeddings.
    `tuned` is what is quantized in the place of `config.model`: that model, tuned first.
    """
    base = path / "base"
    if not base.exists():
        making = path / "base.partial"
        making.mkdir(exist_ok=True)
        chosen = config.spec.method
        if chosen.adapter.base == "float" and not chosen.begins_rounded:
            dense_base(making, config, ui, source=tuned)
            os.rename(making, base)
            return base
        quantize_into(
            making,
            config,
            ui,
            target_modules=(),
            calibrating=calibration,
            place=place,
            most_length=min(2048, seq_len),
            source=tuned,
        )
        remove(making / "blocks")
        for name in (START, GRIDS):
            if (making / name).exists():
                os.replace(making / name, path / name)
        os.rename(making, base)
    return base
