"""Compile kernels with numba, and keep the machine code in a cache that may be damaged without harm.

numba trusts what its cache folder holds: a file that was cut short is an error in every run from then on, and one whose
bytes were changed is run. Here every file begins with a digest of the rest, and a data file names the kernel it is for.
What does not agree is removed and compiled anew; a folder that cannot be read or written costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile

log = logging.getLogger("quadapt")

_DIGEST = hashlib.sha256().digest_size


def jit(function: Callable[..., Any]) -> Any:
    """Compile on first use, and keep the machine code on disk where some cache folder can be written."""
    compiled: Any = njit(nogil=True)(function)
    with suppress(RuntimeError):  # numba found no folder to write to
        compiled._cache = _Cache(function)
    return compiled


class _Cache(FunctionCache):
    """numba's cache of one function, for which no trouble with files is an error."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, f"{self._impl.filename_base}.sha256", _sources())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # whatever another version of numba or LLVM makes of what is there
            log.warning("%s: a compiled kernel cannot be used (%s). It is compiled anew", self._cache_path, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _not_kept(self._cache_path, error.strerror or str(error))


class _Files(IndexDataCacheFile):
    """The index of one function's compiled forms, and a file for each of them."""

    def load(self, key: Any) -> Any:
        name = self._load_index().get(key)
        found = None if name is None else self._read(self._data_path(name))
        if found is None:
            return None
        known, data = pickle.loads(found)
        return data if known == key else None  # two processes may have given a name at the same time

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (key, data))

    def _load_index(self) -> Any:
        found = self._read(self._index_path)
        if found is None:
            return {}
        stamp, index = pickle.loads(found)
        return pickle.loads(index) if stamp == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads: Any) -> None:
        self._write(self._index_path, ((self._version, self._source_stamp), self._dump(overloads)))

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), data)

    def _read(self, path: str) -> bytes | None:
        """A file's content, or None if it is not there or not whole."""
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s). The kernel is compiled anew", path, error.strerror)
            return None
        if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
            return content[_DIGEST:]
        log.warning("%s is damaged. It is removed, and the kernel compiled anew", path)
        with suppress(OSError):
            os.unlink(path)
        return None

    def _write(self, path: str, value: Any) -> None:
        content = self._dump(value)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(content).digest() + content)


@cache
def _sources() -> str:
    """A digest of all kernels: one that calls another, or an intrinsic, has its machine code within its own."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@cache
def _not_kept(folder: str, why: str) -> None:
    """Warn, once for each folder, that compiled kernels cannot be kept there."""
    log.warning("%s: compiled kernels cannot be kept there (%s). They are compiled anew in every run", folder, why)
