"""Commands in process, and what may come of a case."""

from __future__ import annotations

import contextlib
import importlib
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from quadapt.cli.commands import COMMANDS, guarded, settings_of
from quadapt.config import checked
from quadapt.report.ui import UI

LONGEST = 10.0
"""Seconds of processor time that a case may take."""


class FaultError(AssertionError):
    """A case that ended as none may."""


def guard(work: Callable[[UI], Mapping[str, Any]]) -> tuple[int, str]:
    """Do some work as the command line does it.

    Returns:
        Exit code, and the last line of what was said.

    Raises:
        FaultError: It was called a bug, it ended by itself, or took too long.
    """
    said, out = io.StringIO(), io.StringIO()
    code, began, cause = 0, time.process_time(), None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
        try:
            guarded(lambda ui: dict(work(ui)), as_json=False, debug=False)
        except typer.Exit as error:
            code, cause = error.exit_code, error.__context__
    text = said.getvalue()
    if code not in (0, 2):
        raise FaultError(f"exit code {code}: {text[-1500:]}") from cause
    if "Traceback" in text:
        raise FaultError(f"a traceback: {text[-1500:]}")
    if time.process_time() - began > LONGEST:
        raise FaultError(f"took {time.process_time() - began:.0f} s")
    return code, text.rstrip("\n").rpartition("quadapt: ")[2]


def command(name: str, settings: Mapping[str, Any]) -> tuple[int, str]:
    """Give a command. An output of one that fails must not be there.

    Raises:
        FaultError: As `guard`; or something was left half written.
    """
    kind, where = settings_of(name), COMMANDS[name][1]
    module, _, function = where.partition(":")
    do = getattr(importlib.import_module(module), function)
    output = Path(settings["output"]) if "output" in settings else None
    code, said = guard(lambda ui: do(checked(kind, dict(settings)), ui))
    if code and output is not None and output.exists():
        raise FaultError(f"{name} failed ({said}), and left {output}")
    return code, said


def linked(source: Path, target: Path, changed: Mapping[str, bytes | None]) -> Path:
    """A folder with the files of another (links to them), of which some are changed, or left out (None)."""
    target.mkdir()
    for item in source.iterdir():
        if item.name not in changed:
            (target / item.name).symlink_to(item)
    for name, data in changed.items():
        if data is not None:
            (target / name).write_bytes(data)
    return target
