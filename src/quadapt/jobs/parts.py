"""The three parts of the data of a comparison: to train on, to choose learning rates by, and to report on."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from quadapt.config import CompareConfig
from quadapt.data import Rows, read, read_held_out, split_rows
from quadapt.files import writing

CHARACTERS = 200
"""Characters of text that count as one row where rows to measure on are limited."""

_SEED = 0
"""The seed by which rows are held out: the same ones for all runs of a comparison."""


@dataclass(frozen=True)
class Parts:
    """Files with the three parts, as JSON lines."""

    train: Path
    """The file that every run is trained on."""

    choose: Path
    """The file by whose loss learning rates are chosen."""

    test: Path
    """The file that figures are reported on."""


def parts_of(config: CompareConfig, folder: Path) -> Parts:
    """Read the data, part them, and write the parts; files that are there and hold the same are left alone.

    Args:
        config: The settings of the comparison.
        folder: The folder to write the parts into.

    Raises:
        DataError: The data cannot be read, or are too few to be parted.
    """
    most = config.most_bad_rows
    train = read(config.data, max_bad_rows=most)
    if config.test_data:
        test = read_held_out(config.test_data, max_bad_rows=most)
    else:
        train, test = split_rows(train, config.test_split, _SEED)
    if config.choose_data:
        choose = read_held_out(config.choose_data, max_bad_rows=most)
    else:
        left = 1 if config.test_data else 1 - config.test_split
        train, choose = split_rows(train, min(0.5, config.choose_split / left), _SEED)
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "train": train,
        "choose": _limited(choose, config.measure_rows),
        "test": _limited(test, config.measure_rows),
    }
    return Parts(**{name: _written(rows, folder / f"{name}.jsonl") for name, rows in found.items()})


def _limited(rows: Rows, most: int) -> Rows:
    """The first rows; of texts, as many characters as so many rows are taken to have."""
    if rows.kind != "text":
        return rows.select(range(min(most, len(rows))))
    left, kept = most * CHARACTERS, list[dict[str, Any]]()
    for row in rows.data:
        if left <= 0:
            break
        kept.append({**row, "text": row["text"][:left]})
        left -= len(row["text"])
    return replace(rows, data=Dataset.from_list(kept))


def _written(rows: Rows, path: Path) -> Path:
    text = "".join(json.dumps(_row(row), ensure_ascii=False) + "\n" for row in rows.data)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as files have it: messages and tools, which are held as JSON, as what they stand for."""
    found = {name: value for name, value in row.items() if name != "where" and value is not None}
    return {
        name: json.loads(value) if name in ("messages", "tools") and value else value for name, value in found.items()
    }
