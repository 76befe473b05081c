"""Rows that cannot be used: they are skipped and counted, up to a limit, and the first of them are named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from quadapt.errors import DataError

_SHOWN = 3
LEAST = 10
"""Bad rows that are skipped by default however few rows there are, unless they outnumber the good ones."""


@dataclass
class BadRows:
    """A count of bad rows, for one pass over the data."""

    most: int | None = None
    """How many may be skipped. None: a thousandth of all rows, at least `LEAST`, and no more than good ones."""

    count: int = 0
    """How many there are so far."""

    first: list[str] = field(default_factory=list)
    """What is wrong with the first ones, and where."""

    good: int = 0
    """Rows that could be used when they were read."""

    def copy(self) -> Self:
        """A copy of the count, from which another pass over the data can go on."""
        return type(self)(self.most, self.count, list(self.first), self.good)

    def add(self, error: DataError) -> None:
        """Count one more row that cannot be used.

        Raises:
            DataError: No row may be skipped.
        """
        if self.most == 0:
            raise error
        self.count += 1
        self.first = [*self.first, str(error)][:_SHOWN]

    def join(self, other: BadRows) -> None:
        """Count the rows of another source, too."""
        self.count += other.count
        self.first = [*self.first, *other.first][:_SHOWN]

    def check(self, good: int) -> None:
        """Raise DataError if there are more bad rows than may be skipped, among so many good ones."""
        if not self.count:
            return
        if not good:
            others = f". None of the other {self.count - 1:,} rows can be used either" if self.count > 1 else ""
            raise DataError(f"{self.first[0]}{others}")
        most = min(good, max(LEAST, (good + self.count) // 1000)) if self.most is None else self.most
        if self.count > most:
            raise DataError(
                f"{self.first[0]}. {self.count:,} of {self.count + good:,} rows cannot be used, and {most:,} may be "
                f"skipped. Mend them, or skip them all: --max-bad-rows {self.count}"
            )

    def notes(self) -> list[str]:
        """What was skipped, in words: nothing, or one line."""
        if not self.count:
            return []
        more = f"; and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
        rows = "1 row" if self.count == 1 else f"{self.count:,} rows"
        return [f"skipped {rows} that cannot be used: {'; '.join(self.first)}{more}"]
