"""Which columns make up rows, and of what kind.

A row is read by the first form that it fits; `docs` and the table in `data/read.py` list them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal

from quadapt.data.messages import Row, as_messages, chat, check_text, silenced, tools
from quadapt.data.prompt import alpaca
from quadapt.data.source import listing
from quadapt.errors import DataError

RowsKind = Literal["text", "prompt-completion", "messages"]

Side = Literal["chosen", "rejected"]
"""One of the two answers of a row, of which people prefer the first."""

Names = dict[str, tuple[str, ...]]
"""The names that a column may have, the likeliest first, by what the column means."""


@dataclass(frozen=True)
class Form:
    """A set of columns that rows of data may have."""

    kind: RowsKind
    """The kind of row that these columns make."""

    required: Names
    """The columns that must be there for the form to fit."""

    optional: Names = field(default_factory=dict)
    """The columns that are used if they are there."""

    convert: Callable[[Row], Row] = dict
    """The function that makes a row of this kind from cells, which it gets by their meaning."""

    as_chat: Callable[[Row], Row] | None = None
    """The function that makes messages from the cells of a prompt and a completion; None if the form has none."""

    fits: Callable[[Row], bool] = lambda _: True
    """A further test of the cells of the first row, which decides whether the form fits."""

    alpaca: bool = False
    """Whether prompts are put into Stanford Alpaca's template."""


@dataclass(frozen=True)
class Layout:
    """A form as it was found: which column means what."""

    form: Form
    columns: dict[str, str]
    """The name in the data, by meaning."""

    def cells(self, row: Row) -> Row:
        """The checked cells of a row, by meaning; of a chat, `messages` and `tools` in their common form.

        Raises:
            DataError: One of them is missing, or is not what it must be.
        """
        for meaning in self.form.required:
            if self.columns[meaning] not in row:
                raise DataError(
                    f"has no column {self.columns[meaning]!r}, as the rows before it have, but {listing(row)}. All "
                    "rows of a file must have the same columns"
                )
        cells = {meaning: row.get(column) for meaning, column in self.columns.items()}
        if self.form.kind == "messages":
            return self.form.convert(cells)
        for meaning, cell in cells.items():
            if meaning in self.form.required or cell is not None:
                _named(check_text, cell, self.columns[meaning])
        return cells

    def of_side(self, side: Side) -> Layout:
        """The layout by which one of a row's two answers is read.

        Raises:
            DataError: Rows have no two answers.
        """
        if "rejected" not in self.form.required:
            raise DataError(
                f"has no two answers to compare, but {listing(self.columns.values())}. Rows of preferences have the "
                "columns prompt, chosen and rejected"
            )
        if side == "chosen":
            return self
        swapped = {"chosen": self.columns["rejected"], "rejected": self.columns["chosen"]}
        return replace(self, columns={**self.columns, **swapped})

    def row(self, cells: Row, kind: RowsKind) -> Row:
        """A row of a kind, from what `cells` gave."""
        if self.form.kind == "messages":
            return {name: json.dumps(value, ensure_ascii=False) for name, value in cells.items()}
        if kind != "messages" or self.form.as_chat is None:
            return self.form.convert(cells)
        return {name: json.dumps(value, ensure_ascii=False) for name, value in self.form.as_chat(cells).items()}

    @property
    def mapping(self) -> str:
        """What was taken for what, in words; empty if all columns have their usual names."""
        renamed = [f"{column} as {meaning}" for meaning, column in self.columns.items() if column != meaning]
        return f"columns read: {', '.join(renamed)}" if renamed else ""


def layout_of(row: Row) -> Layout:
    """The first form that a row fits.

    Raises:
        DataError: There is none; the message lists what is accepted.
    """
    for form in FORMS:
        columns = {
            meaning: next((name for name in names if name in row), "")
            for meaning, names in {**form.required, **form.optional}.items()
        }
        found = {meaning: name for meaning, name in columns.items() if name}
        if all(meaning in found for meaning in form.required) and form.fits(
            {meaning: row[name] for meaning, name in found.items()}
        ):
            return Layout(form, found)
    raise DataError(
        f"the columns are {listing(row)}. Accepted are: text | prompt, completion | instruction, output (and input) | "
        "instruction, response (and context) | question, answer | prompt, chosen, rejected | messages or conversations "
        "(and tools). Rename the columns"
    )


def _named(check: Callable[[Any], Any], cell: Any, column: str) -> Any:
    try:
        return check(cell)
    except DataError as error:
        colon = ":" if str(error).startswith("message ") else ""
        raise DataError(f"column {column!r}{colon} {error}") from error


