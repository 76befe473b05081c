"""Write outputs all or nothing, and go on where an interrupted run stopped.

Work happens in `OUTPUT.partial`. A file there, `job.json`, says which job it belongs to: a command that means the same
finds it and goes on; another one is refused, unless it is told to start over. When the work is whole, and on the disk,
it takes its final name in one step; what was there before goes only then. `job.json` leaves last, so that a run that
is killed in between is brought to its end by the next one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock

from quadapt.errors import ConfigError
from quadapt.files import exchange, is_temporary, remove, rename_new, sweep, sync_folder, sync_tree, write_json
from quadapt.hf.notes import FORM, JOB, NOTE, differences, mark, note_of, partial_of, placed
from quadapt.hf.outputs import check_disk, check_output

__all__ = ["Workspace", "check_disk", "check_output", "remove", "write_json"]

log = logging.getLogger("quadapt")

_LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What file systems answer that have no locks."""


class Workspace:
    """An output in the making: a folder, or files that are placed together.

    Args:
        output: The path that the finished work is to have.
        job: What is being made, as JSON: settings and the identity of inputs. Decides whether an interrupted run is
            gone on with.
        overwrite: Replace a finished `output` once the new one is complete, and start over if the unfinished work is
            another job's.
        needs: How many bytes the job will write.
        keeps: Whether an interrupted run can be gone on with. If not, starting over loses nothing.
        places: For what is no folder, or not all that is made: where things go, by their name in the making; `output`
            is one of them, and the others, files, lie beside it.
        folder: Whether `output` is a folder.

    Raises:
        ConfigError: `output` exists and `overwrite` is off, or it is not of our making; or unfinished work of another
            job, or something else, is in the way; or another process is at work on it.
        ResourceError: The disk lacks `needs` bytes.
    """

    path: Path
    """The folder to work in until the output is whole."""

    resumed: bool
    """Whether there is work of an earlier run to go on with."""

    finished: dict[str, Any] | None
    """The result, if an earlier run had come to its end and was only stopped while it tidied up: nothing is to do."""

    def __init__(
        self,
        output: Path,
        job: Mapping[str, Any],
        *,
        overwrite: bool = False,
        needs: int = 0,
        keeps: bool = True,
        places: Mapping[str, Path] | None = None,
        folder: bool = True,
    ) -> None:
        if output.is_symlink() and output.is_dir():
            output = Path(os.path.realpath(output))  # what it leads to is replaced, on its own disk
        self.output, self.path = output, partial_of(output)
        self._overwrite, self._places = overwrite, dict(places or {})
        self._about = {"form": FORM, "keeps": keeps, "job": json.loads(json.dumps(job))}
        self._old = {place: mark(place) for place in self._places.values() or [output]}
        self._lock: filelock.BaseFileLock | None = None
        self.resumed, self.finished = False, self._tidied()
        if self.finished is not None:
            return
        for place in self._places.values() or [output]:
            check_output(place, overwrite=overwrite, folder=place == output and folder)
        if not {JOB, _LOCK}.isdisjoint(self._places):
            raise ConfigError(f"output={str(output)!r}: quadapt itself uses this name while it works. Use another")
        check_disk(output.parent, needs)
        _check_ours(self.path, output)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"output={str(output)!r} cannot be written ({error.strerror}). Use another --output"
            ) from error
        self._lock = _locked(self.path, output)
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise

    def _begin(self) -> None:
        """Find out what lies in the folder: whole work, work to go on with, or work to give up."""
        note = note_of(self.path)
        changes = [] if note is None else differences(note, self._about)
        if note is not None and "whole" in note:
            if not changes:
                self.finished = self._placed(note)
                return
            _restore(note, self.path)
        self.resumed = note is not None and not changes and self._about["keeps"] and _work_in(self.path)
        if self.resumed:
            sweep(self.path, locked=True)
        else:
            if note is not None and changes and _work_in(self.path):
                self._check_given_up(note, changes)
            for item in self.path.iterdir():
                if item.name not in (_LOCK, JOB):
                    remove(item)
        write_json(self.path / JOB, self._about)

    def _check_given_up(self, note: Mapping[str, Any], changes: Sequence[str]) -> None:
        """Raise ConfigError if work would be lost that another command can go on with."""
        if note["keeps"] and not self._overwrite:
            raise ConfigError(
                f"{str(self.path)!r} holds the work of an interrupted run that this command would not go on with: "
                f"{'; '.join(changes)}. Give that run's own command to go on, or use another --output, or --overwrite "
                "to delete that work and start over"
            )
        log.warning("%s belongs to another job (%s): starting over", self.path, "; ".join(changes))

    def commit(self, *drop: str, result: Mapping[str, Any] | None = None) -> None:
        """Give the work its final name, without what only the making needed.

        At each moment the old or the new output is whole under its name, where the system can swap two names; elsewhere
        the next run brings it back. Interrupted anywhere, the same job comes to its end when it is given again.

        Args:
            drop: Names in the folder that are removed.
            result: What the command says; kept until all is done.

        Raises:
            ConfigError: Something has come to be where the output goes, meanwhile.
        """
        if not self._places and not (self.path / NOTE).exists():
            write_json(self.path / NOTE, {"kind": self._about["job"].get("command", "folder")})
        for item in self.path.iterdir():
            if item.name not in (JOB, _LOCK, *drop):
                sync_tree(item)
        moves = {name: place for name, place in self._places.items() if (self.path / name).exists()}
        whole = [
            {
                "from": name,
                "to": place.name,
                "new": mark(self.path / name),
                "old": self._old[place],
                "aside": f".{place.name}.{secrets.token_hex(8)}.old",
            }
            for name, place in (moves or {"": self.output}).items()
        ]
        kept = json.loads(json.dumps(dict(result or {}), default=str))
        note = {**self._about, "whole": whole, "drop": drop, "result": kept}
        write_json(self.path / JOB, note)
        self._placed(note)

    def _placed(self, note: Mapping[str, Any]) -> dict[str, Any]:
        """Bring whole work to its place, as far as that has not been done; the result."""
        for name in note["drop"]:
            remove(self.path / name)
        for move in note["whole"]:
            _swap(self.path, move)
        if self._places:
            _clear(self.path)
        else:
            self.path = self.output
            _tidy(self.output)
        return dict(note["result"])

    def _tidied(self) -> dict[str, Any] | None:
        """Finish what a run has left that was killed after its last step; its result, if it was this very job."""
        where = self.path if self._places else self.output
        note = note_of(where)
        if note is None or not all(placed(note, self.output)) or "whole" not in note:
            if self._places and self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()
            return None
        lock = _locked(where, self.output)
        try:
            (_clear if self._places else _tidy)(where)
        finally:
            lock.release()
        return None if differences(note, self._about) else dict(note["result"])

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the folder. After an error it stays as it is, for the next run, unless nothing was done in it."""
        if self._lock is None:
            return
        if error_type is not None and self.path != self.output and self.path.is_dir() and not _work_in(self.path):
            _clear(self.path)
        self._lock.release()


def _check_ours(path: Path, output: Path) -> None:
    """Raise ConfigError if the place to work in is taken by what is not of our making."""
    if not os.path.lexists(path):
        return
    names = {item.name for item in path.iterdir()} if path.is_dir() and not path.is_symlink() else None
    if names is None or (note_of(path) is None and not all(name == _LOCK or is_temporary(name) for name in names)):
        raise ConfigError(
            f"output={str(output)!r} cannot be written ({str(path)!r}, where the work would be done, exists and is not "
            "of an interrupted run). Use another --output, or move it away"
        )


def _locked(folder: Path, output: Path) -> filelock.BaseFileLock:
    """The lock of a folder in the making, held.

    Raises:
        ConfigError: Another process holds it.
    """
    lock_types: list[type[filelock.BaseFileLock]] = [filelock.FileLock, filelock.SoftFileLock]
    for lock_type in lock_types:
        lock = lock_type(folder / _LOCK, timeout=0)
        try:
            lock.acquire()
            return lock
        except filelock.Timeout:
            raise ConfigError(
                f"another quadapt is writing {str(output)!r}. Wait for it, or use another --output"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS or lock_type is lock_types[-1]:
                raise ConfigError(
                    f"{str(folder / _LOCK)!r} cannot be locked ({error.strerror}). Use --output on another disk"
                ) from error
    raise AssertionError


def _swap(making: Path, move: Mapping[str, Any]) -> None:
    """Bring one piece of whole work to its place, unless it is there; what was there is then in the making."""
    new, to = making / move["from"], making.with_name(move["to"])
    there = mark(to)
    if there == move["new"]:
        return
    if there not in (None, move["old"]) or mark(new) != move["new"]:
        raise ConfigError(
            f"{str(to)!r} has been made by someone else meanwhile. Move it away, and give the command again"
        )
    if there is None:
        rename_new(new, to)
    elif not new.is_dir():
        os.replace(new, to)
    elif not exchange(new, to):
        os.rename(to, to.with_name(move["aside"]))
        os.rename(new, to)
    sync_folder(to.parent)


def _restore(note: Mapping[str, Any], making: Path) -> None:
    """Bring back an old output that was put aside for a new one which is not to come."""
    for move in note["whole"]:
        to, aside = making.with_name(move["to"]), making.with_name(move["aside"])
        if not os.path.lexists(to) and mark(aside) == move["old"] is not None:
            os.rename(aside, to)


def _tidy(output: Path) -> None:
    """Remove what lies beside and in a new output only because it has just been made."""
    note = note_of(output)
    for move in (note or {}).get("whole", ()):
        for old in (partial_of(output), output.with_name(move["aside"])):
            if mark(old) == move["old"] is not None:
                remove(old)
    (output / _LOCK).unlink(missing_ok=True)
    (output / JOB).unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove a folder in the making; what says that it is one goes last."""
    for item in folder.iterdir():
        if item.name not in (_LOCK, JOB):
            remove(item)
    (folder / _LOCK).unlink(missing_ok=True)
    (folder / JOB).unlink(missing_ok=True)
    folder.rmdir()


def _work_in(folder: Path) -> bool:
    """Whether anything has been made in a folder."""
    files = (item.name for item in folder.rglob("*") if not item.is_dir())
    return not all(name in (_LOCK, JOB) or is_temporary(name) for name in files)
