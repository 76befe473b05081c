"""Settings are checked here, and what is wrong with them is said."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from quadapt.config.values import allowed, shown
from quadapt.errors import ConfigError

S = TypeVar("S", bound=BaseModel)


def checked(cls: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Check the settings of a command and return them as an object.

    Args:
        cls: The class of the command's settings.
        values: The values that were given, by the name of the setting.
        where: What to put before the name of a setting that is wrong: `job.yaml: tune.`, say.

    Raises:
        ConfigError: A setting is wrong. The message has what is allowed, and what may have been meant.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        # A name with a typo explains why the right one is missing: it goes first.
        wrong = error.errors(include_url=False)
        raise ConfigError(_said(cls, min(wrong, key=lambda each: each["type"] != "extra_forbidden"), where)) from None


def _said(cls: type[BaseModel], first: ErrorDetails, where: str) -> str:
    name = str(first["loc"][0]) if first["loc"] else cls.__name__
    if first["type"] in ("extra_forbidden", "invalid_key"):
        near = difflib.get_close_matches(name, cls.model_fields)
        hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(cls.model_fields)}"
        return f"{where}{shown(name)[1:-1]} is not a setting. {hint}"
    field = cls.model_fields.get(name)
    words = " ".join(((field.description if field else "") or "").split())
    if first["type"] == "missing":
        return f"{where}{name} is missing. {words}"
    if first["type"] == "string_too_short":
        return f"{where}{name} is empty. {words}"
    message = _message(first, field)
    return f"{where}{name}={shown(first['input'])}: {message[0].lower()}{message[1:]}"


_MESSAGES = {
    "string_type": "must be text. Put it in quotes",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "dict_type": "must be a section: settings below it, each as `name: value`",
    "tuple_type": "must be a list",
    "too_short": "must have at least one item",
}
_NUMBERS = ("int_", "float_", "greater_", "less_", "finite_")


def _message(first: ErrorDetails, field: FieldInfo | None) -> str:
    if first["type"].startswith(_NUMBERS) and field is not None:
        return f"must be {allowed(field, largest=first['type'] in ('less_than_equal', 'int_parsing_size'))}"
    if first["type"] == "literal_error":
        words = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        near = difflib.get_close_matches(str(first["input"]), words)
        return first["msg"] + (f". Did you mean {near[0]}?" if near else "")
    return _MESSAGES.get(first["type"]) or first["msg"].removeprefix("Value error, ")
