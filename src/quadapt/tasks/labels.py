"""What tasks with labels share: which labels there are, how a cell becomes one, the loss of each example."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from quadapt.data.collate import NO_LOSS
from quadapt.data.source import listing
from quadapt.data.tables import Table
from quadapt.errors import DataError
from quadapt.hf.head import Head, Problem, labels_of, problem_of
from quadapt.hf.kinds import KINDS, Kind
from quadapt.tasks.base import Losses, Reading

LABEL = ("label", "labels", "class", "category")
"""The names under which a label is looked for, the usual one first."""


def label_cell(cell: Any) -> Any:
    """A label as a row has it: a name, a number, or a list of names (in a CSV file as JSON).

    Raises:
        DataError: It is missing, or something else.
    """
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except ValueError:
            return cell
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, list):
        if all(isinstance(each, str | int) for each in cell):
            return [str(each) for each in cell]
        raise DataError("column 'label': holds a list of other things than names")
    if isinstance(cell, int | float):
        return cell
    if isinstance(cell, str) and cell.strip():
        return cell.strip()
    raise DataError("has no label. Fill the cell, or delete the row")


def problem_in(cells: Sequence[Any], said: str) -> Problem:
    """What labels are: as was said, or as the data have them.

    Lists are several labels; numbers of which some are not whole are values; all else is one label of several.
    """
    if said != "auto":
        return cast("Problem", said)
    if any(isinstance(cell, list) for cell in cells):
        return "multi-label"
    numbers = [_number(cell) for cell in cells]
    whole = all(number is not None and number.is_integer() for number in numbers)
    return "regression" if all(number is not None for number in numbers) and not whole else "single-label"


def new_head(kind: Kind, cells: Sequence[Any], source: str, reading: Reading) -> Head:
    """The head that labels ask for.

    Args:
        kind: The kind of model that it makes.
        cells: The labels of the data, row by row; of tokens, tag by tag.
        source: Where the data come from, for errors.
        reading: The labels that were given, if they were, and what they are.

    Raises:
        DataError: There is a single label, or one that was not given.
    """
    problem = problem_in(cells, reading.problem)
    if problem == "regression":
        return Head(kind, (), problem, reading.seed)
    found = {name for cell in cells for name in (cell if isinstance(cell, list) else [_name(cell)])}
    labels = reading.labels or tuple(sorted(found, key=_order))
    unknown = sorted(found - set(labels), key=_order)
    if unknown:
        raise DataError(
            f"{source}: has the labels {listing(unknown)}, which are not among those given: {listing(labels)}"
        )
    if len(labels) < 2 and problem == "single-label":
        raise DataError(
            f"{source}: every row has the label {listing(labels)}, so there is nothing to tell apart. Give data of two "
            "classes or more, or name them all with --labels"
        )
    return Head(kind, labels, problem, reading.seed)


def head_for(
    kinds: Sequence[str], config: Any, kind: Kind, cells: Sequence[Any], source: str, reading: Reading
) -> Head | None:
    """The new head that a model needs for its data, or that is asked for; None if it keeps its own."""
    if kind.name not in kinds:
        return new_head(KINDS[kinds[0]], cells, source, reading)
    other = reading.problem not in ("auto", problem_of(config))
    if other or (reading.labels and reading.labels != labels_of(config)):
        return new_head(kind, cells, source, reading)
    return None


class Labels:
    """The labels that a model knows, and what its config says they are.

    Args:
        config: Of the model, as transformers reads it.
    """

    def __init__(self, config: Any) -> None:
        self.names, self.problem = labels_of(config), problem_of(config)
        self._ids = {name: number for number, name in enumerate(self.names)}

    def target(self, cell: Any, where: str) -> Any:
        """What a model is to say for a label: its number, a one for each of several, or a value.

        Raises:
            DataError: The model does not know it, or it is of another sort.
        """
        if self.problem == "regression":
            number = _number(cell)
            if number is None:
                raise DataError(f"{where}: the label {cell!r} is no number, and the model gives one")
            return number
        if self.problem == "single-label":
            if isinstance(cell, list):
                raise DataError(f"{where}: has several labels, and the model gives one. Use --problem multi-label")
            return self.number(cell, where)
        several = cell if isinstance(cell, list) else [cell]
        chosen = {self.number(each, where) for each in several}
        return [float(number in chosen) for number in range(len(self.names))]

    def number(self, cell: Any, where: str) -> int:
        """The number of a label, by its name; a number that is no name stands for itself."""
        known = self._ids.get(_name(cell))
        if known is not None:
            return known
        number = _number(cell)
        if number is not None and number.is_integer() and 0 <= number < len(self.names):
            return int(number)
        raise DataError(
            f"{where}: the model does not know the label {cell!r}. It knows {listing(self.names)}. Correct the row, or "
            "give a model without a head for other labels"
        )

    def losses(self) -> Losses:
        """The loss of each example: cross-entropy, binary cross-entropy over all labels, or the squared error."""
        return {"single-label": cross_entropy, "multi-label": binary_cross_entropy, "regression": squared_error}[
            self.problem
        ]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy and counted labels of each example, float64 `[batch, 2]`.

    Args:
        logits: `[batch, .., classes]`, any float dtype; log-probabilities are computed in float32.
        labels: `[batch, ..]`; `NO_LOSS` where nothing is to be said.
    """
    found = []
    for row, targets in zip(logits, labels, strict=True):  # a float32 copy of all logits may not fit
        counted = targets != NO_LOSS
        losses = F.cross_entropy(
            row[counted].float().view(-1, row.shape[-1]), targets[counted].view(-1), reduction="none"
        )
        found.append(torch.stack([losses.double().sum(), counted.sum().double()]))
    return torch.stack(found)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed binary cross-entropy over the labels of each example `[batch, labels]`, and their number."""
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").double().sum(1)
    return torch.stack([losses, torch.full_like(losses, labels.shape[1])], dim=1)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared error of each example's value, logits `[batch, 1]` and labels `[batch]`, and a one."""
    losses = (logits.float().view(-1) - labels.float().view(-1)).square().double()
    return torch.stack([losses, torch.ones_like(losses)], dim=1)


def told(data: Table, key: str = "label") -> list[Any]:
    """The labels of all rows, in their order."""
    return [row[key] for row in data.rows]


def _name(cell: Any) -> str:
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


def _number(cell: Any) -> float | None:
    if isinstance(cell, list):
        return None
    try:
        return float(cell)
    except ValueError:
        return None


def _order(name: str) -> tuple[float, str]:
    """Numbers by their size, then names."""
    number = _number(name)
    return (number if number is not None else float("inf"), name)
