"""What a command's model is trained for, and how its rows are read: from settings, folders and their notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadapt.config import TuneConfig
from quadapt.data import Calibration, Encoded
from quadapt.errors import CheckpointError, ConfigError
from quadapt.hf.context import MOST_CONTEXT, positions_of
from quadapt.hf.folder import Folder, find_base, open_folder
from quadapt.hf.kinds import KINDS, Kind, kind_of, kind_of_model
from quadapt.hf.loading import load_processor, read_config
from quadapt.tasks import TASKS, Data, Reading, Task, task_of
from quadapt.tasks.preference import Preferring


@dataclass(frozen=True)
class Lesson:
    """What a model is trained on."""

    task: Task
    """What it is trained for."""

    prepare: Any
    """The tokenizer or processor that makes its inputs."""

    data: Encoded
    """The examples that the model is trained on."""

    held_out: Encoded | None
    """Examples that tell how far it is; None without any."""


_OF_LABELS = ("text_column", "label_column", "labels")
"""Settings of tasks with labels, which are falsy where they are not given."""


def reading_of(config: Any, noted: Mapping[str, Any] | None = None) -> Reading:
    """How rows are read, by the settings of a command, and, where these say nothing, by those that were noted."""
    settings = noted or {}

    def value(name: str, default: Any = None) -> Any:
        given = getattr(config, name, None)
        return given or settings.get(name) or default

    seed = getattr(config, "seed", None)
    return Reading(
        max_bad_rows=getattr(config, "most_bad_rows", None),
        text_columns=tuple(value("text_column", ())),
        label_column=value("label_column"),
        labels=tuple(getattr(config, "labels", ())),
        problem=getattr(config, "problem", "auto"),
        packing=bool(getattr(config, "packing", False)),
        completion_only=bool(getattr(config, "completion_only", True)),
        seed=0 if seed is None else seed,
    )


def kind_in(name: str, base: str | None = None, *, trust_remote_code: bool = False) -> Kind:
    """The kind of model that a folder, hub name or file holds; of an adapter, that of its base.

    Raises:
        CheckpointError: It is not there, or its config.json is damaged or names no known class.
    """
    if Path(name).suffix == ".gguf":
        return KINDS["causal-lm"]
    folder = open_folder(name)
    where = find_base(folder, base) if folder.kind == "adapter" else folder.name
    return kind_of(read_config(where, trust_remote_code=trust_remote_code))


def noted_task(note: Mapping[str, Any], kind: Kind) -> Task:
    """The task that an adapter or a model was trained for, by its note; else what models of its kind do.

    Raises:
        ConfigError: Nothing says what it does.
    """
    name = note.get("task")
    if name not in TASKS and not any(kind.name in each.kinds for each in TASKS.values()):
        raise ConfigError(
            f"a model of the kind {kind.name} does nothing that could be measured by itself. Tune it for a task first "
            f"(quadapt tune --task {' | '.join(TASKS)}), or work with it from Python (quadapt.load)"
        )
    return task_of(name if name in TASKS else None, kind)


def calibrated_on(sources: Sequence[str], name: str, model: Any, config: Any) -> Calibration:
    """Batches of data to calibrate a model on, as what it does makes them.

    Args:
        sources: Files, folders or names of the hub.
        name: Folder or hub name of the model, where its tokenizer or processor lies.
        model: The dense model.
        config: Settings of a command: how long, how many, and how rows are read.

    Raises:
        ConfigError: What the model does is no task, so that nothing says how rows become inputs.
        DataError: The data cannot be read, or are too few.
    """
    kind, code = kind_of_model(model) or KINDS["causal-lm"], config.trust_remote_code
    task, reading = task_of(None, kind), reading_of(config)
    return task.calibration(
        task.read(sources, reading),
        load_processor(name, kind, trust_remote_code=code),
        model,
        length=config.calibration_length or min(positions_of(model), MOST_CONTEXT),
        sequences=config.calibration_sequences,
        at_least=None,
        reading=reading,
    )


def tuned_for(config: TuneConfig, kind: Kind) -> Task:
    """The task of `quadapt tune`.

    Raises:
        ConfigError: It is not clear, or settings have no meaning for it.
    """
    task, objective = task_of(config.task, kind), config.spec.method.objective
    if objective.pairs:
        task = _of_pairs(config, task)
    labelled = any(KINDS[name].labels for name in task.kinds if name in KINDS)
    wrong = [name for name in _OF_LABELS if getattr(config, name) and not labelled]
    wrong += ["problem"] if config.problem != "auto" and not labelled else []
    wrong += [name for name in ("packing", "train_tokens") if getattr(config, name) and task.name != "causal-lm"]
    if wrong:
        raise ConfigError(
            f"{wrong[0]}={getattr(config, wrong[0])!r} has no meaning for the task {task.name}. Leave it out, or name "
            "another task with --task"
        )
    if config.part == "vision" and task.name == "causal-lm":
        raise ConfigError(
            "part='vision': the data are text, of which nothing reaches that part. Use --part all, or train on "
            "pictures (--task image-text-to-text)"
        )
    if objective.targets is not None and task.name != "causal-lm":
        raise ConfigError(
            f"objective={objective.name!r} compares what two models say about each token, and the task is {task.name}. "
            "Use --objective cross-entropy"
        )
    return task


def _of_pairs(config: TuneConfig, task: Task) -> Task:
    """What a language model is trained for by an objective that is about pairs of answers.

    Raises:
        ConfigError: It is no language model, or settings have no meaning for pairs.
    """
    objective = f"objective={config.spec.method.objective.name!r}"
    if task.name != Preferring.name:
        raise ConfigError(
            f"{objective} compares two answers of a language model, and the task is {task.name}. Use --objective "
            "cross-entropy"
        )
    if config.packing:
        raise ConfigError(f"{objective} compares answers sequence by sequence. Leave packing out")
    if not config.completion_only:
        raise ConfigError(f"{objective} compares answers, and prompts bear no loss. Leave completion_only as it is")
    if config.spec.method.tune_first.tunes:
        raise ConfigError(
            f"{objective}: tune_first={config.spec.method.tune_first.name!r} would tune the dense model on single "
            "answers. Tune it by itself, then give what came of it, and --tune-first none"
        )
    if config.spec.method.recipe.dense_steps:
        raise ConfigError(
            f"{objective}: the model that it compares with quantizes from the first step. Leave dense_steps out"
        )
    return Preferring()


def with_head(config: TuneConfig, task: Task, about: Any, kind: Kind, folder: Folder, data: Data) -> TuneConfig:
    """The settings with the head that the data ask for, if the model has none for them.

    Raises:
        CheckpointError: The model is quantized, so that a new head comes too late.
        ConfigError: No head makes it a model for the task.
        DataError: The labels of the data cannot be learnt.
    """
    head = task.head(about, kind, data, reading_of(config))
    if head is not None and folder.kind != "model":
        raise CheckpointError(
            f"{folder.name}: is quantized, and has no head for {task.name} with the labels of the data. Give the dense "
            "model, which gets one"
        )
    return config.with_head(head)
