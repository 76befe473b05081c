"""One command killed at one event, given again, and compared with an uninterrupted run.

Everything runs in children forked from one process that has imported all there is to import, so a trial costs what the
command costs. A file-system event is what Python's audit hook sees (open for writing, rename, unlink, mkdir, rmdir,
link, truncate, utime) or a call of `os.fsync`, on something below the trial's folder. At an `fsync` the file is cut in
half at each second trial: what lies there before may be all, or half.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.utime"}
_TIMES = {"seconds", "peak_memory", "digests", "losses", "seen", "quadapt.json"}
"""What may differ between two runs in a JSON file: times, memory, and digests over them, as over a note."""
COMPLETE = "complete.json"
"""The file that is written last into a checkpoint, by a rename."""
_USERS = {"out.old": "mine", ".out.new": "mine too", "photos/one.jpg": "precious"}
"""Files of the user that lie where the command works."""


@dataclass
class Found:
    """What came of the kills of a command."""

    events: int = 0
    killed: int = 0
    differing: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, int]:
        """As it is stored."""
        return {
            "events": self.events,
            "killed": self.killed,
            **{name: len(getattr(self, name)) for name in ("differing", "lost", "stuck")},
        }


def _writes(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in _EVENTS


def _watched(root: Path, at: int) -> list[str]:
    """From now on this process is killed at event number `at` below `root`; the paths of the events."""
    seen: list[str] = []
    fsync, where = os.fsync, str(root)

    def here(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(where)

    def event(path: object) -> None:
        seen.append(os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else "")
        if len(seen) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if _writes(name, arguments) and any(here(path) for path in arguments[:2]):
            event(arguments[1] if name == "os.rename" else arguments[0])

    def watched_fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if here(path):
            if len(seen) + 1 == at and at % 2 and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            event(path)
        fsync(handle)

    sys.addaudithook(hook)
    os.fsync = watched_fsync
    return seen


def _child(work: Callable[[], int], kill_after: float | None = None) -> int:
    """Do some work in a child; its exit code, negative if it was killed."""
    child = os.fork()
    if child == 0:
        code = 99
        with suppress(BaseException):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = work()
        os._exit(code)
    end = None if kill_after is None else time.monotonic() + kill_after
    limit = time.monotonic() + 600
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if now > (limit if end is None else end):
            os.kill(child, signal.SIGKILL)
            end = None
        time.sleep(0.002)


def _given(command: tuple[str, ...], folder: Path, at: int = 0) -> int:
    """Give a command in a folder, in this process; its exit code; the paths of its events are in `events`."""
    from typer.testing import CliRunner

    from quadapt.cli import app

    os.chdir(folder)
    seen = _watched(folder, at)
    code = CliRunner().invoke(app, list(command)).exit_code
    (folder.parent / "events").write_text(json.dumps(seen))
    return code


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stripped(each) for name, each in value.items() if name not in _TIMES}
    return [_stripped(each) for each in value] if isinstance(value, list) else value


def state(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, JSON without times; folders as such."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "folder"
            continue
        content = path.read_bytes()
        if path.suffix == ".json":  # the stamps of `run` among them, .tune.json and so on
            with suppress(ValueError):
                content = json.dumps(_stripped(json.loads(content)), sort_keys=True).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


class Trials:
    """Trials of one command.

    Args:
        command: What it reads is named by whole paths; it writes `out`, or files whose names begin so.
        scratch: Where the trials run.
        old: An output that the command is to replace, or None.
    """

    def __init__(self, command: tuple[str, ...], scratch: Path, old: Path | None = None) -> None:
        self.command, self.scratch, self.old, self.found = command, scratch, old, Found()
        self.before = state(self._folder())
        start = time.monotonic()
        folder = self._folder()
        if _child(lambda: _given(command, folder)) != 0:
            raise RuntimeError(f"{' '.join(command)}: fails without being killed")
        self.seconds = time.monotonic() - start
        self.events: list[str] = json.loads((scratch / "events").read_text())
        self.found.events = len(self.events)
        self.after = state(folder)

    def _folder(self) -> Path:
        """A fresh folder, with the user's files and the old output."""
        folder = self.scratch / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in _USERS.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
        if self.old is not None:
            (shutil.copytree if self.old.is_dir() else shutil.copy)(self.old, folder / "out")
        return folder

    def at(self, number: int, kill_after: float | None = None) -> None:
        """Kill the command at an event, or after some seconds; note what comes of it."""
        folder = self._folder()
        code = _child(lambda: _given(self.command, folder, number), kill_after)
        if code >= 0:
            return  # it ended before
        self.found.killed += 1
        where = f"event {number}" if kill_after is None else f"{kill_after:.3f} s"
        left = state(folder)
        if self._lost(left) or self._lost_checkpoints(left, number):
            self.found.lost.append(where)
        again = _child(lambda: _given(self.command, folder))
        now = state(folder)
        if again != 0 and not (again == 2 and now == self.after):  # the last: all was done already
            self.found.stuck.append(f"{where}: exit code {again}")
        elif now != self.after:
            differing = sorted(name for name in now.keys() | self.after.keys() if now.get(name) != self.after.get(name))
            self.found.differing.append(f"{where}: {', '.join(differing[:4])}")

    def _lost(self, left: dict[str, str]) -> bool:
        """Whether a file of the user is gone, or neither the old nor the new output is whole."""
        if any(left.get(name) != self.before[name] for name in _USERS):
            return True
        if self.old is None:
            return False
        now, old, new = (self._output(each) for each in (left, self.before, self.after))
        kept = {name: digest for name, digest in now.items() if name not in ("out/job.json", "out/.lock")}
        return kept not in (old, new)

    def _lost_checkpoints(self, left: dict[str, str], number: int) -> bool:
        """Whether a complete checkpoint was there before the kill, and now there is neither one nor what came of it.

        That is the output, or the dense model that was tuned first.
        """
        written = any(path.endswith("/" + COMPLETE) for path in self.events[: max(number - 1, 0)])
        kept = any(name.endswith("/" + COMPLETE) for name in left)
        return (
            written
            and not kept
            and not any(name.endswith(("adapter_config.json", "tuned/tuned.json")) for name in left)
        )

    @staticmethod
    def _output(state: dict[str, str]) -> dict[str, str]:
        return {name: digest for name, digest in state.items() if name == "out" or name.startswith("out/")}

    def every(self, most: int, chosen: random.Random) -> Iterator[int]:
        """Events to kill at: all, or so many of them, spread evenly from a random start."""
        events = self.found.events
        step = max(1.0, events / most)
        at = chosen.random() * step
        while at < events:
            yield int(at) + 1
            at += step
