"""Rows of tables: named cells of any kind, each row with where it stands. Tasks with labels read these.

Files and datasets are those of :mod:`quadapt.data.source`; so are the places that errors name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from quadapt.data.bad import BadRows
from quadapt.data.source import Source, file_rows, hub_rows, is_one, listing
from quadapt.errors import ConfigError, DataError

Cells = dict[str, Any]
"""The cells of a row by what they mean: `text`, `label`, .."""

Names = Mapping[str, Sequence[str]]
"""For each meaning the columns that it is looked for in, the usual one first."""


@dataclass(frozen=True)
class Table:
    """Rows whose cells have a meaning."""

    rows: Sequence[Cells]
    """The rows, each with its cells by meaning."""

    where: Sequence[str]
    """Where each row stands, as errors say it: `reviews.csv:7`."""

    source: str
    """The names of the files or datasets that were read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """The column that each meaning was read from."""

    notes: tuple[str, ...] = ()
    """What was left out, and what was taken for what."""

    bad: BadRows = field(default_factory=BadRows)
    """Rows of the source that cannot be used, and how many more may be found."""

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Iterable[int]) -> Table:
        """Some of the rows, in the order of `indices`."""
        chosen = list(indices)
        return replace(self, rows=[self.rows[at] for at in chosen], where=[self.where[at] for at in chosen])

    def split(self, share: float, seed: int) -> tuple[Table, Table]:
        """Hold out part of the rows: at least one, and the same ones for the same seed.

        Raises:
            ConfigError: `share` is not between 0 and 1.
            DataError: There is a single row.
        """
        if not 0 < share < 1:
            raise ConfigError(f"the share to hold out is {share}. Use a number between 0 and 1, such as 0.05")
        if len(self) < 2:
            raise DataError(f"{self.source}: has a single row, which cannot be split. Give other data with --eval-data")
        order = np.random.default_rng(seed).permutation(len(self))
        held_out = min(len(self) - 1, max(1, round(len(self) * share)))
        return self.select(sorted(order[held_out:].tolist())), self.select(sorted(order[:held_out].tolist()))


def read_table(
    sources: Sequence[str],
    find: Callable[[Cells], dict[str, str]],
    check: Callable[[Cells], Cells],
    *,
    held_out: bool = False,
    max_bad_rows: int | None = None,
) -> Table:
    """Read rows whose cells have a meaning.

    Args:
        sources: Files, folders or names of the hub, as :func:`quadapt.data.read` takes them.
        find: Gives the column of each meaning, for the first row of a source. What it raises ends the reading.
        check: Gives a row's cells as they are used; what it raises makes the row a bad one.
        held_out: Read the split `test` of what has splits.
        max_bad_rows: How many rows that cannot be used are skipped, as for :func:`quadapt.data.read`.

    Raises:
        DataError: There is no such source, a column is not there, or more rows cannot be used than may be skipped.
    """
    bad, rows, where, notes = BadRows(max_bad_rows), list[Cells](), list[str](), list[str]()
    columns: dict[str, str] = {}
    for name in sources:
        before = len(rows)
        for place, row in _rows_of(name, held_out, notes):
            try:
                cells = _cells(row)
                columns = columns or _found(find, cells, place)
                meant = {meaning: cells.get(column) for meaning, column in columns.items()}
                rows.append(check(meant))
                where.append(place)
            except _ColumnError:
                raise
            except DataError as error:
                bad.add(DataError(f"{place}: {error}"))
        if len(rows) == before:
            bad.check(0)
            raise DataError(f"{name or 'the data'}: has no rows")
    bad.good = len(rows)
    bad.check(bad.good)
    renamed = [f"{column} as {meaning}" for meaning, column in columns.items() if column != meaning]
    notes += [f"columns read: {', '.join(renamed)}"] if renamed else []
    return Table(rows, where, ", ".join(sources), columns, tuple(dict.fromkeys(notes)), bad)


def column_of(cells: Cells, meaning: str, names: Sequence[str], given: str | None, flag: str) -> str:
    """The column that a meaning is read from: the one that was given, or the first of the usual names.

    Raises:
        DataError: There is none of these; the message has those that there are.
    """
    wanted = [given] if given else list(names)
    found = next((name for name in wanted if name in cells), None)
    if found is None:
        looked = f"{given!r} is none of them" if given else f"none is called {', '.join(names)}"
        raise DataError(
            f"no column has the {meaning}: the columns are {listing(cells)}, {looked}. Name it with {flag} COLUMN"
        )
    return found


class _ColumnError(DataError):
    """A column is missing from all rows of a source, which no skipping of rows mends."""


def _found(find: Callable[[Cells], dict[str, str]], cells: Cells, place: str) -> dict[str, str]:
    try:
        return find(cells)
    except DataError as error:
        header = ". Does the file lack a first line with the columns' names?" if ".csv" in place else ""
        raise _ColumnError(f"{place}: {error}{header}") from error


def _cells(row: Any) -> Cells:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"is {type(row).__name__}, where a row with named cells must be: a JSON object")
    return row


def _rows_of(name: str, held_out: bool, notes: list[str]) -> Source:
    path = Path(name).expanduser()
    split = "test" if held_out and not (path.exists() and is_one(path)) else "train"
    if not name or "\0" in name or not path.exists():
        yield from hub_rows(name, split)
        return
    files, said = file_rows(path, split)
    notes += said
    for _, rows in files:
        yield from rows
