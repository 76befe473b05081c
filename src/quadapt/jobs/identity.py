"""What identifies a job: its settings, as far as they change the result, and the content of what it reads.

Names and times of change do not count. A file is known by its size and the SHA-256 of all its bytes, which is little
beside quantizing or training. That is taken once: what a job has seen is noted beside its work, and a file whose
size, inode and times (of content and of status, which no copying sets back) are still those is not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import quadapt
from quadapt.config import Machine, Settings, Walk
from quadapt.hf.notes import JOB, NOTE, note_of, partial_of
from quadapt.jobs.source import device_of

_MODEL_FILES = {".json", ".safetensors", ".model", ".txt", ".jinja", ".py", ".bin"}
"""Endings of the files of a model's folder that are read for its digest; its model card, say, is not."""

_seen: dict[str, list[Any]] = {}
"""Digests by path, each after the size, inode and times that the file had."""


def job_of(command: str, config: Settings, note: Mapping[str, Any] | None = None, /, **more: str) -> dict[str, Any]:
    """What identifies a job, so that an interrupted one is gone on with only by a command that means the same.

    Args:
        command: The name of the command.
        config: Its settings; idle ones do not count, and what they read counts by content.
        note: An earlier run's job, which may have seen the same files.
        more: Further folders that are read: the base of an adapter.
    """
    _remember((note or {}).get("seen"))
    flags, idle = config.flags(), config.idle()
    settings = {name: value for name, value in config.effective().items() if name not in idle and not flags[name].reads}
    if isinstance(config, Machine):
        settings["device"] = device_of(config).partition(":")[0]
        if isinstance(config, Walk) and settings["device"] == "cpu":
            settings["threads"] = torch.get_num_threads()  # last bits of statistics and gradients depend on them
    read = {name: names for name, names in config.reads().items() if name not in idle}
    read |= {name: (where,) for name, where in more.items()}
    inputs = {name: identity(*names) for name, names in read.items()}
    release = ".".join(quadapt.__version__.split(".")[:2])  # a patch level changes no result
    job = {"command": command, "version": release, "settings": settings, "inputs": inputs, "seen": _seen}
    return dict(json.loads(json.dumps(job)))


def earlier_job(output: Path) -> dict[str, Any]:
    """The job of an interrupted run that was to write `output`; empty if there is none."""
    note = note_of(partial_of(output)) or note_of(output) or {}
    return dict(note.get("job", {}))


def inputs_of(config: Settings) -> list[str]:
    """All files, folders and names of the hub that a command reads."""
    return [name for names in config.reads().values() for name in names]


def identity(*names: str) -> dict[str, str]:
    """What tells whether inputs are still the same: digests of files, by suffix or by name in their folder.

    What is no file here, a name of the hub, stands for itself.
    """
    found: dict[str, str] = {}
    for at, name in enumerate(names):
        path, own = Path(name).expanduser(), f"{at}:" if len(names) > 1 else ""
        if path.is_file():
            suffixes = path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]
            found[f"{own}{''.join(suffixes)}"] = _digest(path)
        elif path.is_dir():
            found |= {f"{own}{file.relative_to(path).as_posix()}": _digest(file) for file in _files(path)}
        else:
            found[f"{own}name"] = name
    return found


def _files(folder: Path) -> list[Path]:
    """Files that are read of a folder: a model's own ones, or all data below it, but not the work of a quadapt."""
    if any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        return sorted(item for item in folder.iterdir() if item.suffix in _MODEL_FILES and item.is_file())
    found = []
    for where, folders, names in os.walk(folder):
        if where != str(folder) and not {NOTE, JOB}.isdisjoint(names):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _digest(path: Path) -> str:
    about = path.stat()
    key = str(path.resolve())
    state = [about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns]
    known = _seen.get(key)
    if known is None or known[:-1] != state:
        with path.open("rb") as file:
            known = _seen[key] = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
    return str(known[-1])


def _remember(noted: object) -> None:
    """Take over the digests that an earlier run has noted."""
    for name, about in noted.items() if isinstance(noted, dict) else ():
        if isinstance(about, list) and len(about) == 5 and isinstance(about[-1], str):
            _seen.setdefault(name, about)
