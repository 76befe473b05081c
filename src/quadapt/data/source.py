"""Raw rows, each with where it stands, from files and from the hub.

JSON and CSV are parsed by Python's own modules rather than by the readers of `datasets`, which know no line numbers,
and guess: they read a cell `NA` as null, and `042` as the number 42.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import Any

from datasets import Dataset, load_dataset
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from datasets.exceptions import DatasetsError

from quadapt.errors import DataError

Source = Iterator[tuple[str, Any]]
"""Rows, each with where it stands: `data.jsonl:7`, `data.parquet row 7` (the first is row 1)."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def file_rows(path: Path, split: str) -> tuple[Source, list[str]]:
    """Rows of a file, or of those files of a folder that belong to a split; and notes on other files there.

    Raises:
        DataError: There is no data of this split, or (while rows are taken) a file cannot be read.
    """
    files, notes = _select(path, split)
    return (row for file in files for row in _READERS[file.suffix.lower()](file)), notes


def hub_rows(source: str, split: str) -> Source:
    """Rows of a dataset on the hub, `name` or `name:config`.

    Raises:
        DataError: There is none, or `source` looks like the name of a file instead.
    """
    if Path(source).suffix.lower() in _READERS or not _HUB_NAME.fullmatch(source):
        raise DataError(f"{source}: there is no such file or folder.{_near(source)}")
    name, _, config = source.partition(":")
    try:
        data = load_dataset(name, config or None, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source}: is no file or folder here, and cannot be had from the hub: "
            f"{shorten(str(error), 300)}.{_near(source)}"
        ) from error
    yield from _numbered(data, source)


def listing(names: Iterable[str]) -> str:
    """Names in a row, shortened."""
    shown = [shorten(str(name), 40) or repr(name) for name in names]
    return ", ".join(shown[:12] + [".."] * (len(shown) > 12)) or "none"


def _select(path: Path, split: str) -> tuple[list[Path], list[str]]:
    """Data files of a split, and a note on the files that are none."""
    splits = {"train": [path]} if path.is_file() else _splits_of_folder(path)
    if split not in splits:
        raise DataError(f"{path}: has no split {split!r}. It has {', '.join(splits)}")
    files = [file for file in splits[split] if file.suffix.lower() in _READERS]
    others = [file.name for file in splits[split] if file.suffix.lower() not in _READERS]
    if not files:
        raise DataError(f"{path}: is no data. Accepted are {', '.join(_READERS)} files, and folders of them")
    return files, [f"files not read: {listing(others)}"] if others else []


def _splits_of_folder(path: Path) -> dict[str, list[Path]]:
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except EmptyDatasetError as error:
        raise DataError(f"{path}: has no files in it. Accepted are {', '.join(_READERS)} files") from error
    return {str(split): [Path(file) for file in sorted(files)] for split, files in found.items()}


def _decode(path: Path) -> str:
    """A file's text; its line ends stay as they are."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions") from error
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
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}:{line}: is not valid JSON ({error.msg}, column {error.colno}). Each line must hold "
            "one JSON object, or the whole file one list of objects"
        ) from error


def _csv_rows(path: Path) -> Source:
    limit = csv.field_size_limit(2**31 - 1)  # documents may be longer than the module's 128 KiB
    reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
    header: list[str] = []
    end = 0
    try:
        for cells in reader:
            line, end = end + 1, reader.line_num  # a row may have several lines
            if len(cells) > len(header) > 0:
                raise DataError(
                    f"{path}:{line}: has {len(cells)} cells, but the header {len(header)}. Put cells with "
                    "commas or line ends between double quotes"
                )
            if header and cells:  # a blank line is no row
                yield f"{path}:{line}", dict(zip_longest(header, cells))
            header = header or cells
            if len(set(header)) < len(header):
                raise DataError(f"{path}:{line}: two columns have the same name. The header is {listing(header)}")
    except csv.Error as error:
        raise DataError(
            f"{path}:{end + 1}: is not valid CSV ({error}). Put cells with commas, quotes or line ends "
            "between double quotes, and double the quotes in them"
        ) from error
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
    ".txt": _text_rows,
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


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
