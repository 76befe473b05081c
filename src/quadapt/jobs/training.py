"""Train an adapter over a base that lies ready, and write it with all that belongs to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quadapt.config import TuneConfig
from quadapt.data import Encoded
from quadapt.errors import ConfigError
from quadapt.hf.adapter_config import identity_of
from quadapt.hf.also import settle
from quadapt.hf.card import CARD, adapter_card
from quadapt.hf.ending import set_ends
from quadapt.hf.folder import Folder
from quadapt.hf.loading import load_model, read_config
from quadapt.hf.saving import write_note
from quadapt.hf.start import GRIDS, START, read_grids, read_start, set_grids, set_start
from quadapt.hf.vocabulary import token_ids
from quadapt.hf.workspace import Workspace
from quadapt.jobs.adapt import adapt, true_bits
from quadapt.jobs.continued import Earlier
from quadapt.jobs.source import device_of, teacher_name, versions
from quadapt.jobs.tasking import Lesson
from quadapt.methods import Recipe, Run
from quadapt.model.trial import check_runs
from quadapt.nn.objective import Teaching
from quadapt.objectives.teacher import KeptTeacher, Teacher
from quadapt.report.memory import measured_peak
from quadapt.report.ui import UI
from quadapt.tasks.base import Collate

if TYPE_CHECKING:
    from quadapt.train import Trained


@dataclass(frozen=True, kw_only=True)
class Over:
    """What an adapter is trained over, and for how long."""

    folder: Folder
    """The model that was given."""

    base: Path
    """The folder of the base: that model, or what was made of it."""

    run: Run
    """The steps that the adapter trains."""

    earlier: Earlier | None = None
    """An adapter to go on from."""

    tuned: Path | None = None
    """The dense model that was tuned first, if one was: the teacher, unless another is given."""

    first: Mapping[str, Any] = field(default_factory=dict)
    """What was measured while the dense model was tuned; empty if it was not."""


def fit(
    config: TuneConfig,
    space: Workspace,
    over: Over,
    lesson: Lesson,
    ui: UI,
) -> dict[str, Any]:
    """Train an adapter, fresh or an earlier one, over a base, and write it; what `quadapt.json` says about it."""
    from quadapt.train import train, trainable_parameters

    device, chosen = device_of(config), config.spec.method
    run = replace(over.run, device=device)
    if chosen.objective.targets is not None:  # the teacher is asked about what is read, and about no more
        sequences = len(lesson.data.data)
        run = replace(run, max_steps=run.steps(sequences))
        lesson = replace(lesson, data=lesson.data.sample(run.reads(sequences), run.seed))
    model, collate = _ready(config, space, over, lesson, ui)
    _say_recipe(chosen.recipe, ui)
    about: Any = model.peft_config["default"]
    ui.say(f"{trainable_parameters(model):,} trainable parameters over {identity_of(about)['base_fingerprint'][:12]}")
    objective: Any = chosen.objective
    if not objective.pairs:
        objective = objective.bind(model, _teacher(config, space, over, model, lesson.data, collate, ui))
    with ui.working("training") as tick, measured_peak(device) as peak:
        trained = train(
            model,
            lesson.data.data,
            run,
            space.path / "checkpoints",
            collate=collate,
            losses=lesson.task.losses(model.config),
            eval_data=None if lesson.held_out is None else lesson.held_out.data,
            objective=objective,
            tick=tick,
        )
        most = peak()
    summary = {**_summary(config, over, model, lesson, trained), "peak_memory": most}
    summary = _written(space, model, lesson.prepare, over.base, over.folder, summary)
    ui.show(
        f"{trained.steps} steps in {trained.seconds:.0f} s, loss {trained.final_loss:.4f}"
        + _held_out_words(trained)
        + f", peak memory {most / 1e6:.0f} MB"
    )
    return summary


def _ready(config: TuneConfig, space: Workspace, over: Over, lesson: Lesson, ui: UI) -> tuple[Any, Collate]:
    """The model with its adapter, as training begins, and what makes batches for it."""
    from transformers.trainer_utils import set_seed

    code, device, earlier = config.trust_remote_code, device_of(config), over.earlier
    quantized = load_model(str(over.base), dtype=config.dtype, device=device, trust_remote_code=code)
    check_runs(quantized)
    set_seed(config.run.seed)
    stored = stored_dtype(config, over.base)
    if earlier is not None:
        model = earlier.attach(quantized, config.spec.method.recipe.dropout, config.spec.also, stored)
        ui.say(f"going on from {earlier.folder.name}")
    else:
        model = adapt(quantized, config.spec, tokens=token_ids(config.train_tokens, lesson.prepare), stored=stored)
    if (space.path / START).exists():
        set_start(model, read_start(space.path / START))
    if (space.path / GRIDS).exists():
        set_grids(model, read_grids(space.path / GRIDS))
    return model, lesson.task.collator(lesson.prepare, quantized)


def _summary(config: TuneConfig, over: Over, model: Any, lesson: Lesson, trained: Trained) -> dict[str, Any]:
    """What `quadapt.json` says about a trained adapter, but for the peak of memory and its files."""
    from quadapt.train import trainable_parameters

    method = config.spec.method
    return {
        "kind": "adapter",
        "task": lesson.task.name,
        "method": method.name,
        "adapter": method.adapter.identity(),
        "recipe": asdict(method.recipe),
        "bits": true_bits(model),
        "data": {**asdict(lesson.data.report), "example": None},
        **({} if over.earlier is None else {"from": over.earlier.about()}),
        "prompt": lesson.data.form.as_dict(),
        **({"tuned_first": dict(over.first)} if over.first else {}),
        "steps": trained.steps,
        "final_loss": trained.final_loss,
        "eval_loss": trained.eval_loss,
        "kept": {"state": config.keeps, "step": trained.kept_step, "eval_loss_at_end": trained.last_eval_loss},
        "seconds": trained.seconds,
        "trainable_parameters": trainable_parameters(model),
        "losses": trained.losses,
        "versions": versions(),
        "settings": config.model_dump(mode="json"),
    }


def _held_out_words(trained: Trained) -> str:
    if trained.eval_loss is None:
        return ""
    if trained.kept_step == trained.steps:
        return f", held-out loss {trained.eval_loss:.4f}"
    return (
        f", held-out loss {trained.eval_loss:.4f} at step {trained.kept_step}, which is kept "
        f"({trained.last_eval_loss:.4f} at the end)"
    )


def _teacher(
    config: TuneConfig, space: Workspace, over: Over, model: Any, data: Encoded, collate: Collate, ui: UI
) -> Teaching | None:
    """Gives what the objective asks of a teacher, from disk or as it goes; None if it asks nothing.

    The teacher is the one that was given, else the dense model that was tuned first, else the full-precision model.
    """
    objective = config.spec.method.objective
    targets = objective.targets
    if targets is None:
        return None
    made = getattr(getattr(model.config, "quantization_config", None), "made", None)
    if made and made.get("tuned_first") and not (over.tuned or config.teacher):
        raise ConfigError(
            f"objective={objective.name!r} needs a teacher, and the dense model that was tuned before it was quantized "
            "is not kept. Say where one is with --teacher, or use --objective cross-entropy"
        )
    source = over.folder.name if made is None else made.get("source")
    name = teacher_name(config, source if over.tuned is None else str(over.tuned))
    device = device_of(config)
    asked = load_model(name, dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code)
    targets.check(model, asked)
    teacher = Teacher(asked.eval(), targets)
    if not objective.keep_targets:
        return teacher
    kept, size = KeptTeacher(space.path / "targets", targets), config.run.batch_size
    starts = range(0, len(data.data), size)
    batches = [
        collate([data.data[at] for at in range(start, min(start + size, len(data.data)))])
        for start in ui.over("reading", list(starts))
    ]
    kept.fill(teacher, batches, lambda todo: ui.over("the teacher's targets", todo))
    return kept


def stored_dtype(config: TuneConfig, base: Path) -> Any:
    """The dtype in which a merge will store floats: the base's own; None if a merge takes that of the computation."""
    if config.spec.method.adapter.base == "float":
        return None  # over another dtype the adapter would not load
    return getattr(read_config(str(base), trust_remote_code=config.trust_remote_code), "dtype", None)


