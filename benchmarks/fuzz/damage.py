"""What is done to files: their bytes, their JSON, the JSON in their header."""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, 0.5, -0.5, 1e-9, 1e308),
    *(
        "",
        "a",
        "0",
        "1",
        "auto",
        "float16",
        "quadapt",
        "../x",
        "/",
        "~",
        "a/b",
        "\0",
        "\ud800",
        "é\u2028",
        "NaN",
        "x" * 300,
    ),
    *([], [[]], [None], [1, 2], ["a"], {}, {"a": 1}, {"": {}}, [{"a": [1]}]),
    *(float("nan"), float("inf"), -float("inf")),
)
"""Values that stand where others belong."""

values = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=8))


@dataclass(frozen=True)
class Edit:
    """One change to a file."""

    how: str
    """Which change: to the tree of a JSON text, or to bytes."""

    at: int
    """Where: taken modulo the number of places."""

    value: Any
    """What for."""


TREE = ("replace", "delete", "rename", "copy", "wrap")
BYTES = ("cut", "byte", "insert", "drop", "digits", "nest", "zero")


def edits(*hows: str) -> st.SearchStrategy[list[Edit]]:
    """One to three changes of these kinds."""
    one = st.builds(Edit, st.sampled_from(hows), st.integers(0, 2**20), values)
    return st.lists(one, min_size=1, max_size=3)


def damaged_json(data: bytes, changes: list[Edit]) -> bytes:
    """A JSON text with changes to its tree, as far as it has one, and then to its bytes."""
    tree = [change for change in changes if change.how in TREE]
    if tree:
        value = json.loads(data)
        for change in tree:
            value = _changed(value, change)
        data = json.dumps(value).encode("utf-8", "surrogatepass")
    return damaged_bytes(data, [change for change in changes if change.how in BYTES])


def _changed(value: Any, change: Edit) -> Any:
    places = _places(value) if isinstance(value, dict | list) else []
    if not places:
        return deepcopy(change.value)
    holder, key = places[change.at % len(places)]
    if change.how == "replace":
        holder[key] = deepcopy(change.value)  # later changes fall into it, and the next cases share it
    elif change.how == "delete":
        del holder[key]
    elif change.how == "wrap":
        holder[key] = [holder[key]]
    elif change.how == "copy":
        other, name = places[change.at // 7 % len(places)]
        holder[key] = json.loads(json.dumps(other[name]))
    elif isinstance(holder, dict):
        holder[str(change.value)] = holder.pop(key)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each place in a tree, as its holder and key."""
    found = []
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        found.append((value, key))
        if isinstance(inner, dict | list):
            found += _places(inner)
    return found


def damaged_bytes(data: bytes, changes: list[Edit]) -> bytes:
    """Bytes with changes."""
    for change in changes:
        at = change.at % (len(data) + 1)
        some = repr(change.value).encode("utf-8", "replace")[:40]
        if change.how == "cut":
            data = data[:at]
        elif change.how == "byte":
            data = data[:at] + bytes([change.at % 251]) + data[at + 1 :]
        elif change.how == "insert":
            data = data[:at] + some + data[at:]
        elif change.how == "drop":
            data = data[:at] + data[at + 1 + len(some) :]
        elif change.how == "digits":
            data = data[:at] + b"9" * 5000 + data[at:]
        elif change.how == "nest":
            data = data[:at] + b"[" * 20_000 + data[at:]
        else:
            data = data[:at] + bytes(8) + data[at + 8 :]
    return data


def damaged_header(data: bytes, changes: list[Edit]) -> bytes:
    """A safetensors file: changes to the tree of its header, then to bytes, of which most fall on the header."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = data[8 : 8 + length], data[8 + length :]
    tree = [change for change in changes if change.how in TREE]
    if tree:
        header = damaged_json(header, tree)
        data = struct.pack("<Q", len(header)) + header + rest
    raw = [Edit(change.how, change.at % (len(header) + 64), change.value) for change in changes if change.how in BYTES]
    return damaged_bytes(data, raw)
