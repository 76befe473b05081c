"""Examples of a task as datasets, the account of what they were made from, and batches of them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quadapt.calibrate import Batch, named
from quadapt.data import Calibration, DataReport, Encoded, PromptForm, split_rows
from quadapt.data.tables import Table
from quadapt.errors import DataError
from quadapt.tasks.base import Collate, Data, Progress, Reading, Task

CALIBRATION_BATCH = 8
"""How many examples go through the model at once while it is calibrated."""


@dataclass(frozen=True, kw_only=True)
class TaskReport(DataReport):
    """What became of rows with labels, or with something else that is to be said about them."""

    unit: str = "labels"
    """What `loss_tokens` counts, in the plural."""

    def lines(self) -> list[str]:
        cut = f"{self.truncated:,} truncated ({self.tokens_lost:,} tokens lost)" if self.truncated else ""
        dropped = f"{self.dropped:,} dropped" if self.dropped else ""
        length = f" of at most {self.seq_len:,} tokens" if self.tokens else ""
        return [
            f"{self.source}: {self.examples:,} rows ({self.kind}), {self.sequences:,} examples{length}, "
            f"{self.loss_tokens:,} {self.unit}",
            *(["; ".join(each for each in (cut, dropped) if each)] if cut or dropped else []),
            *self.notes,
        ]


def encoded(
    kind: str,
    data: Any,
    examples: Any,
    *,
    length: int,
    tally: Counter[str],
    unit: str,
    example: str,
    form: PromptForm | None = None,
) -> Encoded:
    """Examples with an account of them.

    Args:
        kind: The name of the task.
        data: The rows that they were made from.
        examples: A dataset of the examples.
        length: The most tokens that one may have.
        tally: Counts by name: tokens, loss, truncated, lost, dropped.
        unit: What bears loss, in the plural.
        example: The first example, in words.
        form: The form of the prompts, if there are any.

    Raises:
        DataError: There is no example.
    """
    if not len(examples):
        raise DataError(f"{data.source}: no row can be used. {'; '.join(data.notes)}".rstrip())
    report = TaskReport(
        source=data.source,
        kind=kind,
        seq_len=length,
        packing=False,
        examples=len(data),
        sequences=len(examples),
        tokens=tally["tokens"],
        loss_tokens=tally["loss"],
        unknown=tally["unknown"],
        truncated=tally["truncated"],
        tokens_lost=tally["lost"],
        dropped=tally["dropped"],
        skipped=data.bad.count,
        notes=(*data.notes, *data.bad.notes()),
        example=example,
        unit=unit,
    )
    return Encoded(examples, report, form or PromptForm("text"))


class ByExamples(Task):
    """A task of which each row is an example by itself: such rows calibrate, too."""

    def split(self, data: Any, share: float, seed: int) -> tuple[Data, Data]:
        return data.split(share, seed) if isinstance(data, Table) else split_rows(data, share, seed)

    def calibration(
        self,
        data: Any,
        prepare: Any,
        model: Any,
        *,
        length: int,
        sequences: int,
        at_least: int | None,
        reading: Reading,
    ) -> Calibration:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(reading.seed)).tolist()
        some = data.select(order[:sequences])
        found = self.encode(some, prepare, model.config, length=length, reading=reading)
        collate, count = self.collator(prepare, model), len(found.data)
        batches: list[Batch] = [
            dict(collate([found.data[at] for at in range(start, min(start + CALIBRATION_BATCH, count))]))
            for start in range(0, count, CALIBRATION_BATCH)
        ]
        lengths = [inputs["input_ids"].shape[1] for inputs in map(named, batches) if "input_ids" in inputs]
        return Calibration(batches, count, int(max(lengths, default=1)), found.report.source)


def taken(model: Any, collate: Collate) -> Collate:
    """A collator without what the model's forward has no place for (token types, mostly)."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = {*inspect.signature(type(inside).forward).parameters, "labels"}

    def batch(examples: Sequence[Any]) -> Mapping[str, Any]:
        return {name: value for name, value in collate(examples).items() if name in known}

    return batch


def padding(tokenizer: Any, model: Any) -> Any:
    """A tokenizer that pads: with its own token, else with the model's, else with the end of a text.

    Raises:
        DataError: There is none of these.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer
    about = model.config.get_text_config()
    number = next(
        (each for each in (getattr(about, "pad_token_id", None), tokenizer.eos_token_id) if isinstance(each, int)), None
    )
    if number is None:
        raise DataError(
            "the tokenizer has neither a pad token nor an end-of-sequence token. Set tokenizer.pad_token to one of "
            "its tokens"
        )
    import copy

    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.convert_ids_to_tokens(number)
    return padded


def answered(
    model: Any, found: Encoded, collate: Collate, batch: int, progress: Progress
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of examples, batch by batch, on the CPU; logits as the model gives them."""
    from quadapt.evaluate import evaluating

    device = next(model.parameters()).device
    count = len(found.data)
    with evaluating(model):
        for at in progress(list(range(0, count, batch))):
            inputs = dict(collate([found.data[each] for each in range(at, min(at + batch, count))]))
            labels = inputs.pop("labels")
            logits = model(**{name: value.to(device) for name, value in inputs.items()}).logits
            yield logits.cpu(), labels