def _written(
    space: Workspace, model: Any, tokenizer: Any, base: Path, folder: Folder, summary: Mapping[str, Any]
) -> dict[str, Any]:
    """Write adapter, tokenizer and note. The note says where the base is: beside the adapter, elsewhere, on the hub."""
    final = space.output.resolve() / "base" if base == space.path / "base" else base.resolve()
    named = str(final) if final.parent == space.output.resolve() or final.exists() else folder.name
    where = {"relative": os.path.relpath(final, space.output.resolve()), "absolute": str(final), "hub": None}
    if folder.kind == "quantized" and not folder.path.exists():
        where = {"relative": None, "absolute": None, "hub": folder.name}
    config = model.peft_config["default"]
    where["fingerprint"] = identity_of(config)["base_fingerprint"]
    model.peft_config["default"] = replace(config, base_model_name_or_path=named)
    inside = model.get_base_model()
    inside.name_or_path = inside.config._name_or_path = named  # by which PEFT's model card names the base
    settle(model)  # the adapter is what was computed with, in whatever dtype it is loaded
    model.save_pretrained(space.path, save_embedding_layers=False)
    tokenizer.save_pretrained(space.path)
    set_ends(model.get_base_model(), tokenizer)
    if getattr(model.get_base_model(), "generation_config", None) is not None:
        model.get_base_model().generation_config.save_pretrained(space.path)
    noted = {**summary, "base": where}
    (space.path / CARD).write_text(adapter_card(noted, base), encoding="utf-8")
    write_note(space.path, noted)
    return noted


def _say_recipe(recipe: Recipe, ui: UI) -> None:
    ui.say(
        f"AdamW, learning rate {recipe.learning_rate:g} ({recipe.schedule}), rank {recipe.rank}, "
        f"alpha {recipe.alpha:g}, dropout {recipe.dropout:g}, gradient norm at most {recipe.max_grad_norm:g}; "
        f"defaults from {recipe.source}"
    )
