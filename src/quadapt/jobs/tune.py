"""`quadapt tune`: quantize a model if it is not yet, train an adapter over it, write both into one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quadapt.config import TuneConfig
from quadapt.data import Collator, Encoded, Rows, check_loss, encode, pad_token_id, read, split_rows
from quadapt.errors import CheckpointError, ConfigError
from quadapt.hf.context import context_of
from quadapt.hf.folder import NOTE, Folder, load_model, load_tokenizer, open_folder, read_config
from quadapt.hf.peft_layer import identity_of
from quadapt.hf.quantizer import fingerprint_of
from quadapt.hf.start import START, read_start, set_start
from quadapt.hf.workspace import Workspace, check_output, remove, write_json
from quadapt.jobs import dry
from quadapt.jobs.adapt import adapt, true_bits
from quadapt.jobs.quantize import quantize_into
from quadapt.jobs.source import Place, dense_folder, device_of, held_out, job_of, versions
from quadapt.methods import Recipe
from quadapt.objectives import RILQ, KeptTeacher, Teacher
from quadapt.report.memory import measured_peak
from quadapt.report.ui import UI

MOST_LENGTH = 1024
"""Longest default training sequence, in tokens."""


def tune(config: TuneConfig, ui: UI) -> dict[str, Any]:
    """Run the command.

    Raises:
        QuadaptError: Input cannot be used, see the message.
    """
    folder, device, chosen = open_folder(config.model), device_of(config), config.chosen_method()
    _check(config, folder)
    about = read_config(folder.name, trust_remote_code=config.trust_remote_code)
    seq_len = config.seq_len or min(context_of(about), MOST_LENGTH)
    if seq_len > context_of(about):
        ui.say(f"warning: seq_len={seq_len} is beyond the {context_of(about)} positions that the model was made for")
    if config.dry_run:
        return dry.tune(config, ui, seq_len=seq_len)
    inputs = [config.model, config.data, config.eval_data, config.calibration_data]
    inputs += [config.plan] if config.plan else []
    check_output(Path(config.output), overwrite=config.overwrite, inputs=inputs)
    tokenizer = load_tokenizer(folder.name, trust_remote_code=config.trust_remote_code)
    rows, held = _rows(config)
    data = _encoded(config, rows, held, tokenizer, seq_len, ui)
    calibration = read(config.calibration_data) if config.calibration_data else rows
    found = dry.sketch(folder.name, config)
    place = Place(device, device)
    if folder.kind == "model" and chosen.adapter.base != "float":
        place = dry.place_of(config, folder.name, device, ui, most_length=seq_len)
    needs = found.bytes_on_disk if folder.kind == "model" and chosen.adapter.base != "float" else 0
    dry.check_fits(dry.tuning(config, found, seq_len=seq_len), device, ui)
    job = job_of("tune", config.model_dump(mode="json"), inputs)
    with Workspace(Path(config.output), job, overwrite=config.overwrite, needs=needs) as space:
        if space.resumed:
            ui.say(f"going on with {space.path}")
        base = folder.path
        if folder.kind == "model" and chosen.adapter.base != "float":
            base = _make_base(space.path, config, ui, place, calibration, seq_len)
        summary = _train(config, space, base, folder, tokenizer, data, ui)
        space.commit("checkpoints", "targets", START)
    next_step = "merge" if chosen.adapter.exactness != "none" else "export --format lora"
    ui.say(f"wrote {config.output}. Next: quadapt {next_step} {config.output} --output FOLDER")
    return {"output": config.output, **summary}


def _check(config: TuneConfig, folder: Folder) -> None:
    """Raise QuadaptError if the settings do not go with what the folder holds."""
    chosen = config.chosen_method()
    if folder.kind == "adapter":
        raise CheckpointError(
            f"{config.model!r} is an adapter. To train on, merge it first: quadapt merge {config.model} --output FOLDER"
        )
    if folder.kind == "quantized" and config.given():
        raise ConfigError(
            f"{config.given()[0]} has no meaning here: {config.model!r} is quantized already. Leave it out, or give "
            "the dense model"
        )
    if config.offload != "auto" and (folder.kind == "quantized" or chosen.adapter.base == "float"):
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
    if folder.kind == "quantized" and chosen.start.name != "zero":
        raise ConfigError(
            f"start={chosen.start.name!r} fits what quantization changes, and {config.model!r} is quantized already. "
            "Give the dense model, or use --start zero"
        )


def _rows(config: TuneConfig) -> tuple[Rows, Rows | None]:
    """Rows to train on, and held-out ones."""
    rows = read(config.data)
    if config.eval_data:
        return rows, held_out(config.eval_data)
    return split_rows(rows, config.eval_split, config.seed) if config.eval_split else (rows, None)


def _encoded(
    config: TuneConfig, rows: Rows, held: Rows | None, tokenizer: Any, seq_len: int, ui: UI
) -> tuple[Encoded, Encoded | None]:
    """Training and held-out sequences; says what became of the data, and shows one example with its mask."""
    data = encode(rows, tokenizer, seq_len=seq_len, packing=config.packing, completion_only=config.completion_only)
    for line in data.report.lines():
        ui.say(line)
    ui.say(f"an example: {data.report.example}")
    check_loss(data.report)
    if held is None:
        return data, None
    kept = encode(held, tokenizer, seq_len=seq_len, packing=config.packing, completion_only=config.completion_only)
    check_loss(kept.report)
    ui.say(f"held out: {kept.report.lines()[0]}")
    return data, kept


def _make_base(path: Path, config: TuneConfig, ui: UI, place: Place, calibration: Rows, seq_len: int) -> Path:
    """The quantized base, made inside the output folder unless an interrupted run has made it."""
    base = path / "base"
    if not base.exists():
        making = path / "base.partial"
        making.mkdir(exist_ok=True)
        quantize_into(
            making,
            config,
            ui,
            target_modules=(),
            calibration_rows=calibration,
            place=place,
            seed=config.seed,
            most_length=min(2048, seq_len),
        )
        remove(making / "blocks")
        if (making / START).exists():
            os.replace(making / START, path / START)
        os.rename(making, base)
    return base


def _train(
    config: TuneConfig,
    space: Workspace,
    base: Path,
    folder: Folder,
    tokenizer: Any,
    data: tuple[Encoded, Encoded | None],
    ui: UI,
) -> dict[str, Any]:
    from transformers.trainer_utils import set_seed

    from quadapt.train import Run, train, trainable_parameters

    device, chosen = device_of(config), config.chosen_method()
    quantized = load_model(str(base), dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code)
    set_seed(config.seed)
    model = adapt(quantized, config)
    if (space.path / START).exists():
        set_start(model, read_start(space.path / START))
    _say_recipe(chosen.recipe, ui)
    ui.say(f"{trainable_parameters(model):,} trainable parameters over {fingerprint_of(quantized)[:12]}")
    fields = {
        name: getattr(config, name) for name in Run.__dataclass_fields__ if hasattr(config, name) and name != "device"
    }
    objective = _objective(config, space, model, data[0], Collator(pad_token_id(tokenizer)), ui)
    run = Run(recipe=chosen.recipe, device=device, **fields)
    with ui.working("training") as tick, measured_peak(device) as peak:
        trained = train(
            model,
            data[0].data,
            run,
            space.path / "checkpoints",
            collate=Collator(pad_token_id(tokenizer)),
            eval_data=None if data[1] is None else data[1].data,
            objective=objective,
            tick=tick,
        )
        most = peak()
    summary = {
        "kind": "adapter",
        "method": config.method,
        "adapter": chosen.adapter.identity(),
        "recipe": asdict(chosen.recipe),
        "bits": true_bits(model),
        "data": {**asdict(data[0].report), "example": None},
        "steps": trained.steps,
        "final_loss": trained.final_loss,
        "eval_loss": trained.eval_loss,
        "seconds": trained.seconds,
        "peak_memory": most,
        "trainable_parameters": trainable_parameters(model),
        "losses": trained.losses,
        "versions": versions(),
        "settings": config.model_dump(mode="json"),
    }
    _write(space, model, tokenizer, base, folder, summary)
    ui.show(
        f"{trained.steps} steps in {trained.seconds:.0f} s, loss {trained.final_loss:.4f}"
        + (f", held-out loss {trained.eval_loss:.4f}" if trained.eval_loss is not None else "")
        + f", peak memory {most / 1e6:.0f} MB"
    )
    return summary


def _objective(
    config: TuneConfig, space: Workspace, model: Any, data: Encoded, collate: Collator, ui: UI
) -> RILQ | None:
    """RILQ's objective, if it is asked for: with targets from disk, or from the teacher as it goes."""
    if config.objective == "cross-entropy":
        return None
    quantized = getattr(model.config, "quantization_config", None)
    name = config.teacher or (quantized.made.get("source") if quantized else config.model)
    if not name:
        raise ConfigError("objective='rilq' needs the full-precision model. Say where it is with --teacher")
    dense_folder(name)
    device = device_of(config)
    teacher = Teacher(load_model(name, dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code))
    if not config.keep_targets:
        return RILQ(model, teacher)
    kept, size = KeptTeacher(space.path / "targets"), config.batch_size
    starts = range(0, len(data.data), size)
    batches = [
        collate([data.data[at] for at in range(start, min(start + size, len(data.data)))])
        for start in ui.over("reading", list(starts))
    ]
    kept.fill(teacher, batches, lambda todo: ui.over("the teacher's targets", todo))
    return RILQ(model, kept)


