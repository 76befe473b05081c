"""Classifying texts, and pairs of texts: one label, several, or a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset

from quadapt.data import Encoded
from quadapt.data.messages import check_text
from quadapt.data.tables import Cells, Table, column_of, read_table
from quadapt.errors import DataError
from quadapt.hf.head import Head
from quadapt.hf.kinds import Kind
from quadapt.tasks import metrics
from quadapt.tasks.base import TASKS, Asking, Collate, Losses, Measured, Reading
from quadapt.tasks.examples import ByExamples, answered, encoded, padding, taken
from quadapt.tasks.labels import LABEL, Labels, head_for, label_cell, told

TEXT = ("text", "sentence", "content", "document", "review", "comment", "tweet")
"""The names under which a text is looked for, the usual one first."""

PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"))
"""The names of pairs of texts in the benchmarks that have them."""


@TASKS.register("sequence-classification")
class SequenceClassification(ByExamples):
    """A model gives a text its label: one of several, any of several, or a number."""

    summary: ClassVar[str] = "to give a text, or a pair of texts, its label"
    kinds: ClassVar[tuple[str, ...]] = ("sequence-classification",)

    def read(self, sources: Sequence[str], reading: Reading, *, held_out: bool = False) -> Table:
        def find(cells: Cells) -> dict[str, str]:
            return _columns(cells, reading)

        return read_table(sources, find, _checked, held_out=held_out, max_bad_rows=reading.max_bad_rows)

    def head(self, config: Any, kind: Kind, data: Table, reading: Reading) -> Head | None:
        return head_for(self.kinds, config, kind, told(data), data.source, reading)

    def encode(self, data: Table, prepare: Any, config: Any, *, length: int, reading: Reading) -> Encoded:
        labels, tally = Labels(config), Counter[str]()
        targets = [labels.target(row["label"], where) for row, where in zip(data.rows, data.where, strict=True)]
        texts = [[row[name] for row in data.rows] for name in ("text", "pair") if name in data.columns]
        whole = prepare(*texts, verbose=False)["input_ids"]
        ids = prepare(*texts, truncation=True, max_length=length)
        for before, after in zip(whole, ids["input_ids"], strict=True):
            tally.update(tokens=len(after), loss=1, truncated=len(before) > len(after), lost=len(before) - len(after))
        examples = Dataset.from_dict({**{name: ids[name] for name in ids}, "labels": targets})
        first = " | ".join(column[0][:200] for column in texts) + f" -> {data.rows[0]['label']}"
        return encoded(self.name, data, examples, length=length, tally=tally, unit="labels", example=first)

    def collator(self, prepare: Any, model: Any) -> Collate:
        from transformers import DataCollatorWithPadding

        pad = DataCollatorWithPadding(padding(prepare, model))
        return taken(model, lambda examples: pad(list(examples)))

    def losses(self, config: Any) -> Losses:
        return Labels(config).losses()

    def measure(self, model: Any, prepare: Any, data: Table, asking: Asking) -> Measured:
        """Accuracy, F1 and Matthews correlation; of values the squared error and correlations."""
        labels = Labels(model.config)
        found = self.encode(data, prepare, model.config, length=asking.length, reading=Reading())
        return measured(model, labels, found, self.collator(prepare, model), asking)


def measured(model: Any, labels: Labels, found: Encoded, collate: Collate, asking: Asking) -> Measured:
    """The loss and the figures of a classifier that gives each example its label, or its value.

    Raises:
        DataError: The loss is not finite.
    """
    losses, logits, targets = [], [], []
    for given, wanted in answered(model, found, collate, asking.batch_size, asking.progress("labels")):
        losses.append(labels.losses()(given, wanted))
        logits.append(given.float())
        targets.append(wanted)
    summed, counted = torch.cat(losses).sum(0).tolist()
    loss = summed / counted
    if not np.isfinite(loss):
        raise DataError(
            f"{found.report.source}: the model's loss is {loss}. Its weights are damaged, or too large for its dtype; "
            "try --dtype float32"
        )
    figures = figures_of(labels, torch.cat(logits).numpy(), torch.cat(targets).numpy())
    words = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    asking.show(f"{words}, loss {loss:.4f} ({len(found.data):,} examples)")
    return {"loss": loss, "examples": len(found.data), "metrics": figures}


def figures_of(labels: Labels, logits: Any, targets: Any) -> dict[str, float]:
    """The figures of a classifier: of its likeliest labels, of all labels above one half, or of its values."""
    if labels.problem == "regression":
        return metrics.regression(targets.astype(np.float64), logits.reshape(-1).astype(np.float64))
    if labels.problem == "multi-label":
        return metrics.multi_label(targets > 0.5, logits > 0)
    return metrics.single_label(targets.astype(np.int64), logits.argmax(-1), len(labels.names))


def _columns(cells: Cells, reading: Reading) -> dict[str, str]:
    label = column_of(cells, "label", LABEL, reading.label_column, "--label-column")
    given = reading.text_columns
    if len(given) > 2:
        raise DataError(f"{len(given)} columns are named for the text, and a model takes one or two. Name fewer")
    pair = next((pair for pair in PAIRS if not given and all(name in cells for name in pair)), ())
    names = given or pair
    if not names:
        others = [name for name, cell in cells.items() if name != label and isinstance(cell, str)]
        names = (others[0],) if len(others) == 1 else (column_of(cells, "text", TEXT, None, "--text-column"),)
    found = [column_of(cells, "text", (name,), name, "--text-column") for name in names]
    return {**dict(zip(("text", "pair"), found, strict=False)), "label": label}


def _checked(cells: Cells) -> Cells:
    for name in ("text", "pair"):
        if name in cells:
            check_text(cells[name])
            if not cells[name].strip():
                raise DataError(f"column {name!r}: is blank. Fill the cell, or delete the row")
    return {**cells, "label": label_cell(cells["label"])}
