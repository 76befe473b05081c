"""Files of benchmarks in a folder: found by their names, read, and handed to a task of the harness as its data."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadapt.errors import DataError
from quadapt.harness.forms import Form, form_of

QUESTIONS, EXAMPLES = "questions", "examples"
"""The two splits that a task gets: what is asked, and what few-shot prompts show."""

MMLU_COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
"""The columns of MMLU's files, which the original ones do not name."""


@dataclass(frozen=True)
class TaskFiles:
    """The files of one task. The harness calls it to get the task's data, and writes its fields beside the results."""

    repository: str
    """The name on the hub of the data set that the files stand for."""

    subset: str
    """The name of the configuration of that data set; for MMLU the subject."""

    questions: str
    """The file whose rows are asked."""

    examples: str
    """The file whose rows few-shot prompts show; the same as `questions` if there is no other."""

    @property
    def same(self) -> bool:
        """Whether examples are taken from among the questions; a question is never its own example."""
        return self.questions == self.examples

    @property
    def form(self) -> Form:
        """What becomes of a row of the files."""
        form = form_of({"dataset_path": self.repository, "dataset_name": self.subset})
        assert form is not None
        return form

    def __call__(self, **_: Any) -> dict[str, Any]:
        """The rows as data sets of `datasets`, by split; what the harness knows of the task is not needed for it.

        Raises:
            DataError: A file cannot be read, or a row is not of its form; the message has the file and the row.
        """
        from datasets import Dataset

        found = {QUESTIONS: Dataset.from_list(list(self._rows(self.questions)))}
        return found if self.same else {**found, EXAMPLES: Dataset.from_list(list(self._rows(self.examples)))}

    def _rows(self, file: str) -> Iterator[dict[str, Any]]:
        number = 0
        for number, row in enumerate(raw_rows(Path(file)), 1):
            try:
                yield self.form.fields(row)
            except (DataError, KeyError, ValueError, TypeError) as error:
                said = str(error) if isinstance(error, DataError) else f"has no {error}"
                raise DataError(f"{file}: row {number}: {said}. Mend the row, or get the file anew") from error
        if not number:
            raise DataError(f"{file}: has no rows. Get the file anew")


def raw_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a .json, .jsonl or .csv file of a benchmark, as they stand.

    Raises:
        DataError: It cannot be read, or a line has another number of columns.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from _mmlu_rows(path, list(csv.reader(file)))
            elif path.suffix == ".jsonl":
                yield from (json.loads(line) for line in file if line.strip())
            else:
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise DataError(f"{path}: holds no list of rows. Get the file anew")
                yield from rows
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read ({error}). Get the file anew") from error


def _mmlu_rows(path: Path, lines: Sequence[Sequence[str]]) -> Iterator[Mapping[str, str]]:
    lines = [line for line in lines if line]
    named = bool(lines) and lines[0][-1].strip().lower() == "answer"
    for number, line in enumerate(lines[named:], 1):
        if len(line) != len(MMLU_COLUMNS):
            raise DataError(f"{path}: row {number} has {len(line)} columns, not {len(MMLU_COLUMNS)}")
        yield dict(zip(MMLU_COLUMNS, line, strict=True))


class Shelf:
    """All files below a folder, in which those of tasks are looked for."""

    def __init__(self, folder: str) -> None:
        """List the files once.

        Raises:
            DataError: There is no such folder.
        """
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise DataError(f"{folder!r} is no folder. --task-files takes one with files of the tasks")
        root = self.folder.resolve()
        self._files = sorted(
            Path(where, name).relative_to(root.parent).as_posix() for where, _, names in os.walk(root) for name in names
        )

    def files(self, config: Mapping[str, Any], form: Form) -> TaskFiles | None:
        """The files of a task, or None if there are none.

        Args:
            config: The harness's configuration of the task.
            form: The form of its files.

        Raises:
            DataError: Several files may be meant.
        """
        asked, shown = self._first(form, form.asked), self._first(form, form.shown)
        questions, examples = asked or shown, shown or asked
        if questions is None or examples is None:
            return None
        return TaskFiles(str(config["dataset_path"]), str(config.get("dataset_name")), questions, examples)

    def _first(self, form: Form, splits: Iterable[str]) -> str | None:
        for split in splits:
            ends = [name.format(split=split) for name in form.names]
            found = [file for file in self._files if any(f"/{file}".endswith(f"/{end}") for end in ends)]
            if len(found) > 1:
                raise DataError(
                    f"{self.folder}: {found[0]} and {found[1]} may both be meant. Give the folder that holds one"
                )
            if found:
                return str(self.folder.resolve().parent / found[0])
        return None
