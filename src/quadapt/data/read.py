"""Rows of training and evaluation data, from files or the hub, each of them checked.

=====================================  ==================  =============================================
columns                                kind                note
=====================================  ==================  =============================================
`messages`                             messages            a list of `{"role": .., "content": ..}`
`prompt`, `completion`                 prompt-completion
`instruction`, `output` (and `input`)  prompt-completion   put into the template of Stanford Alpaca
`text`                                 text                a .txt file is one document
=====================================  ==================  =============================================

Where columns fit several lines of the table, the first holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from datasets import Dataset, Features, Value

from quadapt.data.prompt import alpaca
from quadapt.data.source import Source, file_rows, hub_rows, listing
from quadapt.errors import ConfigError, DataError

Kind = Literal["text", "prompt-completion", "messages"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Checked rows of one kind."""

    kind: Kind
    """Which columns there are: `text`; `prompt` and `completion`; or `messages`."""

    data: Dataset
    """The rows. Beside the columns of its kind, `where` says where in the source each of them stands."""

    source: str
    """What was read."""

    notes: tuple[str, ...] = ()
    """What was left out of the source: columns and files."""

    alpaca: bool = False
    """Whether the prompts are in Stanford Alpaca's template."""

    def __len__(self) -> int:
        return len(self.data)

    def select(self, indices: Iterable[int]) -> Rows:
        """Some of the rows, in the order of `indices`."""
        return replace(self, data=self.data.select(indices))


def read(source: str, *, split: str = "train") -> Rows:
    """Read data and find out what kind it is.

    Args:
        source: A .txt, .json, .jsonl, .csv or .parquet file, a folder of such files, or the name of a dataset on the
            hub (`name` or `name:config`).
        split: Which part. A single file has `train` alone; in a folder the files' names decide, by the rules of
            `datasets` (`train.jsonl`, `test.jsonl`, ..).

    Raises:
        DataError: There is no such file or dataset, or a row of it cannot be used; the message has the row or line.
    """
    path = Path(source).expanduser()
    if not source or not path.exists():
        return _collect(hub_rows(source, split), source)
    rows, notes = file_rows(path, split)
    return _collect(rows, source, notes)


