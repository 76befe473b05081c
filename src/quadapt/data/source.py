"""Raw rows, each with where it stands, from files and from the hub.

JSON and CSV are parsed by Python's own modules rather than by the readers of `datasets`, which know no line numbers,
and guess: they read a cell `NA` as null, and `042` as the number 42.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from datasets.exceptions import DatasetsError

from quadapt.errors import DataError

Source = Iterator[tuple[str, Any]]
"""Rows, each with where it stands: `data.jsonl:7`, `data.parquet row 7` (the first is row 1). In place of a row that
cannot be read there is a DataError, which says why."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def file_rows(path: Path, split: str) -> tuple[list[tuple[str, Source]], list[str]]:
    """Rows of a file, or of those files of a folder that belong to a split; and notes on other files there.

    A folder that `datasets` has saved (`save_to_disk`) has the splits that it was saved with.

    Returns:
        The name of each file with its rows; and the notes.

    Raises:
        DataError: There is no data of this split, or (while rows are taken) a file cannot be read.
    """
    if path.is_dir() and (saved := _saved_splits(path)):
        if split not in saved:
            raise DataError(f"{path}: has no split {split!r}. It has {', '.join(saved)}")
        return [(str(path), _numbered(saved[split], str(path)))], []
    files, notes = _select(path, split)
    return [(str(file), _reader(file)(file)) for file in files], notes


def is_one(path: Path) -> bool:
    """Whether a path is one body of data without splits: a file, or a dataset that was saved as it is."""
    return path.is_file() or (path / "state.json").is_file()


def hub_rows(source: str, split: str) -> Source:
    """Rows of a dataset on the hub, `name` or `name:config`.

    Raises:
        DataError: There is none, or `source` looks like the name of a file instead.
    """
    if data_suffix(Path(source)) or not _HUB_NAME.fullmatch(source):
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
    """Names in a row, separated by commas; at most 12 of them."""
    shown = [shorten(str(name), 40) or repr(name) for name in names]
    return ", ".join(shown[:12] + [".."] * (len(shown) > 12)) or "none"


def data_suffix(path: Path) -> str:
    """The ending that tells how a file is read, without that of its compression; empty if it is no data."""
    name = path.name.lower().removesuffix(".gz")
    compressed = name != path.name.lower()
    suffix = Path(name).suffix
    return suffix if suffix in _READERS and not (compressed and suffix in (".parquet", ".arrow")) else ""


def _reader(path: Path) -> Callable[[Path], Source]:
    return _READERS[data_suffix(path)]


def _select(path: Path, split: str) -> tuple[list[Path], list[str]]:
    """Data files of a split, and a note on the files that are none."""
    splits = {"train": [path]} if path.is_file() else _splits_of_folder(path)
    if split not in splits:
        raise DataError(f"{path}: has no split {split!r}. It has {', '.join(splits)}. Or name the files themselves")
    files = [file for file in splits[split] if data_suffix(file)]
    others = [file.name for file in splits[split] if not data_suffix(file)]
    if not files:
        hint = "; decompress it first" if path.suffix.lower() in (".zst", ".bz2", ".xz", ".zip", ".7z", ".tar") else ""
        accepted = f"{', '.join(_READERS)} files (those of text also as .gz), and folders of them"
        raise DataError(f"{path}: is no data. Accepted are {accepted}{hint}")
    return files, [f"files not read: {listing(others)}"] if others else []


def _saved_splits(path: Path) -> dict[str, Dataset]:
    """What `datasets` has saved in a folder, by split; nothing if the folder is another one."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return {}
    try:
        found = load_from_disk(str(path))
    except (DatasetsError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = shorten(str(error), 200)
        raise DataError(f"{path}: was saved by datasets, and cannot be read ({reason}). Save it anew") from error
    return {str(name): data for name, data in found.items()} if isinstance(found, DatasetDict) else {"train": found}


def _splits_of_folder(path: Path) -> dict[str, list[Path]]:
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except EmptyDatasetError as error:
        raise DataError(f"{path}: has no files in it. Accepted are {', '.join(_READERS)} files") from error
    return {str(split): [Path(file) for file in sorted(files)] for split, files in found.items()}


def _decode(path: Path) -> str:
    """A file's text; its line ends stay as they are, and so do bytes that are not UTF-8, as `_undecoded` finds them."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: cannot be decompressed ({error}). Compress it anew, or give the plain file"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions") from error
    return raw.decode("utf-8-sig", errors="surrogateescape")


def _undecoded(text: str) -> DataError | None:
    """What is wrong with a decoded text, if it came from bytes that are not UTF-8."""
    if text.isascii() or not (found := _ESCAPED.search(text)):
        return None
    return DataError(f"is not UTF-8 (byte 0x{ord(found[0]) - 0xDC00:02x}). Save the file as UTF-8")


_ESCAPED = re.compile("[\udc80-\udcff]")


def _text_rows(path: Path) -> Source:
    text = _decode(path)
    if not text.strip():
        yield str(path), DataError("is empty")
        return
    broken = _ESCAPED.search(text) or re.search("\0", text)
    if broken is None:
        yield str(path), {"text": text}
        return
    why = _undecoded(text) or DataError("holds a NUL byte, as no text does. Is it another kind of file, or UTF-16?")
    yield f"{path}:{text.count(chr(10), 0, broken.start()) + 1}", why


