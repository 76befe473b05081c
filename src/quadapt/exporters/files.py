"""Write under another name and rename what is whole: an export that fails leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quadapt.errors import ExportError


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name in the same folder to write to; `path` is replaced by it at the end.

    Raises:
        ExportError: `path` is a folder.
    """
    if path.is_dir():
        raise ExportError(f"{path}: is a folder. Give the name of a file, such as {path / 'model.gguf'}")
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into; it becomes `path` at the end.

    Raises:
        ExportError: `path` exists and is not an empty folder: files of two exports must not mix.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ExportError(f"{path}: exists already. Remove it, or choose another folder")
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()  # empty, see above; some systems do not rename onto a folder
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
