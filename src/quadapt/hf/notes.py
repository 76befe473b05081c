"""The note in a folder in the making: whose work it is, and how far it has come."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTE = "quadapt.json"
"""The name of the file that says, in every folder that quadapt has written, what the folder is."""

JOB = "job.json"
"""The name of the file that says, in every folder that quadapt is at work in, what becomes of it."""

FORM = 2
"""The version of the note's form, which is counted up when what it holds changes."""


def partial_of(output: Path) -> Path:
    """The folder in which the work on an output is done, until it is whole."""
    return output.with_name(f"{output.name}.partial")


def note_of(folder: Path) -> dict[str, Any] | None:
    """What a folder in the making says of itself; None if it is not of our making.

    `job`: what is made. `keeps`: whether that can be gone on with. Once the work is whole, `whole`: which of its names
    goes where, with marks of the new and the old one there; `drop`: what is not needed any more; `result`.
    """
    try:
        note = json.loads((folder / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(note, dict):
        return None
    if note.get("form") == FORM:
        return note if _is_sound(note) else None
    return {"form": 1, "keeps": True, "job": note} if {"command", "version", "inputs"} <= note.keys() else None


def _is_sound(note: Mapping[str, Any]) -> bool:
    """Whether a note has all that is read of it, and names nothing outside its folder."""
    if not isinstance(note.get("job"), dict) or "keeps" not in note:
        return False
    if "whole" not in note:
        return True
    whole, drop = note["whole"], note.get("drop")
    if not isinstance(whole, list) or not isinstance(drop, list) or not isinstance(note.get("result"), dict):
        return False
    if not all(isinstance(move, dict) and {"from", "to", "new", "old", "aside"} <= move.keys() for move in whole):
        return False
    names = [*drop, *(move[key] for move in whole for key in ("from", "to", "aside"))]
    return all(isinstance(name, str) and os.path.basename(name) == name and name not in (".", "..") for name in names)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two notes of jobs, in words: `setting: old -> new`, and which input has changed."""
    if old["form"] != new["form"]:
        return ["it was begun by an earlier version of quadapt"]
    found = []
    one, other = old["job"], new["job"]
    for name in dict.fromkeys([*one, *other]):
        mine, theirs = one.get(name), other.get(name)
        if mine == theirs or name == "seen":
            continue
        if name == "inputs" and isinstance(mine, dict) and isinstance(theirs, dict):
            found += [_input_change(each, mine.get(each, {}), theirs.get(each, {})) for each in _unlike(mine, theirs)]
        elif isinstance(mine, dict) and isinstance(theirs, dict):
            found += [
                f"{each}: {_shown(mine.get(each))} -> {_shown(theirs.get(each))}" for each in _unlike(mine, theirs)
            ]
        else:
            found.append(f"{name}: {_shown(mine)} -> {_shown(theirs)}")
    return found


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]


def _shown(value: Any) -> str:
    text = "not given" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}.."


def _input_change(name: str, old: Mapping[str, str], new: Mapping[str, str]) -> str:
    if "name" in old or "name" in new or not old or not new:
        return f"{name}: {_shown(old.get('name', 'files' if old else None))} -> " + _shown(
            new.get("name", "files" if new else None)
        )
    files = [file for file in _unlike(old, new) if not file.startswith(".")]
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{name}: its content has changed" + (f" ({', '.join(files[:3])}{more})" if files else "")


def mark(path: Path) -> int | None:
    """What tells a file or folder from another of the same name."""
    return path.lstat().st_ino if os.path.lexists(path) else None


def placed(note: Mapping[str, Any] | None, beside: Path) -> list[bool]:
    """For each part of a whole work, whether it already has its final name beside a path; empty if it is not whole."""
    return [mark(beside.with_name(move["to"])) == move["new"] for move in (note or {}).get("whole", ())]


def is_finishing(output: Path) -> bool:
    """Whether an output is whole, and there only because its own run was killed before it had tidied up."""
    return any(any(placed(note_of(where), output)) for where in (output, partial_of(output)))