def _json_rows(path: Path) -> Source:
    """A list of objects, as Alpaca's files are, or an object on each line, whatever the file's name ends in.

    The list may lie in an object: `{"data": [..]}`. Blank lines are skipped.
    """
    text = _decode(path)
    if not text.strip():
        yield str(path), DataError("is empty")
        return
    whole = _single(text)
    if isinstance(whole, dict):
        alone, whole = whole, next((whole[name] for name in _WRAPPERS if isinstance(whole.get(name), list)), None)
        if whole is None:
            yield f"{path}:1", alone
            return
    if isinstance(whole, list):
        yield from ((f"{path} row {number}", row) for number, row in enumerate(whole, start=1))
    elif text.lstrip().startswith("["):
        yield from _elements(text, text.index("[") + 1, path)
    else:
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold U+2028
            if line.strip():
                yield f"{path}:{number}", _parsed(line.rstrip())[0]


_WRAPPERS = ("data", "rows", "examples", "instances", "items", "records", "samples")
"""Names under which a file that is one object holds its list of rows."""


def _single(text: str) -> Any:
    """The value of a file that is one JSON value; None if it is several, or none that can be read."""
    first, _, rest = text.strip().partition("\n")
    if rest.strip() and not isinstance(_parsed(first)[0], DataError):
        return None
    whole = _parsed(text)[0]
    return None if isinstance(whole, DataError) else whole


def _parsed(text: str) -> tuple[Any, int]:
    """A JSON value, or the DataError that says what is wrong with it; and in which line of the text (the first: 0)."""
    try:
        return _undecoded(text) or _DECODER.decode(text), 0
    except json.JSONDecodeError as error:
        return DataError(
            f"is not valid JSON ({error.msg}, column {error.colno}). Each line must hold one JSON object, or the "
            "whole file one list of objects"
        ), error.lineno - 1
    except RecursionError:
        return DataError("is nested too deeply to be read. Delete the row, or flatten it"), 0
    except ValueError as error:
        return DataError(f"holds {error}. Delete the row, or put the number in quotes"), 0


def _integer(digits: str) -> int:
    if len(digits) > 1000:  # Python refuses from 4,300 on, with a message of its own
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


def _elements(text: str, at: int, path: Path) -> Source:
    """The elements of a JSON list, one by one, so that one that cannot be read leaves the others."""
    number, closed = 0, False
    while not closed:
        end, number = _end_of_element(text, at), number + 1
        piece = text[at:end].lstrip()
        line = text.count("\n", 0, end - len(piece)) + 1
        if end == len(text):
            raise DataError(
                f"{path}:{line}: is not valid JSON (the list does not end; row {number} is the last that begins). "
                "Is a bracket or the end of the file missing?"
            )
        value, lines = _parsed(piece)
        yield (f"{path}:{line + lines}" if isinstance(value, DataError) else f"{path} row {number}"), value
        closed, at = text[end] == "]", end + 1
    if rest := text[at:].lstrip():
        line = text.count("\n", 0, len(text) - len(rest)) + 1
        raise DataError(f"{path}:{line}: is not valid JSON (something follows the list). The file must be one list")


def _end_of_element(text: str, at: int) -> int:
    """The index of the comma or bracket behind an element of a list, found by counting brackets alone."""
    depth = 0
    for found in _TOKEN.finditer(text, at):
        if depth == 0 and found[0] in ",]}":
            return found.start()
        depth += (found[0] in "[{") - (found[0] in "]}")
    return len(text)


def _csv_rows(path: Path) -> Source:
    limit = csv.field_size_limit(2**31 - 1)  # documents may be longer than the module's 128 KiB
    reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        while (cells := _next_cells(reader, path, line)) is not None:
            if not header and isinstance(cells, list) and len(set(cells)) < len(cells):
                raise DataError(f"{path}:{line}: two columns have the same name. The header is {listing(cells)}")
            if header and cells:  # a blank line is no row
                yield f"{path}:{line}", _csv_row(header, cells)
            elif isinstance(cells, DataError):
                raise DataError(f"{path}:{line}: {cells}")
            header, line = header or cells, reader.line_num + 1  # a row may have several lines
    finally:
        csv.field_size_limit(limit)


def _next_cells(reader: Any, path: Path, line: int) -> Any:
    """The cells of the next row, the DataError that says what is wrong with it, or None at the end."""
    try:
        return next(reader, None)
    except csv.Error as error:
        why = (
            f"is not valid CSV ({error}). Put cells with commas, quotes or line ends between double quotes, and "
            "double the quotes in them"
        )
        if "unexpected end" in str(error):  # a quote that is never closed has swallowed all that follows
            raise DataError(f"{path}:{line}: {why}") from error
        return DataError(why)


def _csv_row(header: list[str], cells: Any) -> Any:
    if isinstance(cells, list) and len(cells) > len(header):
        return DataError(
            f"has {len(cells)} cells, but the header {len(header)}. Put cells with commas or line ends between "
            "double quotes"
        )
    return _undecoded("".join(cells)) or dict(zip_longest(header, cells)) if isinstance(cells, list) else cells


def _table_rows(path: Path) -> Source:
    file_format = "Parquet" if data_suffix(path) == ".parquet" else "Arrow"
    try:
        data = load_dataset(file_format.lower(), data_files=str(path), split="train")
    except (DatasetsError, OSError, ValueError) as error:
        reason = shorten(str(error.__cause__ or error), 200)
        raise DataError(f"{path}: cannot be read as {file_format} ({reason}). Write the file anew") from error
    yield from _numbered(data, str(path))


_READERS: dict[str, Callable[[Path], Source]] = {
    ".txt": _text_rows,
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _table_rows,
    ".arrow": _table_rows,
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
