"""Kinds of values that settings have, each with its range: declared once, where the setting is typed."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from annotated_types import BaseMetadata
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.fields import FieldInfo

from quadapt.setting import MOST


def _at_home(value: str) -> str:
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError("names the home folder of a user who does not exist. Write the path in full")
    return path


GroupSize = Annotated[int, Field(ge=-1, le=MOST)]
"""The format says which of these there are."""
Location = Annotated[str, Field(min_length=1), AfterValidator(_at_home)]
"""A path (`~` is the home folder), or a name on the hub."""


def _as_several(value: Any) -> Any:
    """One name is a list of one; commas may be part of a name."""
    return (value,) if isinstance(value, str) else () if value is None else value


Sources = Annotated[tuple[Location, ...], BeforeValidator(_as_several)]
"""Files, folders and names on the hub, all of which count: one, or a list."""

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 2, 200, 80, 40


def shown(value: Any) -> str:
    """A value in an error message: short, whatever it is."""
    try:
        return _repr.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number of thousands of digits"


def check_text(value: str) -> str:
    """The text, if files and file names can hold it.

    Raises:
        ValueError: It has a null character, or half a surrogate pair (bytes that are not UTF-8 arrive so).
    """
    if "\0" in value:
        raise ValueError("has a null character, which no path and no text can hold. Remove it")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("has a character that is not Unicode (half a surrogate pair, or a byte that is not UTF-8)")
    return value


def check_plain(value: Any, field: FieldInfo) -> Any:
    """A value as it was given, if it is what it looks like: text that can be written, no truth value for a number.

    Raises:
        ValueError: Says what is wrong.
    """
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, str):
            check_text(item)
        if isinstance(item, bytes | bytearray):
            raise ValueError("must be text, not bytes")
        if isinstance(item, bool) and not any(type_ in (bool, Any) for type_ in types_in(field.annotation)):
            raise ValueError(f"must be {allowed(field) or 'one of its values'}, not a truth value")
    return value


def types_in(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    yield annotation
    for inner in get_args(annotation):
        yield from types_in(inner)


def allowed(field: FieldInfo, *, largest: bool = False) -> str:
    """The numbers that a field takes, in words; nothing if it takes none. `largest`: also what 32 bits limit."""
    limits: dict[str, float] = {}
    inside = list(types_in(field.annotation))
    named = [item for type_ in inside if isinstance(type_, FieldInfo) for item in type_.metadata]
    for item in [*field.metadata, *named, *(each for each in inside if isinstance(each, BaseMetadata))]:
        limits |= {name: getattr(item, name) for name in ("gt", "ge", "lt", "le") if hasattr(item, name)}
    if not largest and limits.get("le", 0) >= MOST:
        del limits["le"]
    types = set(types_in(field.annotation))
    if not types & {int, float}:
        return ""
    noun = "a whole number" if int in types else "a number"
    if set(limits) == {"ge", "le"} and limits["ge"] == 0 and limits["le"] == 1:
        return f"{noun} from 0 to 1"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return f"{noun}, {' and '.join(f'{words[name]} {limit}' for name, limit in limits.items())}" if limits else noun
