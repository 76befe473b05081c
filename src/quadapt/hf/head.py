"""A new head over a model that has none for a task, or another one: a classifier over a pretrained encoder.

The head is drawn at random when the dense model is loaded, by a seed; from then on the base has it like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from quadapt.hf.kinds import Kind, class_of
from quadapt.model.select import heads

Problem = Literal["single-label", "multi-label", "regression"]
"""What labels are: one of several, any of several, or a number."""

PROBLEMS: dict[Problem, str] = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""What `problem_type` is for each in `config.json`."""


@dataclass(frozen=True)
class Head:
    """A head that a model is to get when it is loaded."""

    kind: Kind
    """The kind of model that it becomes by it."""

    labels: tuple[str, ...]
    """The names of its labels, in order; empty for a number."""

    problem: Problem
    """Whether its labels are one of several, any of several, or a number."""

    seed: int = 0
    """The seed by which it is drawn at random."""

    def onto(self, config: Any) -> Any:
        """A copy of a model's config that names the class with this head, and its labels.

        Raises:
            CheckpointError: The model's family has no such class.
        """
        made = copy.deepcopy(config)
        made.architectures = [class_of(made, self.kind)]
        made.num_labels = max(1, len(self.labels))
        made.id2label = dict(enumerate(self.labels or ("value",)))
        made.label2id = {name: number for number, name in made.id2label.items()}
        made.problem_type = PROBLEMS[self.problem]
        text = made.get_text_config()
        if getattr(text, "pad_token_id", None) is None and hasattr(text, "eos_token_id"):
            ends = text.eos_token_id  # what is behind a text is told from it by this token
            text.pad_token_id = ends[0] if isinstance(ends, list) else ends
        return made

    def draw(self, model: Any) -> None:
        """Draw the head of a model at random, as its class does; one of the same shape may have been in the files.

        A pooler stays as it was loaded, if it was. Random numbers go on outside as if nothing had been.
        """
        with self.drawn():
            for name, head in heads(model).items():
                if name.startswith(f"{model.base_model_prefix}."):
                    continue
                for module in head.modules():
                    for parameter in module.parameters(recurse=False):
                        parameter._is_hf_initialized = False  # type: ignore[attr-defined] # as transformers marks them
                    model._init_weights(module)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Inside, what is drawn at random is this head; random numbers go on outside as if nothing had been."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            yield


def labels_of(config: Any) -> tuple[str, ...]:
    """The names of the labels that a model knows, in order."""
    named: Mapping[Any, Any] = getattr(config, "id2label", None) or {}
    return tuple(str(named[number]) for number in sorted(named, key=int))


def problem_of(config: Any) -> Problem:
    """What the labels of a model are, as its config says it, or as their number tells it."""
    said = getattr(config, "problem_type", None)
    found: Problem | None = next((name for name, word in PROBLEMS.items() if word == said), None)
    return found or ("regression" if getattr(config, "num_labels", 2) == 1 else "single-label")


def without_heads(info: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What transformers says about loading a model, without what is said of its new head, and of the old one.

    Args:
        info: `output_loading_info`: keys that are missing, too many, or of another shape.
        model: With its new head.
    """
    own, prefix = tuple(f"{name}." for name in heads(model)), getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, model)
    inside = {prefix, *(name for name, _ in body.named_children() if name != "pooler")}

    def of_a_head(name: str) -> bool:
        parts = name.removeprefix(f"{prefix}.").split(".")
        return name.startswith(own) or parts[0] == "pooler" or name.split(".")[0] not in inside

    return {
        "missing_keys": _kept(info["missing_keys"], own),
        "unexpected_keys": {name for name in info["unexpected_keys"] if not of_a_head(name)},
        "mismatched_keys": [each for each in info["mismatched_keys"] if not each[0].startswith(own)],
    }


def _kept(names: Collection[str], own: Sequence[str]) -> set[str]:
    return {name for name in names if not name.startswith(tuple(own))}
