"""`quadapt eval --tasks`: tasks of EleutherAI's harness on a model in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quadapt.config import EvalConfig
from quadapt.errors import ConfigError, require
from quadapt.jobs.source import load_as_asked
from quadapt.jobs.tasking import kind_in
from quadapt.report.ui import UI

if TYPE_CHECKING:
    from quadapt.harness.measure import Measurement

_OF_ROWS = ("protocol", "stride", "samples", "text_column", "label_column", "max_bad_rows", "strict")
"""Settings of rows of data, which have no meaning for tasks of the harness."""


def by_tasks(config: EvalConfig, ui: UI) -> dict[str, Any]:
    """Measure a model by tasks of the harness; the harness's own results, and what we have to say of them.

    Raises:
        QuadaptError: Input cannot be used, see the message.
    """
    _check(config)
    require("lm_eval", "eval")
    from quadapt.harness.measure import How, measure
    from quadapt.harness.tasks import ready

    kind = kind_in(config.model, config.base, trust_remote_code=config.trust_remote_code)
    if kind.name != "causal-lm":
        raise ConfigError(
            f"model={config.model!r} is of the kind {kind.name}, and tasks of the harness are for causal-lm. Measure "
            "it on rows of its own task with --data"
        )
    chosen = ready(config.tasks, config.task_files, config.few_shot)  # what is missing is said before a model is loaded
    model, tokenizer = load_as_asked(config)
    how = How(
        batch_size=config.batch_size,
        limit=config.limit,
        context=config.context,
        max_new_tokens=config.max_new_tokens if "max_new_tokens" in config.model_fields_set else None,
        chat=config.prompt_form == "chat",
        system=config.system,
    )
    with ui.working("answers") as tick:
        found = measure(model, tokenizer, chosen, how, tick)
    _show(found, ui)
    about = {"kind": "quadapt eval", "model": config.model, "notes": found.notes, "means_of_tasks": found.subject_means}
    return {**about, **found.results}


def _show(found: Measurement, ui: UI) -> None:
    """The figures as a table, the means of groups, and what is to be said of them."""
    rows = [
        (
            "  " * each.depth + each.task,
            "-" if each.shots is None else each.shots,
            each.questions,
            each.metric,
            f"{100 * each.value:.2f}",
            "-" if each.stderr is None else f"{100 * each.stderr:.2f}",
        )
        for each in found.figures
    ]
    ui.table("", ("task", "examples", "questions", "metric", "%", "+-"), rows)
    for name, means in found.subject_means.items():
        for metric in (each for each in means if "_stderr" not in each):
            error = means.get(metric.replace(",", "_stderr,"), 0.0)
            word = f"mean {metric.removesuffix(',none')} over its tasks, which count alike"
            ui.show(f"{name}: {word}, {100 * means[metric]:.2f} +- {100 * error:.2f} %")
    for note in found.notes:
        ui.show(note)


def _check(config: EvalConfig) -> None:
    given = [name for name in _OF_ROWS if name in config.model_fields_set]
    if given:
        raise ConfigError(
            f"{given[0]}={getattr(config, given[0])!r} has no meaning for tasks of the harness. Leave it out"
        )
    if config.prompt_form == "alpaca":
        raise ConfigError(
            "prompt_form='alpaca': the tasks of the harness have prompts of their own. Use prompt or chat"
        )
    if config.system is not None and config.prompt_form != "chat":
        raise ConfigError("system: only a chat template has a place for it. Add --prompt-form chat")
