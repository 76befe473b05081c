"""Files and folders that appear all at once: written under a name of one's own, brought to the disk, then renamed."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(r"\.quadapt-([0-9a-f]{8})-(\d+)-[0-9a-f]{16}\.tmp")


@contextmanager
def writing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A new, empty file in the folder of `path` to write to; at the end it is on the disk and becomes `path`.

    Its name is this process's own, so that two processes which write the same file do not meet in it, and nobody can
    have put a link there. After an error it is removed; one that a killed process left goes with :func:`sweep`.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is off.
    """
    temporary = path.with_name(f".quadapt-{_HOST}-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        _sync(temporary)
        (os.replace if overwrite else rename_new)(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any, *, overwrite: bool = True) -> None:
    """Write a value to a file as JSON, all of it or nothing."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with writing(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_temporary(name: str) -> bool:
    """Whether a file is one that :func:`writing` makes."""
    return _TEMPORARY.fullmatch(name) is not None


def sweep(folder: Path, *, locked: bool = False) -> None:
    """Remove temporary files that killed processes have left in a folder.

    Args:
        folder: Where to look.
        locked: Nobody else can be writing there: look in the folders below too, and remove what other machines left.
    """
    for path in folder.rglob("*.tmp") if locked else folder.glob("*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and (locked or (found[1] == _HOST and not psutil.pid_exists(int(found[2])))):
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk."""
    if path.is_dir():
        for item in path.iterdir():
            if not item.is_symlink():
                sync_tree(item)
        sync_folder(path)
    else:
        _sync(path)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk, where the system lets one do so."""
    with suppress(OSError):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)


_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
"""What file systems answer to a call that they do not have."""
_NOREPLACE, _EXCHANGE = 1, 2
_HERE = -100  # AT_FDCWD: names are relative to the working folder


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False, and nothing done, where the system cannot."""
    return _renameat2(one, other, _EXCHANGE)


def rename_new(old: Path, new: Path) -> None:
    """Rename; never onto something that exists.

    Raises:
        FileExistsError: `new` exists.
    """
    if _renameat2(old, new, _NOREPLACE):
        return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    os.rename(old, new)


def _renameat2(old: Path, new: Path, flag: int) -> bool:
    """Linux's rename with a flag. False where there is none."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    sys.audit("os.rename", str(old), str(new), -1, -1)  # as os.rename does
    if call(_HERE, os.fsencode(old), _HERE, os.fsencode(new), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(old), None, str(new))
