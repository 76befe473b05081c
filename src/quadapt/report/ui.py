"""Messages and progress on stderr, results on stdout: as tables for people, or as one JSON object for programs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

T = TypeVar("T")


class Tick(Protocol):
    """Says how far some work is."""

    def __call__(self, done: int, total: int, figures: Mapping[str, float] = ...) -> None:
        """Say that `done` of `total` units are finished, with the latest figures."""


class UI:
    """What commands write with to the terminal: messages, progress and results.

    Args:
        as_json: Print results as JSON; tables are left out.
        quiet: No messages and no progress (Python callers).
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._err = Console(stderr=True, highlight=False, quiet=quiet, soft_wrap=True)
        self._out = Console(highlight=False, quiet=as_json or quiet, soft_wrap=True)

    def say(self, text: str) -> None:
        """Write a message to stderr, for people."""
        self._err.print(text, markup=False)

    def show(self, text: str) -> None:
        """Print a part of the result to stdout, for people."""
        self._out.print(text, markup=False)

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, wrapped: Sequence[str] = ()
    ) -> None:
        """Part of the result, for people: numbers to the right, words to the left; some columns in several lines."""
        kept = [[_cell(value) for value in row] for row in rows]
        table = Table(
            title=title or None, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
        )
        for index, column in enumerate(columns):
            numeric = all(row[index].strip("0123456789.,%-+e ") == "" for row in kept)
            table.add_column(column, justify="right" if numeric else "left", no_wrap=column not in wrapped)
        for row in kept:
            table.add_row(*row)
        Console(highlight=False, quiet=self.as_json or self.quiet, width=max(120, self._out.width)).print(table)

    def result(self, value: Mapping[str, Any]) -> None:
        """Print the whole result as JSON, if programs are to read it."""
        if self.as_json:
            print(json.dumps(_plain(value), indent=2, default=str))  # noqa: T201 - JSON goes out as it is, unwrapped

    @contextmanager
    def working(self, label: str) -> Iterator[Tick]:
        """A progress bar with the time left; where stderr is no terminal, a line for every tenth of the work."""
        if not self._err.is_terminal:
            yield self._lines(label)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=self._err, transient=False) as progress:
            task = progress.add_task(label, total=None, figures="")

            def tick(done: int, total: int, figures: Mapping[str, float] = {}) -> None:
                progress.update(task, completed=done, total=total, figures=_figures(figures))

            yield tick

    def _lines(self, label: str) -> Tick:
        start, shown = time.monotonic(), -1

        def tick(done: int, total: int, figures: Mapping[str, float] = {}) -> None:
            nonlocal shown
            tenth = 10 * done // max(1, total)
            if tenth > shown:
                shown = tenth
                left = (time.monotonic() - start) * (total - done) / max(1, done)
                rest = f", {left:.0f} s left" if 0 < done < total else ""
                self.say(f"{label}: {done}/{total}{rest} {_figures(figures)}".rstrip())

        return tick

    def over(self, label: str, items: Sequence[T]) -> Iterator[T]:
        """Go through items with a progress bar."""
        items = list(items)
        with self.working(label) as tick:
            for done, item in enumerate(items):
                tick(done, len(items))
                yield item
            tick(len(items), len(items))


def _figures(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _plain(value: Any) -> Any:
    """The value without infinities and NaN, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
