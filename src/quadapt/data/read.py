"""Rows of training and evaluation data, from files or the hub, each of them checked.

==========================================  ==================  ====================================================
columns                                     kind                note
==========================================  ==================  ====================================================
`prompt`, `chosen`, `rejected`              of the prompt       the chosen answer alone; chosen may hold the prompt
`messages` or `conversations` (`tools`)     messages            `{"role": .., "content": ..}`, or `from` and `value`
`prompt`, `completion`                      prompt-completion   messages, if one of them is a list of messages
`instruction`, `output` (and `input`)       prompt-completion   put into the template of Stanford Alpaca
`instruction`, `response` (and `context`)   prompt-completion   the same: Dolly's names
`question`, `answer`                        prompt-completion   the same
`text`                                      text                a .txt file is one document
==========================================  ==================  ====================================================

Where columns fit several lines of the table, the first holds; `data/forms.py` has further names. Several sources are
put together; prompts and completions beside messages become messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset, Features, Value

from quadapt.data.bad import BadRows
from quadapt.data.forms import Layout, RowsKind, Side, layout_of
from quadapt.data.messages import Row, describe
from quadapt.data.source import Source, file_rows, hub_rows, is_one, listing
from quadapt.errors import ConfigError, DataError


@dataclass(frozen=True)
class Rows:
    """Checked rows of data, all of one kind."""

    kind: RowsKind
    """Which columns there are: `text`; `prompt` and `completion`; or `messages` and `tools`."""

    data: Dataset
    """The rows. Beside the columns of its kind, `where` says where in the source each of them stands. `messages` and
    `tools` are JSON, as the keys of one row's calls are not those of another's; :meth:`chat` reads them."""

    source: str
    """The names of the files or datasets that were read."""

    notes: tuple[str, ...] = ()
    """What was left out of the source, columns and files, and what was taken for what."""

    alpaca: bool = False
    """Whether the prompts are in Stanford Alpaca's template."""

    bad: BadRows = field(default_factory=BadRows)
    """Rows of the source that cannot be used, and how many more may be found."""

    def __len__(self) -> int:
        return len(self.data)

    def select(self, indices: Iterable[int]) -> Rows:
        """Some of the rows, in the order of `indices`."""
        return replace(self, data=self.data.select(indices))

    def chat(self, index: int) -> list[Row]:
        """The messages of a row, as chat templates take them."""
        return list(json.loads(self.data[index]["messages"]))


def read(
    sources: str | Sequence[str], *, split: str = "train", max_bad_rows: int | None = None, side: Side | None = None
) -> Rows:
    """Read data and find out what kind it is.

    Args:
        sources: Each is a .txt, .json, .jsonl, .csv, .parquet or .arrow file (those of text may end in .gz), a folder
            of such files, a folder that `datasets` has saved, or the name of a dataset on the hub (`name` or
            `name:config`). All rows of all of them count.
        split: Which part to read. A single file has `train` alone; in a folder the files' names decide, by the rules of
            `datasets` (`train.jsonl`, `test.jsonl`, ..).
        max_bad_rows: Rows that cannot be used are skipped and counted, up to so many. Default: a thousandth of the
            rows, at least 10, and no more than there are good ones.
        side: Of rows with two answers, which one to read; all rows must be such then. By default it is the chosen one.

    Raises:
        DataError: There is no such file or dataset, sources do not go together, or more rows cannot be used than may
            be skipped; the message has the row or line.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    return _read([(name, split) for name in names], max_bad_rows, side)


def read_held_out(sources: str | Sequence[str], *, max_bad_rows: int | None = None, side: Side | None = None) -> Rows:
    """Read data to measure on: the split `test` of a folder or hub dataset, or all of a file; see :func:`read`."""
    names = [sources] if isinstance(sources, str) else list(sources)
    return _read([(name, "train" if is_one(Path(name).expanduser()) else "test") for name in names], max_bad_rows, side)


def split_rows(rows: Rows, eval_fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Hold out part of the rows for evaluation: at least one, and the same ones for the same seed.

    Where the share is less than one text, each text is cut instead, at the end of a line: its last part is held out,
    whatever the seed.

    Returns:
        The rows to train on, and those held out.

    Raises:
        ConfigError: `eval_fraction` is not between 0 and 1.
        DataError: There is too little to split.
    """
    if not 0 < eval_fraction < 1:
        raise ConfigError(f"the share to hold out is {eval_fraction}. Use a number between 0 and 1, such as 0.05")
    if rows.kind == "text" and (len(rows) == 1 or round(len(rows) * eval_fraction) < 1):
        return _cut_documents(rows, eval_fraction)
    if len(rows) < 2:
        raise DataError(f"{rows.source}: has a single row, which cannot be split. Give other data with --eval-data")
    held_out = min(len(rows) - 1, max(1, round(len(rows) * eval_fraction)))
    parts = rows.data.train_test_split(test_size=held_out, seed=seed)
    return replace(rows, data=parts["train"]), replace(rows, data=parts["test"])


