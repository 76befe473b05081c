"""Messages of a chat as data has them, in one form: the one that chat templates take.

Read are OpenAI's form (`role`, `content`, `tool_calls`), ShareGPT's (`from`, `value`), and content as a list of parts.
A message whose `weight` is 0 bears no loss.
"""

from __future__ import annotations

import json
import math
from textwrap import shorten
from typing import Any

from quadapt.errors import DataError

Row = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
}
"""What other forms call the roles that chat templates know."""

_CALLS = ("function_call", "tool_call")
_OWN = ("user", "assistant", "system", "tool", "developer")
_DEEPEST = 64
_EXPECTED = 'It must be a list of messages, each {"role": .., "content": ..} or {"from": .., "value": ..}'


def chat(cell: Any, system: Any = None) -> list[Row]:
    """Messages as chat templates take them.

    Args:
        cell: A list of messages, or its JSON.
        system: A system message to put before them; ignored if it is blank.

    Raises:
        DataError: It is something else; the message says which of them, and what is there.
    """
    cell = from_json(cell)
    if isinstance(cell, dict):
        cell = [cell]
    if not isinstance(cell, list) or not cell:
        raise DataError(f"is {describe(cell)}. {_EXPECTED}")
    found = [_message(number, message) for number, message in enumerate(cell, start=1)]
    if isinstance(system, str) and system.strip():
        if found[0]["role"] == "system":
            raise DataError("begins with a system message, and there is a column of them too. Keep one of the two")
        found.insert(0, {"role": "system", "content": system})
    check_values(found)
    return found


def tools(cell: Any) -> list[Row]:
    """Schemas of functions that a model may call, each as `{"type": "function", "function": ..}`; empty if none.

    Raises:
        DataError: It is neither a list of objects nor the JSON of one.
    """
    cell = from_json(cell)
    if cell is None or cell in ("", [], {}):
        return []
    schemas = [from_json(each) for each in (cell if isinstance(cell, list) else [cell])]
    for schema in schemas:
        if _function_of(schema) is None:
            raise DataError(f"holds {describe(schema)}. Each tool must be an object with the name of a function in it")
    check_values(schemas)
    return [each if "function" in each else {"type": "function", "function": each} for each in schemas]


def silenced(messages: list[Row]) -> list[Row]:
    """The given messages with a `weight` of 0 on each answer, so that none of them bears loss."""
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages]


def check_text(cell: Any) -> None:
    """Raise DataError unless a cell is text that can be tokenized."""
    if cell is None:
        raise DataError("is null or missing. Fill it in, or delete the row")
    if not isinstance(cell, str):
        raise DataError(f"is {describe(cell)}. It must be text; put numbers in quotes")
    if "\0" in cell:
        raise DataError("holds a NUL character (U+0000), as no text does. Remove it")
    if not cell.isascii() and any("\ud800" <= character <= "\udfff" for character in cell):
        raise DataError("has half a surrogate pair, such as \\ud83d alone, which is no character. Remove it")


