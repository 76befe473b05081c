"""Write folders all or nothing, and go on where an interrupted run stopped.

Work happens in `OUTPUT.partial`. A file there, `job.json`, says which job it belongs to: the same command finds it and
goes on, another one starts over and says so. The finished folder is renamed to `OUTPUT`, so that `OUTPUT` is complete
whenever it exists.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from quadapt.errors import ConfigError, ResourceError

log = logging.getLogger("quadapt")


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class Workspace:
    """A folder in the making.

    Args:
        output: Its final name.
        job: What is being made, as JSON: settings and the identity of inputs. Decides whether an interrupted run is
            gone on with.
        overwrite: Replace a finished `output` once the new one is complete.
        needs: Bytes that the job will write.

    Raises:
        ConfigError: `output` exists and `overwrite` is off, or another process is at work on it.
        ResourceError: The disk lacks `needs` bytes.
    """

    def __init__(self, output: Path, job: Mapping[str, Any], *, overwrite: bool = False, needs: int = 0) -> None:
        self.output, self._overwrite = output, overwrite
        self.path = output.with_name(output.name + ".partial")
        self._job = json.loads(json.dumps(job))
        check_output(output, overwrite=overwrite)
        if output.exists() and not output.is_dir():
            raise ConfigError(f"output={str(output)!r} is a file; a folder is to be written. Use another --output")
        check_disk(output.parent, needs)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"output={str(output)!r} cannot be written ({error.strerror}). Use another --output"
            ) from error
        self._lock()
        self.resumed = self._resume()

    def _lock(self) -> None:
        self._lock_file = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the work is done
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise ConfigError(
                f"another quadapt is writing {str(self.output)!r}. Wait for it, or use another --output"
            ) from error

    def _resume(self) -> bool:
        """Whether what lies in the folder belongs to this job; if not, it is removed."""
        note = self.path / "job.json"
        left = [item for item in self.path.iterdir() if item.name != ".lock"]
        if left:
            try:
                if json.loads(note.read_text(encoding="utf-8")) == self._job:
                    return True
                log.warning("%s belongs to a job with other settings: starting over", self.path)
            except (OSError, ValueError, RecursionError):
                log.warning("%s is not the work of an interrupted run of this version: starting over", self.path)
            for item in left:
                remove(item)
        write_json(note, self._job)
        return False

    def commit(self, *drop: str) -> None:
        """Remove what only the making needed (`drop`), and give the folder its final name.

        Whenever this is interrupted, either folder is whole, and the same job goes on.
        """
        for name in drop:
            remove(self.path / name)
        old = self.output.with_name(f".{self.output.name}.old")
        remove(old)
        if self.output.exists() and self._overwrite:
            os.rename(self.output, old)
        os.rename(self.path, self.output)
        self.path = self.output
        for path in (self.path / "job.json", self.path / ".lock", old):
            remove(path)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the folder. After an error it stays as it is, for the next run, unless nothing was done in it."""
        self._lock_file.close()
        if kind is not None and {item.name for item in self.path.rglob("*") if item.is_file()} <= {"job.json", ".lock"}:
            remove(self.path)


def check_output(output: Path, *, overwrite: bool, inputs: Sequence[str | None] = ()) -> None:
    """Raise ConfigError if `output` exists and is not to be replaced, or if replacing it would destroy an input."""
    if output.exists() and not overwrite:
        raise ConfigError(f"output={str(output)!r} exists. Use --overwrite to replace it, or another --output")
    for name in inputs:
        if name and Path(name).exists() and Path(name).resolve().is_relative_to(output.resolve()):
            raise ConfigError(f"output={str(output)!r} would replace {name!r}, which is read. Use another --output")


def check_disk(folder: Path, needs: int) -> None:
    """Check that `needs` bytes can be written into `folder`, or into its nearest existing parent.

    Raises:
        ConfigError: It is a file, or may not be written.
        ResourceError: The disk has less.
    """
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "no permission" if folder.is_dir() else "it is a file"
        raise ConfigError(f"{str(folder)!r} cannot be written into ({why}). Use another --output")
    free = shutil.disk_usage(folder).free
    if needs > free:
        raise ResourceError(
            f"{str(folder)!r} has {free / 1e9:.2f} GB free, the output needs {needs / 1e9:.2f} GB. "
            "Free some space, or use --output on another disk"
        )


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
