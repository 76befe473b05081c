"""Runs tasks of the harness on a model in memory, and makes figures of what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from quadapt.harness.tasks import Ready


@dataclass(frozen=True)
class Figure:
    """One metric of a task or of a group of tasks."""

    task: str
    """The name of the task in the harness."""

    depth: int
    """How many groups it is part of."""

    questions: int
    """How many questions were asked."""

    shots: int | None
    """How many examples a prompt showed; None for a group whose tasks differ."""

    metric: str
    """The metric, with the harness's filter of answers if it is not the usual one."""

    value: float
    """The figure: of a group, the mean over all questions."""

    stderr: float | None
    """The standard error of the figure; None if the harness gives none."""


@dataclass(frozen=True, kw_only=True)
class How:
    """How a model is asked."""

    batch_size: int = 8
    """How many sequences go through the model at once."""

    limit: int | None = None
    """Ask only so many questions of each task."""

    context: int | None = None
    """Tokens that the model sees at once; None for its own context. Longer prompts lose their beginning."""

    max_new_tokens: int | None = None
    """The most tokens of an answer that is generated; None for what the task says."""

    chat: bool = False
    """Whether prompts are put through the tokenizer's chat template."""

    system: str | None = None
    """A system message for the template."""


@dataclass(frozen=True)
class Measurement:
    """What came of a run of the harness."""

    results: dict[str, Any]
    """All that the harness says, in its own form, as JSON."""

    figures: list[Figure]
    """The figures of all tasks, each below its group."""

    subject_means: dict[str, dict[str, float]]
    """For each group the mean over its tasks, which count alike, by metric, with its standard error."""

    notes: list[str] = field(default_factory=list)
    """What is to be said of the figures."""


def measure(model: Any, tokenizer: Any, tasks: Ready, how: How, tick: Any = None) -> Measurement:
    """Measure a model by tasks of the harness, with its own prompts, metrics and seeds.

    ::

        from quadapt.harness.measure import How, measure
        from quadapt.harness.tasks import ready

        model, tokenizer = quadapt.load("merged")
        found = measure(model, tokenizer, ready(["mmlu"], "data", few_shot=5), How(batch_size=16))

    Args:
        model: A causal language model of transformers, on any device.
        tokenizer: Its tokenizer.
        tasks: The tasks, with their data.
        how: How they are asked.
        tick: Told how many requests have been answered, and how many there are.

    Raises:
        ConfigError: The model is no causal language model, or its context is too short for an answer.
        DataError: A choice has more tokens than the model's context.
    """
    from lm_eval import evaluator
    from lm_eval.utils import handle_non_serializable

    from quadapt.harness.lm import QuadaptLM

    lm = QuadaptLM(model, tokenizer=tokenizer, batch_size=how.batch_size, max_length=how.context, tick=tick)
    # The harness asks git about the working folder, whatever that is; outside of a checkout git complains.
    with mock.patch.object(evaluator, "get_git_commit_hash", return_value=None):
        found = evaluator.simple_evaluate(
            model=lm,
            tasks=tasks.tasks,
            num_fewshot=tasks.few_shot,
            batch_size=how.batch_size,
            limit=how.limit,
            log_samples=False,
            system_instruction=how.system,
            apply_chat_template=how.chat,
            gen_kwargs=None if how.max_new_tokens is None else {"max_gen_toks": how.max_new_tokens},
            task_manager=tasks.manager,
        )
    results = dict(json.loads(json.dumps(found, default=handle_non_serializable)))
    notes = list(tasks.notes)
    if lm.cut:
        notes.append(
            f"{lm.cut} of {lm.requests} prompts are longer than the model's context of {lm.max_length} tokens, and "
            "lost their beginning"
        )
    shots, few_shot = results["n-shot"], tasks.few_shot
    fixed = [name for name in tasks.leaves if few_shot is not None and shots.get(name, few_shot) != few_shot]
    notes += [
        f"{name}: is asked with {shots[name]} examples whatever is given, as the harness has it" for name in fixed
    ]
    groups = {name: leaves for name, leaves in tasks.leaves.items() if name in results.get("groups", {})}
    means = {name: _mean(results["results"], leaves) for name, leaves in groups.items()}
    known = {*results["results"], *results["group_subtasks"]}  # of a tag, the harness knows the tasks alone
    shown = [each for name, leaves in tasks.leaves.items() for each in ([name] if name in known else leaves)]
    return Measurement(results, figures(results, shown), means, notes)


def figures(results: Mapping[str, Any], names: Sequence[str], depth: int = 0) -> list[Figure]:
    """The figures of tasks, and below each group those of its parts, in the harness's order."""
    found = []
    for name in names:
        inside = results["group_subtasks"].get(name, ())
        about = results["results"].get(name, {})
        for key, value in about.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = about.get(f"{metric}_stderr,{filter_}")
            found.append(
                Figure(
                    task=name,
                    depth=depth,
                    questions=_questions(results, name),
                    shots=_shots(results, name),
                    metric=metric if filter_ == "none" else f"{metric} ({filter_})",
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                )
            )
        found += figures(results, list(inside), depth + 1)
    return found


def _shots(results: Mapping[str, Any], name: str) -> int | None:
    inside = {_shots(results, each) for each in results["group_subtasks"].get(name, ())}
    return results["n-shot"].get(name) if not inside else inside.pop() if len(inside) == 1 else None


def _questions(results: Mapping[str, Any], name: str) -> int:
    inside = results["group_subtasks"].get(name, ())
    if inside:
        return sum(_questions(results, each) for each in inside)
    return int(results["n-samples"].get(name, {}).get("effective", 0))


def _mean(results: Mapping[str, Mapping[str, Any]], leaves: Sequence[str]) -> dict[str, float]:
    """The mean over tasks by metric, and `<metric>_stderr`, from standard errors of independent means."""
    found = {}
    for key in results[leaves[0]]:
        metric, comma, filter_ = key.partition(",")
        values = [results[leaf].get(key) for leaf in leaves]
        if not comma or not all(isinstance(value, int | float) for value in values):
            continue
        numbers = [float(value) for value in values]  # type: ignore[arg-type] # checked above
        if metric.endswith("_stderr"):
            found[f"{metric},{filter_}"] = math.sqrt(math.fsum(each**2 for each in numbers)) / len(numbers)
        else:
            found[f"{metric},{filter_}"] = math.fsum(numbers) / len(numbers)
    return found