def _cut_documents(rows: Rows, eval_fraction: float) -> tuple[Rows, Rows]:
    """The beginnings of documents, and their ends."""
    kept: tuple[list[Row], list[Row]] = ([], [])
    for row in rows.data:
        text: str = row["text"]
        middle = round(len(text) * (1 - eval_fraction))
        middle = text.rfind("\n", 0, middle) + 1 or middle
        for part, side in zip((text[:middle], text[middle:]), kept, strict=True):
            if part.strip():
                side.append({"text": part, "where": row["where"]})
    if not all(kept):
        length = sum(len(text) for text in rows.data["text"])
        raise DataError(
            f"{rows.source}: {length} characters are too few to hold out {eval_fraction:.0%} of them. "
            "Give other data with --eval-data"
        )
    return replace(rows, data=_dataset(kept[0], rows.kind)), replace(rows, data=_dataset(kept[1], rows.kind))


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    """The rows of one file, and what was found out about its columns."""

    name: str
    layout: Layout | None = None
    rows: list[tuple[str, Row]] = field(default_factory=list)
    unused: dict[str, None] = field(default_factory=dict)
    """A set in order of appearance."""

    @property
    def kind(self) -> RowsKind:
        """The kind of the rows in this file."""
        assert self.layout is not None
        return self.layout.form.kind


def _read(sources: Sequence[tuple[str, str]], max_bad_rows: int | None, side: Side | None) -> Rows:
    bad, notes = BadRows(max_bad_rows), []
    parts: list[_Part] = []
    for name, split in sources:
        files, said = _files(name, split)
        notes += said
        own = BadRows(max_bad_rows)
        found = [_collect(file, rows, own, side) for file, rows in files]
        if not any(part.rows for part in found):
            own.check(0)
            raise DataError(f"{name or 'the data'}: has no rows")
        bad.join(own)
        parts += [part for part in found if part.rows]
        if len(sources) > 1:
            notes.append(f"{name}: {sum(len(part.rows) for part in found):,} rows")
    source = ", ".join(name for name, _ in sources)
    bad.good = sum(len(part.rows) for part in parts)
    bad.check(bad.good)
    kind = _common_kind(parts)
    notes += _notes(parts, kind)
    rows = [
        part.layout.row(cells, kind) | {"where": where} for part in parts if part.layout for where, cells in part.rows
    ]
    wrapped = kind == "prompt-completion" and all(part.layout and part.layout.form.alpaca for part in parts)
    return Rows(kind, _dataset(rows, kind), source, tuple(dict.fromkeys(notes)), wrapped, bad)


def _files(name: str, split: str) -> tuple[list[tuple[str, Source]], list[str]]:
    path = Path(name).expanduser()
    if not name or "\0" in name or not path.exists():
        return [(name, hub_rows(name, split))], []
    return file_rows(path, split)


def _collect(name: str, rows: Source, bad: BadRows, side: Side | None) -> _Part:
    part = _Part(name)
    for where, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                raise DataError(f"is {describe(row)}. Each row must be a JSON object")
            part.layout = part.layout or _layout(where, row, side)
            part.rows.append((where, part.layout.cells(row)))
            part.unused |= dict.fromkeys(column for column in row if column not in part.layout.columns.values())
        except DataError as error:
            # "a.jsonl:7: column ..", "a.jsonl:7: the columns ..", "a.jsonl:7: is .."
            bad.add(DataError(f"{where}: {error}"))
    return part


def _layout(where: str, row: Row, side: Side | None) -> Layout:
    try:
        return layout_of(row) if side is None else layout_of(row).of_side(side)
    except DataError as error:
        header = ". Does the file lack a first line with the columns' names?" if ".csv" in where else ""
        raise DataError(f"{error}{header}") from error


def _common_kind(parts: Sequence[_Part]) -> RowsKind:
    """The kind that all parts can have.

    Raises:
        DataError: There is none.
    """
    kinds: dict[RowsKind, _Part] = {}
    for part in parts:
        kinds.setdefault(part.kind, part)
    if len(kinds) > 1 and "text" in kinds:
        other = next(part for kind, part in kinds.items() if kind != "text")
        raise DataError(
            f"{kinds['text'].name} holds text, and {other.name} {_WORDS[other.kind]}: these cannot be trained on "
            "together. Leave one out, or write the text as completions of empty prompts"
        )
    return "messages" if "messages" in kinds else next(iter(kinds))


_WORDS: dict[RowsKind, str] = {"text": "text", "prompt-completion": "prompts and completions", "messages": "messages"}


def _notes(parts: Sequence[_Part], kind: RowsKind) -> list[str]:
    """What was taken for what, what was left out, and what had to change so that all rows are of one kind."""
    found = [part.layout.mapping for part in parts if part.layout and part.layout.mapping]
    unused = dict.fromkeys(column for part in parts for column in part.unused)
    if unused:
        found.append(f"columns not used: {listing(unused)}")
    asked = [part for part in parts if part.kind == "prompt-completion"]
    if kind == "messages" and asked:
        count = sum(len(part.rows) for part in asked)
        found.append(f"{count:,} rows of prompts and completions are rendered by the chat template, like the messages")
    wrapped = sum(len(part.rows) for part in asked if part.layout and part.layout.form.alpaca)
    bare = sum(len(part.rows) for part in asked) - wrapped
    if kind == "prompt-completion" and wrapped and bare:
        found.append(f"{wrapped:,} prompts are put into Alpaca's template, and {bare:,} stay as they are")
    return found


def _dataset(rows: list[Row], kind: RowsKind) -> Dataset:
    columns = {"text": ["text"], "prompt-completion": ["prompt", "completion"], "messages": ["messages", "tools"]}[kind]
    large = Value("large_string")  # a column may exceed 2 GiB
    return Dataset.from_list(rows, features=Features(dict.fromkeys([*columns, "where"], large)))
