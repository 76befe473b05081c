"""Rows of training and evaluation data, from files or the hub, each of them checked.

=====================================  ==================  =============================================
columns                                kind                note
=====================================  ==================  =============================================
`messages`                             messages            a list of `{"role": .., "content": ..}`
`prompt`, `completion`                 prompt-completion
`instruction`, `output` (and `input`)  prompt-completion   put into the template of Stanford Alpaca
`text`                                 text                a .txt file is one document
=====================================  ==================  =============================================

Where columns fit several lines of the table, the first holds. JSON and CSV are parsed by Python's own modules rather
than by the readers of `datasets`, which know no line numbers, and guess: they read a cell `NA` as null, and `042` as
the number 42.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from datasets import Dataset, Features, Value, load_dataset  # type: ignore[import-untyped]
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns  # type: ignore[import-untyped]
from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]

from quadapt.errors import ConfigError, DataError

Kind = Literal["text", "prompt-completion", "messages"]
Row = dict[str, Any]
Source = Iterator[tuple[str, Any]]
"""Rows, each with where it stands: `data.jsonl:7`, `data.parquet row 7` (the first is row 1)."""

ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
"""Stanford Alpaca's template for an instruction alone, with Alpaca-LoRA's line end after it, at which a token ends."""

ALPACA_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""
"""The same for an instruction with an input."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


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
        return _collect(_hub_rows(source, split), source)
    files, notes = _files(path, split)
    return _collect((row for file in files for row in _READERS[file.suffix.lower()](file)), source, notes)


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
        raise DataError(f"{rows.source}: {len(text)} characters are too few to hold out {eval_fraction:.0%} of them. "
                        "Give other data with --eval-data")
    where = rows.data[0]["where"]
    train, held_out = (_dataset([{"text": part, "where": where}], rows.kind) for part in parts)
    return replace(rows, data=train), replace(rows, data=held_out)


# --- files ------------------------------------------------------------------------------------------------------------


def _files(path: Path, split: str) -> tuple[list[Path], list[str]]:
    """Data files of a split, and a note on the files that are none."""
    splits = {"train": [path]} if path.is_file() else _splits_of_folder(path)
    if split not in splits:
        raise DataError(f"{path}: has no split {split!r}. It has {', '.join(splits)}")
    files = [file for file in splits[split] if file.suffix.lower() in _READERS]
    others = [file.name for file in splits[split] if file.suffix.lower() not in _READERS]
    if not files:
        raise DataError(f"{path}: is no data. Accepted are {', '.join(_READERS)} files, and folders of them")
    return files, [f"files not read: {_names(others)}"] if others else []


def _splits_of_folder(path: Path) -> dict[str, list[Path]]:
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except EmptyDatasetError as error:
        raise DataError(f"{path}: has no files in it. Accepted are {', '.join(_READERS)} files") from error
    return {str(split): [Path(file) for file in sorted(files)] for split, files in found.items()}


def _decode(path: Path) -> str:
    """A file's text; its line ends stay as they are."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise DataError(f"{path}:{line}: is not UTF-8 (byte 0x{byte:02x}). Save the file as UTF-8") from error
    if not text.strip():
        raise DataError(f"{path}: is empty")
    return text


def _text_rows(path: Path) -> Source:
    yield str(path), {"text": _decode(path)}


def _json_rows(path: Path) -> Source:
    """A list of objects, as Alpaca's files are, or an object on each line, whatever the file's name ends in."""
    text = _decode(path)
    if text.lstrip().startswith("["):
        for number, row in enumerate(_loads(text, path, 1), start=1):
            yield f"{path} row {number}", row
        return
    for number, line in enumerate(text.rstrip().split("\n"), start=1):  # not splitlines: JSON may hold U+2028
        if not line.strip():
            raise DataError(f"{path}:{number}: is empty. Delete the line; each must hold one JSON object")
        yield f"{path}:{number}", _loads(line, path, number)


def _loads(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{first_line + error.lineno - 1}: is not valid JSON ({error.msg}, column {error.colno}). "
                        "Each line must hold one JSON object, or the whole file one list of objects") from error


def _csv_rows(path: Path) -> Source:
    limit = csv.field_size_limit(2**31 - 1)  # documents may be longer than the module's 128 KiB
    reader = csv.DictReader(io.StringIO(_decode(path), newline=""), strict=True)
    try:
        header = list(reader.fieldnames or ())
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: two columns have the same name. The header is {_names(header)}")
        for row in reader:
            if None in row:
                raise DataError(f"{path}:{reader.line_num}: has more cells than the header, {len(header)}. "
                                "Put cells with commas or line ends between double quotes")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is not valid CSV ({error}). Put cells with commas, quotes or line "
                        "ends between double quotes, and double the quotes in them") from error
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path) -> Source:
    try:
        data = load_dataset("parquet", data_files=str(path), split="train")
    except (DatasetsError, OSError, ValueError) as error:
        reason = shorten(str(error.__cause__ or error), 200)
        raise DataError(f"{path}: cannot be read as Parquet ({reason}). Write the file anew") from error
    yield from _numbered(data, str(path))


_READERS: dict[str, Callable[[Path], Source]] = {
    ".txt": _text_rows, ".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


# --- the hub ----------------------------------------------------------------------------------------------------------


def _hub_rows(source: str, split: str) -> Source:
    if Path(source).suffix.lower() in _READERS or not _HUB_NAME.fullmatch(source):
        raise DataError(f"{source}: there is no such file or folder.{_near(source)}")
    name, _, config = source.partition(":")
    try:
        data = load_dataset(name, config or None, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{source}: is no file or folder here, and cannot be had from the hub: "
                        f"{shorten(str(error), 300)}.{_near(source)}") from error
    yield from _numbered(data, source)


def _near(source: str) -> str:
    """Names like the last part of a path that is not there."""
    path = Path(source).expanduser().absolute()
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, sorted(each.name for each in path.parent.iterdir()))
    return f" Did you mean {' or '.join(near)}?" if near else f" Nothing in {path.parent} has a name like it"


def _numbered(data: Dataset, source: str) -> Source:
    for number, row in enumerate(data, start=1):
        yield f"{source} row {number}", row


# --- checks -----------------------------------------------------------------------------------------------------------


def _alpaca(row: Row) -> Row:
    template = ALPACA_INPUT if row["input"] else ALPACA
    return {"prompt": template.format_map(row), "completion": row["output"]}


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
            cell = row.get(column)
            if column in self.required and column not in row:
                raise DataError(f"{where}: has no column {column!r}, as the rows before it have. It has {_names(row)}. "
                                "All rows must have the same columns")
            if column in self.required or cell is not None:
                (_check_messages if column == "messages" else _check_text)(f"{where}: column {column!r}", cell)
        return self.convert({column: row.get(column) for column in self.columns}) | {"where": where}


_LAYOUTS = (
    _Layout("messages", ("messages",)),
    _Layout("prompt-completion", ("prompt", "completion")),
    _Layout("prompt-completion", ("instruction", "output"), ("input",), _alpaca),
    _Layout("text", ("text",)))


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
    notes = [*notes, *([f"columns not used: {_names(unused)}"] if unused else [])]
    return Rows(layout.kind, _dataset(kept, layout.kind), source, tuple(notes))


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
    raise DataError(f"{where}: the columns are {_names(row)}. Accepted are: text | prompt, completion | instruction, "
                    f"output (and input) | messages. Rename the columns.{header}")


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


def _names(names: Iterable[str]) -> str:
    shown = [shorten(str(name), 40) or repr(name) for name in names]
    return ", ".join(shown[:12] + [".."] * (len(shown) > 12)) or "none"
