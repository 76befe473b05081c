"""Giving each word of a text its tag: names of persons and places, parts of speech."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset

from quadapt.data import Encoded
from quadapt.data.collate import NO_LOSS
from quadapt.data.messages import check_text
from quadapt.data.tables import Cells, Table, column_of, read_table
from quadapt.errors import DataError
from quadapt.hf.head import Head
from quadapt.hf.kinds import Kind
from quadapt.tasks import metrics
from quadapt.tasks.base import TASKS, Asking, Collate, Losses, Measured, Reading
from quadapt.tasks.examples import ByExamples, answered, encoded, padding, taken
from quadapt.tasks.labels import Labels, cross_entropy, head_for, label_cell

WORDS = ("tokens", "words")
"""The names under which the words of a text are looked for."""

TAGS = ("tags", "ner_tags", "pos_tags", "labels", "label")
"""The names under which their tags are looked for."""


@TASKS.register("token-classification")
class TokenClassification(ByExamples):
    """A model gives each word of a text its tag. The first token of a word bears the loss, and its answer counts."""

    summary: ClassVar[str] = "to give each word of a text its tag"
    kinds: ClassVar[tuple[str, ...]] = ("token-classification",)

    def read(self, sources: Sequence[str], reading: Reading, *, held_out: bool = False) -> Table:
        given = reading.text_columns[0] if reading.text_columns else None

        def find(cells: Cells) -> dict[str, str]:
            words = column_of(cells, "words", WORDS, given, "--text-column")
            return {"words": words, "tags": column_of(cells, "tags", TAGS, reading.label_column, "--label-column")}

        return read_table(sources, find, _checked, held_out=held_out, max_bad_rows=reading.max_bad_rows)

    def head(self, config: Any, kind: Kind, data: Table, reading: Reading) -> Head | None:
        tags = [tag for row in data.rows for tag in row["tags"]]
        return head_for(self.kinds, config, kind, tags, data.source, reading)

    def encode(self, data: Table, prepare: Any, config: Any, *, length: int, reading: Reading) -> Encoded:
        if not getattr(prepare, "is_fast", False):
            raise DataError("the tokenizer does not tell which token is of which word. Use a fast tokenizer")
        labels, tally, rows = Labels(config), Counter[str](), list[dict[str, list[int]]]()
        for row, where in zip(data.rows, data.where, strict=True):
            targets = [labels.number(tag, where) for tag in row["tags"]]
            found = _tokens(prepare, row["words"], where, length)
            firsts = _firsts(found.word_ids())
            marks = [NO_LOSS if at is None else targets[at] for at in firsts]
            lost = len(targets) - sum(at is not None for at in firsts)
            tally.update(tokens=len(marks), loss=len(targets) - lost, truncated=lost > 0, lost=lost)
            rows.append({**found, "labels": marks})
        examples = Dataset.from_list([row for row in rows if any(mark != NO_LOSS for mark in row["labels"])])
        tally["dropped"] = len(rows) - len(examples)
        first = " ".join(f"{word}/{tag}" for word, tag in zip(data.rows[0]["words"], data.rows[0]["tags"], strict=True))
        return encoded(self.name, data, examples, length=length, tally=tally, unit="tags", example=first[:400])

    def collator(self, prepare: Any, model: Any) -> Collate:
        from transformers import DataCollatorForTokenClassification

        return taken(model, DataCollatorForTokenClassification(padding(prepare, model)))

    def losses(self, config: Any) -> Losses:
        return cross_entropy

    def measure(self, model: Any, prepare: Any, data: Table, asking: Asking) -> Measured:
        """Accuracy and macro F1 over words; where tags are of the scheme BIO, precision, recall and F1 of entities."""
        labels = Labels(model.config)
        found = self.encode(data, prepare, model.config, length=asking.length, reading=Reading())
        collate, losses = self.collator(prepare, model), list[torch.Tensor]()
        true, said = list[list[int]](), list[list[int]]()
        for logits, wanted in answered(model, found, collate, asking.batch_size, asking.progress("tags")):
            losses.append(cross_entropy(logits, wanted))
            for row, tags in zip(logits.argmax(-1), wanted, strict=True):
                counted = tags != NO_LOSS
                true.append(tags[counted].tolist())
                said.append(row[counted].tolist())
        summed, counted_all = torch.cat(losses).sum(0).tolist()
        right, given = (np.array([tag for row in rows for tag in row], dtype=np.int64) for rows in (true, said))
        figures = metrics.single_label(right, given, len(labels.names))
        del figures["f1"]  # with two tags the F1 of the second one, which says nothing here
        result: Measured = {"loss": summed / counted_all, "examples": len(found.data), "metrics": figures}
        if any(name.startswith("B-") for name in labels.names):
            named = ([[labels.names[tag] for tag in row] for row in rows] for rows in (true, said))
            result["entities"] = metrics.entities(*named)
        words = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        words += "".join(f", {name} of entities {value:.4f}" for name, value in result.get("entities", {}).items())
        asking.show(f"{words}, loss {result['loss']:.4f} ({int(counted_all):,} words)")
        return result


def _tokens(prepare: Any, words: Sequence[str], where: str, length: int) -> Any:
    """The tokens of words, which know their words.

    Raises:
        DataError: The tokenizer takes no words.
    """
    try:
        return prepare(list(words), is_split_into_words=True, truncation=True, max_length=length)
    except AssertionError as error:  # of tokenizers that put a space before each word, and were not told so
        raise DataError(
            f"{where}: the tokenizer takes no text that is split into words ({error}). Set add_prefix_space to true in "
            "tokenizer_config.json"
        ) from error


def _firsts(words: Sequence[int | None]) -> list[int | None]:
    """For each token the word that it begins, or None where it goes on with one, or is of none."""
    before: Sequence[int | None] = [None, *words[:-1]]
    return [word if word != last else None for word, last in zip(words, before, strict=True)]


def _checked(cells: Cells) -> Cells:
    words, tags = cells["words"], cells["tags"]
    for name, cell in (("words", words), ("tags", tags)):
        if not isinstance(cell, list | tuple) or not cell:
            raise DataError(f"column {name!r}: must be a list with an entry for each word")
    if len(words) != len(tags):
        raise DataError(f"has {len(words)} words and {len(tags)} tags. Each word must have one")
    for word in words:
        check_text(word)
    return {"words": list(words), "tags": [label_cell(tag) for tag in tags]}
