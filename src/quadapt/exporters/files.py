"""Write under another name and rename what is whole: an export that fails leaves nothing behind."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quadapt.errors import ExportError
from quadapt.files import remove, rename_new, sync_tree, write_json, writing
from quadapt.hf.notes import NOTE

if TYPE_CHECKING:
    from huggingface_hub.serialization._base import StateDictSplit


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name in the same folder to write to; `path` is replaced by it at the end.

    Raises:
        ExportError: `path` is a folder.
    """
    if path.is_dir():
        raise ExportError(f"{path}: is a folder. Give the name of a file, such as {path / 'model.gguf'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as partial:
        yield partial


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into; it becomes `path` at the end, with a note that it is of our making.

    Raises:
        ExportError: `path` exists and is not an empty folder: files of two exports must not mix.
    """
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise ExportError(f"{path}: exists already. Remove it, or choose another folder")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if not (partial / NOTE).exists():
            write_json(partial / NOTE, {"kind": "export"})
        sync_tree(partial)
        if path.exists():
            path.rmdir()  # empty, see above; some systems do not rename onto a folder
        rename_new(partial, path)
    finally:
        remove(partial)


def write_index(shards: StateDictSplit, folder: Path) -> None:
    """Say which file of a folder holds which tensor, if there is more than one."""
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
