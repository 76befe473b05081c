"""Tasks of the harness by name: found, given the data of local files where a folder is named, and made ready."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quadapt.errors import ConfigError, DataError, require
from quadapt.harness.files import EXAMPLES, QUESTIONS, Shelf, TaskFiles
from quadapt.harness.forms import FORMS, form_of

FOLDERS = (
    *("mmlu/default", "arc", "piqa", "winogrande", "hellaswag", "super_glue/boolq", "openbookqa", "siqa", "gsm8k"),
)
"""Where the harness keeps the tasks that local files are known for. To read these takes a second; all take minutes."""


@dataclass(frozen=True)
class Ready:
    """Tasks of the harness with their data, ready to be asked."""

    manager: Any
    """The harness's index of tasks."""

    tasks: list[Any]
    """Tasks and groups of tasks, as the harness made them."""

    leaves: dict[str, list[str]]
    """The single tasks that each of the given names stands for: the subjects of mmlu, say."""

    few_shot: int | None
    """How many examples a prompt shows; None for what each task says."""

    notes: list[str]
    """What is to be said of the figures."""


def ready(names: Sequence[str], folder: str | None, few_shot: int | None = None) -> Ready:
    """Find tasks and read their data.

    Args:
        names: Names of tasks, groups or tags of the harness.
        folder: A folder with files of these tasks; None for data of the hub.
        few_shot: How many examples a prompt shows; None for what each task says.

    Raises:
        ConfigError: A name is unknown or given twice, a task has no form for local files, or `few_shot` is more than
            there are examples.
        DataError: Files are missing or cannot be read, or the hub cannot be reached.
        MissingDependency: The harness is not installed.
    """
    require("lm_eval", "eval")
    manager = _index(names)
    leaves = {name: _leaves(manager.task_index, name) for name in names}
    every = [leaf for each in leaves.values() for leaf in each]
    twice = next((leaf for at, leaf in enumerate(every) if leaf in every[:at]), None)
    if twice is not None:
        raise ConfigError(f"the task {twice} is asked twice, by itself or as part of a group. Leave one out")
    notes = [] if folder is None else _with_files(manager, leaves, Shelf(folder))
    tasks: list[Any] = []
    for name in names:
        loaded = _loaded(manager, name, folder)
        for task in loaded["tasks"].values():
            _check_examples(task, few_shot)
        tasks += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return Ready(manager, tasks, leaves, few_shot, notes)


def _index(names: Sequence[str]) -> Any:
    from lm_eval import tasks

    root = Path(str(tasks.__file__)).parent
    quick = tasks.TaskManager(include_defaults=False, include_path=[root / each for each in FOLDERS])
    if all(name in quick.task_index for name in names):
        return quick
    every = tasks.TaskManager()
    for name in names:
        if name not in every.task_index:
            near = difflib.get_close_matches(name, every.all_tasks, cutoff=0.5)
            hint = f"Did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise ConfigError(f"the harness has no task {name!r}. {hint}")
    return every


def _leaves(index: Mapping[str, Any], name: str) -> list[str]:
    """The single tasks that a name stands for."""
    entry = index.get(name)
    kind = entry.kind.name if entry is not None else ""
    if kind == "TAG":
        inside: Sequence[Any] = sorted(entry.tags)  # type: ignore[union-attr] # a tag is an entry
    elif kind == "GROUP" and isinstance(entry.cfg.get("task"), list):  # type: ignore[union-attr]
        inside = entry.cfg["task"]  # type: ignore[union-attr]
    else:
        return [name]
    named = [each if isinstance(each, str) else str(each.get("task") or each.get("group")) for each in inside]
    return [leaf for each in named for leaf in _leaves(index, each)]


def _with_files(manager: Any, leaves: Mapping[str, Sequence[str]], shelf: Shelf) -> list[str]:
    """Give each single task the data of its files; what is to be said of them."""
    from lm_eval.tasks._yaml_loader import load_yaml  # the public names build a task at once, from the hub

    used: dict[str, TaskFiles] = {}
    for name, inside in leaves.items():
        missing = []
        for leaf in inside:
            entry = manager.task_index.get(leaf)
            form = form_of(entry.cfg) if entry is not None and entry.cfg else None
            if form is None or entry is None or entry.yaml_path is None:
                known = ", ".join(["mmlu", *sorted({form.names[0].partition("/")[0] for form in FORMS.values()})])
                raise ConfigError(
                    f"no form of local files is known for the task {leaf}; there are forms for {known}. Measure it "
                    "without --task-files, where there is a network"
                )
            files = shelf.files(entry.cfg, form)
            if files is None:
                missing.append((leaf, form))
                continue
            used[leaf] = files
            config = {**load_yaml(entry.yaml_path), **_changes(files)}
            manager.task_index[leaf] = replace(entry, yaml_path=None, cfg=config)
        if missing:
            leaf, form = missing[0]
            wanted = " or ".join(end.format(split=split) for split in form.asked[:1] for end in form.names)
            part = f"{len(missing)} of its {len(inside)} tasks have no files, " if len(inside) > 1 else ""
            raise DataError(
                f"{shelf.folder}: has not the files of {name}: {part}{leaf} is looked for as {wanted}, in any folder "
                "below. Add it, or name only tasks that are there"
            )
    return _said(used)


def _changes(files: TaskFiles) -> dict[str, Any]:
    """Settings of a task that make it read local files."""
    return {
        "custom_dataset": files,
        "training_split": None,
        "validation_split": None,
        "test_split": QUESTIONS,
        "fewshot_split": QUESTIONS if files.same else EXAMPLES,
        **files.form.changes,
    }


def _said(used: Mapping[str, TaskFiles]) -> list[str]:
    notes = [f"{leaf}: {files.form.note}" for leaf, files in used.items() if files.form.note]
    instead = [
        leaf for leaf, files in used.items() if files.same and Path(files.questions).stem.split("_")[-1] != "test"
    ]
    if instead:
        more = f" and {len(instead) - 1} more tasks" if len(instead) > 1 else ""
        notes.append(
            f"{instead[0]}{more}: {Path(used[instead[0]].questions).name} is all there is, so its rows are asked, and "
            "are the examples as well (never of themselves). These are not the questions that published figures are of"
        )
    return notes


def _loaded(manager: Any, name: str, folder: str | None) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return manager.load([name])
    except (DataError, ConfigError):
        raise
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        if folder is not None:
            raise
        said = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name}: its data cannot be had from the hub ({said}). Without a network, give files of it with "
            "--task-files DIR"
        ) from error


def _check_examples(task: Any, few_shot: int | None) -> None:
    """Raise ConfigError if there are fewer examples than a prompt is to show."""
    own = task.config.num_fewshot
    shown = own or 0 if few_shot is None or own == 0 else few_shot
    files = task.config.custom_dataset
    sampler = getattr(task, "sampler", None)
    if not shown or sampler is None or not isinstance(files, TaskFiles):
        return
    most = len(sampler.df) - files.same
    if shown > most:
        among = f"the others among the {len(sampler.df)} questions" if files.same else "those in the file"
        raise ConfigError(
            f"{task.config.task}: {shown} examples are to be shown, and there are {most}, {among} "
            f"({Path(files.examples).name}). Use --few-shot {most} or fewer"
        )
