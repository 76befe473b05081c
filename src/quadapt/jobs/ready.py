"""What can be known before the work begins, so that hours of it are not followed by an error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from quadapt.config import TuneConfig
from quadapt.data import Encoded, check_packing
from quadapt.errors import ConfigError, DataError
from quadapt.hf.context import learnt_positions, positions_of
from quadapt.hf.ending import turn_end
from quadapt.hf.loading import load_model
from quadapt.hf.vocabulary import alike, check_vocabulary, embedding_rows, special_tokens, token_ids
from quadapt.jobs.dry import Sketch
from quadapt.jobs.tasking import Lesson
from quadapt.report.ui import UI

_CHECKPOINTS = 3
"""Checkpoints on disk at once: two are kept while the next one is written."""

_STATES = 3
"""An adapter's size in a checkpoint: itself, and two moments of AdamW."""


def check_reporter(name: str) -> None:
    """Raise ConfigError if Trainer cannot report to `name`, which it would find out when training begins."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise ConfigError(f"report_to={name!r} is unknown. Use none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
    if name not in get_available_reporting_integrations() and name != "flyte":
        raise ConfigError(
            f"report_to={name!r} needs a package that is not installed. Install it (pip install "
            f"{name.replace('_', '-').removesuffix('-ml')}), or use --report-to none"
        )


def check_length(model: nn.Module, length: int, name: str, ui: UI) -> None:
    """Refuse sequences that are longer than a table of positions; warn of those longer than the model was made for.

    Raises:
        ConfigError: The model has learnt its positions one by one, and `length` exceeds them.
    """
    most, table = positions_of(model), learnt_positions(model)
    if table is not None and length > most:
        raise ConfigError(f"{name}={length}: the model has a table of {most} positions ({table}). Use {most} or less")
    if length > most:
        ui.say(f"warning: {name}={length} is beyond the {most} positions that the model was made for")


def check_ids(data: Encoded, rows: int) -> None:
    """Raise DataError if a token of the data has no row in the model."""
    highest = max((max(ids) for ids in data.data["input_ids"] if len(ids)), default=0)
    if highest >= rows:
        raise DataError(f"{data.report.source}: holds token {highest}, and the model has {rows:,} rows of embeddings")


def look_over(config: TuneConfig, found: Sketch, base: str, lesson: Lesson, ui: UI) -> None:
    """Hold data and settings against the model, and say what will not be learnt.

    Raises:
        CheckpointError: The tokenizer is another model's.
        ConfigError: A setting cannot work on this model.
        DataError: The data hold tokens that the model lacks.
    """
    tokenizer, data = lesson.prepare, lesson.data
    if "input_ids" not in data.data.column_names:
        return
    rows = embedding_rows(found.model)
    word = check_vocabulary(tokenizer, rows)
    if word:
        ui.say(word)
    for part in (data, lesson.held_out):
        if part is not None:
            check_ids(part, rows)
    if lesson.task.name != "causal-lm":
        return
    if tokenizer.chat_template and data.form.kind in ("prompt", "alpaca"):
        ui.say(
            "warning: the model has a chat template, and is trained on prompts without it "
            f"({data.form.kind}). chat and eval will ask so too; to train it as a chat model, give messages"
        )
    trained = set(token_ids(config.train_tokens, tokenizer))
    marks = _marks_with_loss(data, tokenizer) - trained
    packed = config.packing and "position_ids" in data.data.column_names
    if not marks and not packed:
        return
    model = load_model(base, trust_remote_code=config.trust_remote_code)  # mapped: only what is looked at is read
    if packed:
        check_packing(model)
    _say_unlearnable(model, tokenizer, marks, ui)


def _marks_with_loss(data: Encoded, tokenizer: Any) -> set[int]:
    labels = data.data.with_format("numpy")["labels"]
    found: set[int] = set()
    for part in labels:
        found |= set(np.unique(part).tolist())
    return found & special_tokens(tokenizer)


def _say_unlearnable(model: nn.Module, tokenizer: Any, marks: set[int], ui: UI) -> None:
    """Warn of marks whose output row is that of other tokens: a frozen head cannot tell them apart."""
    ends = {tokenizer.eos_token_id, turn_end(tokenizer)}
    for token in sorted(marks):
        others = alike(model, token)
        if others:
            name = tokenizer.convert_ids_to_tokens(token)
            ui.say(
                f"warning: the output row of {name!r} (token {token}), which bears loss, is the same as that of "
                f"{others} other tokens, and the head is frozen: the loss on it cannot go below ln {others + 1} = "
                f"{math.log(others + 1):.2f}{', and answers will not end' if token in ends else ''}. To train the row: "
                f"--train-tokens '{name}'"
            )


def disk_needs(config: TuneConfig, found: Sketch, adapter: int, tokens: int, *, quantizes: bool) -> int:
    """Bytes that tuning writes, beside what an interrupted run has written already.

    Args:
        config: The settings, which decide what is kept.
        found: The quantized model, as shapes.
        adapter: The bytes of the parameters that train.
        tokens: How many tokens the run reads, each counted once.
        quantizes: Whether the base is made here: by block first, then as a whole.
    """
    best = config.keeps == "best"
    needs = adapter * (1 + _CHECKPOINTS * (_STATES + best)) + 2 * found.bytes_on_disk * quantizes
    objective = config.spec.method.objective
    if objective.targets is not None and objective.keep_targets:
        needs += tokens * objective.targets.token_bytes(found.model)
    partial = Path(config.output).with_name(Path(config.output).name + ".partial")
    written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0
    return max(0, needs - written)