# --- conversions ------------------------------------------------------------------------------------------------------


def _chat(cells: Row) -> Row:
    messages = _named(lambda cell: chat(cell, cells.get("system")), cells["messages"], "messages")
    return {"messages": messages, "tools": _named(tools, cells.get("tools"), "tools")}


def _turns(cell: Any, role: str, column: str) -> list[Row]:
    """Messages, or a text as the only one."""
    cell = as_messages(cell)
    if not isinstance(cell, (list, dict)):
        _named(check_text, cell, column)
        return [{"role": role, "content": cell}]
    return list(_named(chat, cell, column))


def _chat_pair(cells: Row) -> Row:
    """Prompt and completion as messages: loss on the completion."""
    prompt = _turns(cells["prompt"], "user", "prompt")
    return _chat({**cells, "messages": [*silenced(prompt), *_turns(cells["completion"], "assistant", "completion")]})


def _chosen_chat(cells: Row) -> Row:
    """The chosen side of a preference pair: loss on what is not the prompt."""
    chosen = _turns(cells["chosen"], "assistant", "chosen")
    before = _turns(cells["prompt"], "user", "prompt") if cells.get("prompt") else []
    if not before:
        rejected = _turns(cells["rejected"], "assistant", "rejected")
        before = _shared(chosen[:-1], rejected)
    if chosen[: len(before)] == before:
        chosen = chosen[len(before) :]
    return _chat({**cells, "messages": [*silenced(before), *chosen]})


def _shared(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """The longest beginning that two sequences have in common."""
    return [left for left, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _chosen_text(cells: Row) -> Row:
    prompt, chosen = cells.get("prompt"), cells["chosen"]
    if not prompt:  # what both answers begin with, up to a word's end
        prompt = "".join(_shared(chosen, cells["rejected"]))
        prompt = prompt[: max(prompt.rfind(space) for space in " \n") + 1].rstrip(" ")
    return {"prompt": prompt, "completion": chosen[len(prompt) :] if chosen.startswith(prompt) else chosen}


def _alpaca(cells: Row) -> Row:
    return {"prompt": alpaca(cells["instruction"], cells.get("input") or ""), "completion": cells["output"]}


def _asked(prompt: str, completion: str) -> Row:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return {"messages": messages, "tools": []}


def _pair_as_chat(cells: Row) -> Row:
    return _asked(cells["prompt"].strip(), cells["completion"].strip())


def _alpaca_as_chat(cells: Row) -> Row:
    asked = [part for part in (cells["instruction"], cells.get("input")) if part]
    return _asked("\n\n".join(asked), cells["output"])


def _chosen_as_chat(cells: Row) -> Row:
    return _pair_as_chat(_chosen_text(cells))


def _structured(*meanings: str) -> Callable[[Row], bool]:
    """Whether one of these cells holds messages rather than text."""

    def check(cells: Row) -> bool:
        return any(isinstance(as_messages(cells.get(meaning)), (list, dict)) for meaning in meanings)

    return check


_AROUND: Names = {"system": ("system", "system_prompt"), "tools": ("tools", "functions")}
_PAIR: Names = {"prompt": ("prompt",), "completion": ("completion",)}
_PREFERENCE: Names = {"chosen": ("chosen",), "rejected": ("rejected",)}

FORMS = (
    Form(
        "messages",
        _PREFERENCE,
        {"prompt": ("prompt", "conversations", "question", "instruction"), **_AROUND},
        _chosen_chat,
        fits=_structured("prompt", "chosen"),
    ),
    Form(
        "prompt-completion",
        _PREFERENCE,
        {"prompt": ("prompt", "question", "instruction", "input")},
        _chosen_text,
        _chosen_as_chat,
    ),
    Form("messages", {"messages": ("messages", "conversations", "conversation")}, _AROUND, _chat),
    Form("messages", _PAIR, _AROUND, _chat_pair, fits=_structured("prompt", "completion")),
    Form("prompt-completion", _PAIR, as_chat=_pair_as_chat),
    Form(
        "prompt-completion",
        {
            "instruction": ("instruction", "question", "query", "problem"),
            "output": ("output", "response", "answer", "solution", "completion"),
        },
        {"input": ("input", "context")},
        _alpaca,
        _alpaca_as_chat,
        alpaca=True,
    ),
    Form(
        "prompt-completion",
        {
            "prompt": ("prompt", "input", "inputs", "source"),
            "completion": ("completion", "response", "output", "answer", "target", "targets"),
        },
        as_chat=_pair_as_chat,
    ),
    Form("text", {"text": ("text", "content", "document")}),
)
"""The forms that data may have, the most particular first."""
