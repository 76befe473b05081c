"""What a tokenizer in the manner of sentencepiece does with spaces, by the steps of its tokenizer.json.

The space is written as a sign of its own. llama.cpp puts one before a text, or not; and of unigram tokenizers it knows
the table by which sentencepiece normalizes characters, and whether runs of spaces become one.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from quadapt.errors import ExportError

_SPACE = "\u2581"
"""The sign that sentencepiece writes for a space."""

_ON_SPACES = (
    "Split",
    json.dumps({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}),
)
"""A step of Gemma's, which does nothing: by then its normalizer has replaced all spaces."""


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """What becomes of spaces and other characters before a text is cut into pieces."""

    prefix: bool
    """Whether a space is put before a text."""

    one: bool = False
    """Whether runs of spaces become one, and those at the ends are taken off."""

    charsmap: bytes = b""
    """The table by which sentencepiece normalizes characters; empty if there is none."""

    notes: tuple[str, ...] = ()
    """What llama.cpp does otherwise, in words."""


_LEADING = "to a text that begins with a space llama.cpp adds one more, the tokenizer does not"
_AFTER_MARKS = "llama.cpp puts a space after each special token within a text, too, the tokenizer before the text alone"
_TWO_ENDS = "a line end of two characters (CR, LF) is one space to the tokenizer, and two to llama.cpp"
_ONE = [("Strip", (False, True)), ("Runs", _SPACE)]


def read_spaces(data: dict[str, Any], tokens: Sequence[str]) -> Spaces:
    """Sort out normalizer and pre_tokenizer of a tokenizer.json.

    Args:
        data: The content of the file.
        tokens: The text of all tokens.

    Raises:
        ExportError: llama.cpp does nothing that is known to be the same.
    """
    normalizers, pre = steps_of(data["normalizer"], "normalizers"), steps_of(data["pre_tokenizer"], "pretokenizers")
    charsmap = b""
    if normalizers and normalizers[0][0] == "Precompiled":
        charsmap, normalizers = base64.b64decode(normalizers[0][1] or ""), normalizers[1:]
    found = _of_steps(normalizers, pre, charsmap)
    if found is None:
        raise ExportError(
            f"tokenizer.json: normalizer {json.dumps(data['normalizer'])[:300]} with pre_tokenizer "
            f"{json.dumps(data['pre_tokenizer'])} is neither byte-level nor in the manner of sentencepiece that "
            "llama.cpp knows. Use --format hf"
        )
    if charsmap and not found.one:
        found = replace(found, notes=(*found.notes, _TWO_ENDS))
    apart = any(type_ == "WhitespaceSplit" or (type_ == "Metaspace" and value[1] is True) for type_, value in pre)
    inner = [token for token in tokens if _SPACE in token[1:]] if apart else []
    if inner:
        note = (
            f"the tokenizer cuts at spaces, so that it never uses {len(inner)} of its tokens with spaces in them "
            f"({', '.join(map(repr, inner[:3]))}, ..), and llama.cpp does"
        )
        return replace(found, notes=(*found.notes, note))
    return found


def _of_steps(normalizers: list[tuple[str, Any]], pre: list[tuple[str, Any]], charsmap: bytes) -> Spaces | None:
    """What the steps come to, but for the table; None if they are not known."""
    replaced = ("Replace", _SPACE)
    if pre in ([], [_ON_SPACES]):
        if normalizers in ([replaced], [("Prepend", _SPACE), replaced]):
            return Spaces(prefix=len(normalizers) == 2, charsmap=charsmap)
        return None
    if len(pre) == 2 and pre[0][0] == "WhitespaceSplit" and not normalizers and _metaspace(pre[1:]) == "always":
        ends = () if _maps_ends(charsmap) else ("line ends and tabs the tokenizer drops, and llama.cpp does not",)
        return Spaces(prefix=True, one=True, charsmap=charsmap, notes=ends)
    scheme = _metaspace(pre)
    if scheme is None or normalizers not in ([], _ONE):
        return None
    if normalizers == _ONE:
        return Spaces(prefix=True, one=True, charsmap=charsmap) if scheme != "never" else None
    if scheme == "never":
        return Spaces(prefix=False, charsmap=charsmap)
    notes = (_LEADING, _AFTER_MARKS) if scheme == "first" else (_LEADING,)
    return Spaces(prefix=True, charsmap=charsmap, notes=notes)


def _metaspace(pre: list[tuple[str, Any]]) -> str | None:
    """The scheme by which a step of the kind Metaspace puts a space before a text; None if there is no such step."""
    return str(pre[0][1][0]) if len(pre) == 1 and pre[0][0] == "Metaspace" and isinstance(pre[0][1], tuple) else None


def _maps_ends(charsmap: bytes) -> bool:
    """Whether a table makes spaces of line ends and tabs."""
    from tokenizers import normalizers

    return bool(charsmap) and normalizers.Precompiled(charsmap).normalize_str("a\n\tb") == "a  b"


def steps_of(part: dict[str, Any] | None, key: str) -> list[tuple[str, Any]]:
    """The steps of a normalizer or pre_tokenizer (absent, one, or a sequence): type, and what matters of each."""
    steps = [] if part is None else part[key] if part["type"] == "Sequence" else [part]
    return [_step(step) for step in steps]


def _step(step: dict[str, Any]) -> tuple[str, Any]:
    """A step in short, if it is of a kind that is known here; else its type and all of it."""
    kind = step["type"]
    if kind == "Replace" and step["pattern"] == {"String": " "}:
        return "Replace", step["content"]
    if kind == "Replace" and step["pattern"] == {"Regex": " {2,}"} and step["content"] in (" ", _SPACE):
        return "Runs", _SPACE
    if kind == "Metaspace" and step["replacement"] == _SPACE:
        return "Metaspace", (step["prepend_scheme"], step["split"])
    short = {
        "Prepend": lambda: step["prepend"],
        "Precompiled": lambda: step["precompiled_charsmap"],
        "Strip": lambda: (step["strip_left"], step["strip_right"]),
        "WhitespaceSplit": lambda: None,
    }
    return kind, short[kind]() if kind in short else json.dumps(step)
