"""The `quadapt` command. This file imports nothing slow, so that Ctrl-C ends quietly from the first moment on."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

interrupted = False
"""Whether Ctrl-C was pressed: inside an import it may surface as another error than KeyboardInterrupt."""

begun = False
"""Whether the command's own work has begun; before that, only modules are imported."""


def main() -> None:
    """Entry point of the command: exit codes are 0, 1, 2 and 130."""
    try:
        # Where Ctrl-C is ignored (a shell's background job), or another program's handler stands, it stays so.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _on_interrupt)
        from quadapt.cli.commands import app

        app()
    except KeyboardInterrupt:
        _stop()
    except Exception:
        if not interrupted:
            raise
        _stop()


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    global interrupted
    interrupted = True
    if not begun:  # an exception within the import of a library in C++ may abort the process; and nothing is to tidy up
        os.write(2, b"quadapt: interrupted\n")
        os._exit(130)
    signal.default_int_handler(number, frame)


def _stop() -> None:
    print("quadapt: interrupted", file=sys.stderr)  # noqa: T201
    sys.exit(130)


def __getattr__(name: str) -> Any:
    """What the commands are made of (`app`, `COMMANDS`), imported when it is first asked for."""
    if name.startswith("__"):  # what the import system asks of a package
        raise AttributeError(name)
    import importlib

    return getattr(importlib.import_module("quadapt.cli.commands"), name)