def _write(
    space: Workspace, model: Any, tokenizer: Any, base: Path, folder: Folder, summary: Mapping[str, Any]
) -> None:
    """Adapter, tokenizer, and where the base is: beside the adapter, at its present place, or on the hub."""
    final = space.output.resolve() / "base" if base == space.path / "base" else base.resolve()
    named = str(final) if final.parent == space.output.resolve() or final.exists() else folder.name
    where = {"relative": os.path.relpath(final, space.output.resolve()), "absolute": str(final), "hub": None}
    if folder.kind == "quantized" and not folder.path.exists():
        where = {"relative": None, "absolute": None, "hub": folder.name}
    config = model.peft_config["default"]
    where["fingerprint"] = identity_of(config)["base_fingerprint"]
    model.peft_config["default"] = replace(config, base_model_name_or_path=named)
    model.save_pretrained(space.path, save_embedding_layers=False)
    tokenizer.save_pretrained(space.path)
    write_json(space.path / NOTE, {**summary, "base": where})


def _say_recipe(recipe: Recipe, ui: UI) -> None:
    ui.say(
        f"AdamW, learning rate {recipe.learning_rate:g} ({recipe.schedule}), rank {recipe.rank}, "
        f"alpha {recipe.alpha:g}, dropout {recipe.dropout:g}, gradient norm at most {recipe.max_grad_norm:g}; "
        f"defaults from {recipe.source}"
    )
