"""What may be written where: outputs that exist, inputs that must not be lost, the room on the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from quadapt.errors import ConfigError, ResourceError
from quadapt.hf.notes import JOB, NOTE, is_finishing, partial_of


def check_output(output: Path, *, overwrite: bool, inputs: Iterable[str | None] = (), folder: bool = True) -> None:
    """Check that an output may be written.

    Args:
        output: Folder or file to write.
        overwrite: Whether it may be replaced.
        inputs: Files and folders that are read.
        folder: Which of the two it is.

    Raises:
        ConfigError: It exists and is not to be replaced, or is not of our making; or that would destroy an input.
    """
    shown = f"output={str(output)!r}"
    if is_finishing(output):
        return
    if os.path.lexists(output):
        if not overwrite:
            with suppress(OSError):  # a run that was killed at its very last step has left this, empty
                partial_of(output).rmdir()
            raise ConfigError(f"{shown} exists. Use --overwrite to replace it, or another --output")
        if output.is_dir() != folder:
            what, wanted = ("file", "folder") if folder else ("folder", "file")
            raise ConfigError(f"{shown} is a {what}; a {wanted} is to be written. Use another --output")
    for name in inputs:
        _check_input(output, name, shown)
    if output.is_dir():
        _check_replaceable(output, shown)


def _check_input(output: Path, name: str | None, shown: str) -> None:
    """Raise ConfigError if writing `output` would destroy the input `name`, or a file in it."""
    path = Path(name).expanduser() if name else None
    if path is None or not path.exists():
        return
    read, written = path.resolve(), output.resolve()
    inside = written.is_file() and read.is_dir() and written.parent == read and not _is_result(written)
    if inside or any(read.is_relative_to(each) for each in (written, partial_of(written))):
        raise ConfigError(f"{shown} would replace {name!r}, which is read. Use another --output")


def _is_result(path: Path) -> bool:
    """Whether a file in a model's folder is one that we have written there, rather than a part of the model."""
    if path.suffix != ".json":
        return path.suffix == ".gguf"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["kind"]).startswith("quadapt ")
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def _check_replaceable(output: Path, shown: str) -> None:
    """Raise ConfigError if a folder cannot be replaced as a whole, or is not of our making."""
    where = str(output.resolve())
    if os.path.ismount(output) or where in {disk.mountpoint for disk in psutil.disk_partitions(all=True)}:
        raise ConfigError(
            f"{shown} is a mount point, which cannot be replaced as a whole. Use a folder in it: --output "
            f"{output / 'model'}"
        )
    known = (NOTE, JOB, "report.json")  # the last: of a demonstration by an earlier version
    if any(output.iterdir()) and not any(_is_note(output / name) for name in known):
        raise ConfigError(
            f"{shown} is no folder that quadapt has written (there is no {NOTE} in it), and is not replaced. Use "
            "another --output, or remove it yourself"
        )


def _is_note(path: Path) -> bool:
    """Whether a file is a note that we have written."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    wanted = {"report.json": {"rows", "seed", "lines"}, JOB: {"job", "keeps"}}.get(path.name, set())
    return isinstance(note, dict) and wanted <= note.keys()


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
