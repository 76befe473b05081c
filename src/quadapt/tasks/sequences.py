"""Classifying texts, and pairs of texts: one label, several, or a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from datasets import Dataset

from quadapt.data import Encoded
from quadapt.data.messages import check_text
from quadapt.data.tables import Cells, Table, column_of, read_table
from quadapt.errors import DataError
from quadapt.tasks.base import TASKS, Collate, Reading
from quadapt.tasks.classifier import Classifier
from quadapt.tasks.examples import encoded, padding, taken
from quadapt.tasks.labels import LABEL, Labels, label_cell

TEXT = ("text", "sentence", "content", "document", "review", "comment", "tweet")
"""The names under which a text is looked for, the usual one first."""

PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"))
"""The names of pairs of texts in the benchmarks that have them."""


@TASKS.register("sequence-classification")
class SequenceClassification(Classifier):
    """A model gives a text its label: one of several, any of several, or a number."""

    summary: ClassVar[str] = "to give a text, or a pair of texts, its label"
    kinds: ClassVar[tuple[str, ...]] = ("sequence-classification",)

    def read(self, sources: Sequence[str], reading: Reading, *, held_out: bool = False) -> Table:
        def find(cells: Cells) -> dict[str, str]:
            return _columns(cells, reading)

        return read_table(sources, find, _checked, held_out=held_out, max_bad_rows=reading.max_bad_rows)

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