def check_values(value: Any) -> None:
    """Raise DataError if JSON holds what a chat template cannot write: half characters, NaN, or too deep a nesting."""
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > _DEEPEST:
            raise DataError(f"is nested more than {_DEEPEST} levels deep. Flatten it, or delete the row")
        if isinstance(item, str):
            check_text(item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise DataError(f"holds the number {item}, which JSON does not have. Write null, or a string")
        elif isinstance(item, dict):
            pending += [(each, depth + 1) for pair in item.items() for each in pair]
        elif isinstance(item, (list, tuple)):
            pending += [(each, depth + 1) for each in item]


def from_json(cell: Any) -> Any:
    """What a string of JSON holds, if it is one of an object or a list; anything else as it is."""
    if isinstance(cell, str) and cell.strip()[:1] in ("{", "["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def as_messages(cell: Any) -> Any:
    """Messages, if a cell holds the JSON of some; text that is other JSON stays text."""
    found = from_json(cell)
    spoken = isinstance(found, list) and found and all(isinstance(each, dict) for each in found)
    return found if spoken and ("role" in found[0] or "from" in found[0]) else cell


def describe(value: Any) -> str:
    """A value with its type, shortened."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):
        text = ".."
    return f"{type(value).__name__} {shorten(text, 60)}"


def _message(number: int, message: Any) -> Row:
    if not isinstance(message, dict):
        raise DataError(f"message {number} is {describe(message)}. {_EXPECTED}")
    try:
        return _checked({key: value for key, value in message.items() if value is not None})
    except DataError as error:
        raise DataError(f"message {number}: {error}") from error


def _checked(message: Row) -> Row:
    """A message in the common form, from its keys that are not null."""
    named = "role" if "role" in message or "from" not in message else "from"
    said = "content" if "content" in message or "value" not in message else "value"
    role = message.pop(named, None)
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"{named!r} is {'null or missing' if role is None else describe(role)}. Say who speaks")
    lowered = role.strip().lower()
    if named == "from" and lowered not in ROLES and lowered not in _OWN:
        raise DataError(f"'from' is {role!r}. Accepted are human, gpt, {', '.join(_OWN)}, function_call, observation")
    calls = _calls(message)
    content = message.pop(said, None)
    if lowered in _CALLS and not calls:
        calls, content = _as_calls(from_json(content)), None
    content = _joined(content)
    if content is not None or not calls:
        try:
            check_text(content)
        except DataError as error:
            raise DataError(f"{said!r} {error}") from error
    result = {
        "role": ROLES.get(lowered, lowered if lowered in _OWN else role),
        "content": content,
        **message,
        **({"tool_calls": calls} if calls else {}),
    }
    return _weighted(result)


def _weighted(message: Row) -> Row:
    """With `weight` only if it is 0; `train` (axolotl's name) means the same."""
    weights = [message.pop(name, 1) for name in ("weight", "train")]
    if any(weight not in (0, 1) for weight in weights):
        raise DataError(f"'weight' is {describe(weights[0])}. Use 1, or 0 for an answer that bears no loss")
    return {**message, "weight": 0} if 0 in weights else message


def _joined(content: Any) -> Any:
    """Parts of text as one text."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content, start=1):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        type_ = part.get("type", "text") if isinstance(part, dict) else "text"
        if type_ != "text":
            raise DataError(
                f"part {number} of its content is of the type {type_!r}, and only text can be trained on. Remove it, "
                "or delete the row; pictures are for models that see (--task image-text-to-text)"
            )
        if not isinstance(text, str):
            raise DataError(f"part {number} of its content is {describe(part)}. Use {{'type': 'text', 'text': ..}}")
        texts.append(text)
    return "".join(texts)


def _calls(message: Row) -> list[Row]:
    """Calls of tools, taken out of a message; `function_call` is OpenAI's older name of a single one."""
    found = from_json(message.pop("tool_calls", None))
    older = from_json(message.pop("function_call", None))
    if not found and not older:
        return []
    return _as_calls(found or older)


def _function_of(value: Any) -> Row | None:
    """What names a function, in a call or a schema: all of it, or what stands under `function`."""
    function = value.get("function", value) if isinstance(value, dict) else None
    return function if isinstance(function, dict) and isinstance(function.get("name"), str) else None


def _as_calls(cell: Any) -> list[Row]:
    """Each as `{"type": "function", "function": {"name": .., "arguments": {..}}}`."""
    calls = []
    for call in cell if isinstance(cell, list) else [cell]:
        call = from_json(call)
        function = _function_of(call)
        if function is None:
            raise DataError(f"the call of a tool is {describe(call)}. It must have a name, and arguments")
        arguments = from_json(function.get("arguments") or {})
        kept = {key: value for key, value in call.items() if key != "function"} if "function" in call else {}
        calls.append({"type": "function", **kept, "function": {**function, "arguments": arguments}})
    return calls