def split_rows(rows: Rows, eval_fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Hold out part of the rows for evaluation: at least one, and the same ones for the same seed.

    A single document is cut instead, at the end of a line: its last part is held out, whatever the seed.

    Returns:
        The rows to train on, and those held out.

    Raises:
        ConfigError: `eval_fraction` is not between 0 and 1.
        DataError: There is too little to split.
    """
    if not 0 < eval_fraction < 1:
        raise ConfigError(f"the share to hold out is {eval_fraction}. Use a number between 0 and 1, such as 0.05")
    if len(rows) == 1 and rows.kind == "text":
        return _cut_document(rows, eval_fraction)
    if len(rows) < 2:
        raise DataError(f"{rows.source}: has a single row, which cannot be split. Give other data with --eval-data")
    held_out = min(len(rows) - 1, max(1, round(len(rows) * eval_fraction)))
    parts = rows.data.train_test_split(test_size=held_out, seed=seed)
    return replace(rows, data=parts["train"]), replace(rows, data=parts["test"])


def _cut_document(rows: Rows, eval_fraction: float) -> tuple[Rows, Rows]:
    text: str = rows.data[0]["text"]
    middle = round(len(text) * (1 - eval_fraction))
    middle = text.rfind("\n", 0, middle) + 1 or middle
    parts = text[:middle], text[middle:]
    if not all(part.strip() for part in parts):
        raise DataError(
            f"{rows.source}: {len(text)} characters are too few to hold out {eval_fraction:.0%} of them. "
            "Give other data with --eval-data"
        )
    where = rows.data[0]["where"]
    train, held_out = (_dataset([{"text": part, "where": where}], rows.kind) for part in parts)
    return replace(rows, data=train), replace(rows, data=held_out)


# --- checks -----------------------------------------------------------------------------------------------------------


def _alpaca(row: Row) -> Row:
    return {"prompt": alpaca(row["instruction"], row["input"] or ""), "completion": row["output"]}


@dataclass(frozen=True)
class _Layout:
    """Columns that make up rows of a kind."""

    kind: Kind
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    convert: Callable[[Row], Row] = dict

    @property
    def columns(self) -> tuple[str, ...]:
        return self.required + self.optional

    def row(self, where: str, row: Row) -> Row:
        """The checked and converted row."""
        for column in self.columns:
            if column in self.required and column not in row:
                raise DataError(
                    f"{where}: has no column {column!r}, as the rows before it have, but {listing(row)}. "
                    "All rows must have the same columns"
                )
            if column in self.required or row.get(column) is not None:
                check = _check_messages if column == "messages" else _check_text
                check(f"{where}: column {column!r}", row[column])
        return self.convert({column: row.get(column) for column in self.columns}) | {"where": where}


_LAYOUTS = (
    _Layout("messages", ("messages",)),
    _Layout("prompt-completion", ("prompt", "completion")),
    _Layout("prompt-completion", ("instruction", "output"), ("input",), _alpaca),
    _Layout("text", ("text",)),
)


def _collect(rows: Source, source: str, notes: Sequence[str] = ()) -> Rows:
    layout: _Layout | None = None
    kept: list[Row] = []
    unused: dict[str, None] = {}  # a set in order of appearance
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: is {_describe(row)}. Each row must be a JSON object")
        layout = layout or _layout(where, row)
        unused |= dict.fromkeys(column for column in row if column not in layout.columns)
        kept.append(layout.row(where, row))
    if layout is None:
        raise DataError(f"{source}: has no rows")
    notes = [*notes, *([f"columns not used: {listing(unused)}"] if unused else [])]
    return Rows(layout.kind, _dataset(kept, layout.kind), source, tuple(notes), layout.convert is _alpaca)


def _dataset(rows: list[Row], kind: Kind) -> Dataset:
    if kind == "messages":
        return Dataset.from_list(rows)
    columns = ["text"] if kind == "text" else ["prompt", "completion"]
    large = Value("large_string")  # a column may exceed 2 GiB
    return Dataset.from_list(rows, features=Features(dict.fromkeys([*columns, "where"], large)))


def _layout(where: str, row: Row) -> _Layout:
    for layout in _LAYOUTS:
        if all(column in row for column in layout.required):
            return layout
    header = " Does the file lack a first line with the columns' names?" if ".csv:" in where else ""
    raise DataError(
        f"{where}: the columns are {listing(row)}. Accepted are: text | prompt, completion | instruction, "
        f"output (and input) | messages. Rename the columns.{header}"
    )


def _check_text(where: str, cell: Any) -> None:
    if cell is None:
        raise DataError(f"{where} is null or missing. Fill it in, or delete the row")
    if not isinstance(cell, str):
        raise DataError(f"{where} is {_describe(cell)}. It must be text; put numbers in quotes")
    if not cell.isascii() and any("\ud800" <= character <= "\udfff" for character in cell):
        raise DataError(f"{where} has half a surrogate pair, such as \\ud83d alone, which is no character. Remove it")


def _check_messages(where: str, cell: Any) -> None:
    expected = 'It must be a list of messages, each {"role": .., "content": ..}'
    if not isinstance(cell, list) or not cell:
        raise DataError(f"{where} is {_describe(cell)}. {expected}")
    for number, message in enumerate(cell, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {number} is {_describe(message)}. {expected}")
        present = {key: value for key, value in message.items() if value is not None}
        for key in dict.fromkeys(("role", "content", *present)):  # templates may know other keys too, such as name
            _check_text(f"{where}: message {number}: {key!r}", present.get(key))


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {shorten(json.dumps(value, default=str), 60)}"
