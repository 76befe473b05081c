"""Rows to measure on, put into the form in which a model was trained to be asked."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features

from quadapt.data.prompt import FormKind, PromptForm, alpaca
from quadapt.data.read import Rows
from quadapt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def own_form(rows: Rows) -> FormKind:
    """In which form the prompts of rows stand in their source."""
    if rows.kind == "prompt-completion":
        return "alpaca" if rows.alpaca else "prompt"
    return "chat" if rows.kind == "messages" else "text"


def as_trained(rows: Rows, form: PromptForm) -> tuple[PromptForm, str]:
    """The form to ask rows in, and what is to be said where it is not that of the data, or of training.

    Bare prompts can be put into any form. Others stand in a form of their own and are asked in that.
    """
    own = own_form(rows)
    if own in ("text", form.kind):
        return form, ""
    if own == "prompt":
        return form, f"the prompts are put into the form of training ({form.kind}); --prompt-form prompt asks them bare"
    return (
        PromptForm(own),
        f"warning: the data are asked in their own form ({own}), and the model was trained on another ({form.kind})",
    )


def asked(
    rows: Rows, form: PromptForm, tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> tuple[Rows, Rows | None]:
    """Rows in a form: as they are measured by their loss, and as they are asked; None if they hold no questions.

    Args:
        rows: Rows of any kind.
        form: The form of the prompts, which `as_trained` gave.
        tokenizer: The tokenizer, which has the chat template if `form` is chat.
        system: A system message, which is put before each chat that has none.

    Raises:
        DataError: There is no place for a system message, or no chat template.
    """
    if system and form.kind != "chat":
        raise DataError(f"prompts of the form {form.kind!r} have no place for a system message. Leave --system out")
    if rows.kind == "text":
        return rows, None
    if rows.kind == "messages":
        return (_with_system(rows, system) if system else rows), None
    if form.kind == "alpaca" and not rows.alpaca:
        found = _changed(rows, lambda row: {"prompt": alpaca(row["prompt"])})
        return found, found
    if form.kind != "chat":
        return rows, rows
    questions = _changed(rows, lambda row: {"prompt": form.ask(row["prompt"], tokenizer, system=system)})
    return _chats(rows, system), questions


def _changed(rows: Rows, change: Any) -> Rows:
    kept = [{**row, **change(row)} for row in rows.data]
    return replace(rows, data=Dataset.from_list(kept, features=rows.data.features))


def _chats(rows: Rows, system: str | None) -> Rows:
    first = [{"role": "system", "content": system}] if system else []
    chats = []
    for row in rows.data:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        chats.append({"messages": json.dumps([*first, *turns]), "tools": "[]", "where": row["where"]})
    large = rows.data.features["where"]
    features = Features(dict.fromkeys(("messages", "tools", "where"), large))
    return replace(rows, kind="messages", data=Dataset.from_list(chats, features=features))


def _with_system(rows: Rows, system: str) -> Rows:
    def change(row: Any) -> Any:
        messages = json.loads(row["messages"])
        if messages[0]["role"] == "system":
            return {}
        return {"messages": json.dumps([{"role": "system", "content": system}, *messages])}

    return _changed(rows, change)
