"""A machine that has too little of something is told from a bug, and what to do is said."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import give
from safetensors import SafetensorError
from safetensors.torch import save_file

from quadapt.errors import CheckpointError, ResourceError
from quadapt.hf.reading import reading
from quadapt.limits import limit_of

QUANTIZE = ("quantize", "dense", "--output", "new", "--rounding", "nearest")


class PanicException(BaseException):
    """Called as what Rust panics with."""


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


SPACE, SIZE, MEMORY = "Free some space", "ulimit -f", "Use a smaller --batch-size"

LIMITS: dict[str, tuple[BaseException, str, str]] = {
    "full": (OSError(errno.ENOSPC, "No space left on device", "x/a.bin"), "x/a.bin: no space left on the disk", SPACE),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up", SPACE),
    "file size": (OSError(errno.EFBIG, "File too large"), "a file would be larger", SIZE),
    "files": (OSError(errno.EMFILE, "Too many open files"), "too many files are open", "ulimit -n"),
    "safetensors full": (
        SafetensorError("Error while serializing: No space left on device (os error 28)"),
        "no",
        SPACE,
    ),
    "safetensors size": (SafetensorError("I/O error: File too large (os error 27)"), "a file would be larger", SIZE),
    "tokenizers full": (Exception("No space left on device (os error 28)"), "", ""),
    "torch archive": (
        RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 704 vs 598"),
        "a file could not be written in full",
        SPACE,
    ),
    "torch writer": (
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        "a file",
        SPACE,
    ),
    "beneath": (
        caused(ValueError("cannot write"), OSError(errno.ENOSPC, "No space left on device")),
        "no space",
        SPACE,
    ),
    "python": (MemoryError(), "out of memory", MEMORY),
    "fork": (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory", MEMORY),
    "torch": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried .."),
        "out of memory",
        MEMORY,
    ),
    "torch mmap": (
        RuntimeError("unable to mmap 65536 bytes from file <x>: Cannot allocate memory (12)"),
        "out",
        MEMORY,
    ),
    "card": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory", MEMORY),
    "numpy": (OSError("16512 requested and 6044 written"), "a file could not be written in full", SPACE),
    "c++": (RuntimeError("std::bad_alloc"), "out of memory", MEMORY),
    "llvm": (RuntimeError("LLVM ERROR: Unable to allocate section memory!"), "out of memory", MEMORY),
    "loader": (ImportError("libgomp.so.1: failed to map segment from shared object"), "out of memory", MEMORY),
    "rust": (PanicException("memory allocation of 4096 bytes failed"), "out of memory", MEMORY),
    "threads": (RuntimeError("can't start new thread"), "no more threads can be started", "OMP_NUM_THREADS=1"),
}
NO_LIMIT = (
    ValueError("the row says: out of memory"),
    KeyError("no space left"),
    OSError(errno.ENOENT, "No such file"),
    LIMITS.pop("tokenizers full")[0],  # an error of no known kind, which may quote anything
)


@pytest.mark.parametrize("kind", LIMITS)
def test_each_library_is_understood(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, what, advice = LIMITS[kind]

    def fail(*_: object, **__: object) -> None:
        raise error

    found = limit_of(error)
    assert found is not None
    assert what in str(found)
    assert advice in str(found)
    with pytest.raises(ResourceError, match=advice):  # and a loader's is no damaged file
        reading("m", fail)
    monkeypatch.setattr("quadapt.jobs.quantize.dense_folder", fail)
    said = give(*QUANTIZE, code=2)
    assert said.error == f"quadapt: {found}"


@pytest.mark.parametrize("error", NO_LIMIT, ids=repr)
def test_what_only_quotes_such_words_is_no_limit(error: Exception) -> None:
    assert limit_of(error) is None


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself does
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_what_libraries_raise_when_a_file_may_not_grow(tmp_path: Path) -> None:
    tensor = {"a": torch.zeros(50_000)}
    with files_of_at_most(20_000):
        for write in (
            lambda: save_file(tensor, tmp_path / "a.safetensors"),
            lambda: torch.save(tensor, tmp_path / "a.pt"),
            lambda: (tmp_path / "a.txt").write_bytes(bytes(50_000)),
        ):
            with pytest.raises((OSError, RuntimeError, SafetensorError)) as error:
                write()
            assert limit_of(error.value) is not None, error.value


COMMANDS = {
    "quantize": QUANTIZE,
    "merge": ("merge", "adapter", "--output", "new"),
    "gguf": ("export", "merged", "--output", "new.gguf"),
    "hf": ("export", "merged", "--output", "new", "--format", "hf"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_may_not_grow_leaves_no_output(command: str, shelf: dict[str, Any], tmp_path: Path) -> None:
    assert shelf
    arguments = [str(tmp_path / word) if word.startswith("new") else word for word in COMMANDS[command]]
    with files_of_at_most(30_000):
        said = give(*arguments, code=2)
    assert any(words in said.error for words in (SIZE, SPACE)), said.err
    assert not any(path.name in ("new", "new.gguf") for path in tmp_path.iterdir())


def test_memory_that_is_limited(run_python: Callable[..., str]) -> None:
    """Under RLIMIT_AS, too: what torch and NumPy raise is no bug."""
    code = """
import resource, sys
import torch
import numpy as np
from quadapt.limits import limit_of
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))
for take in (lambda: torch.zeros(2**27), lambda: np.zeros(2**30), lambda: bytearray(2**30)):
    try:
        take()
    except BaseException as error:
        assert "out of memory" in str(limit_of(error)), repr(error)
    else:
        raise AssertionError("there was memory")
print("done")
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the size of the process is read from /proc")
    assert run_python(code) == "done\n"


# --- Ctrl-C, and the end of a pipe ------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.15, 0.4, 0.8])
def test_ctrl_c_while_the_command_is_imported(delay: float, tmp_path: Path) -> None:
    """Whenever it comes, the end is quiet: 130, and no traceback."""
    ready = tmp_path / "ready"
    code = (
        "import signal, sys, pathlib; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from quadapt.cli import main; pathlib.Path({str(ready)!r}).touch(); main()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, "inspect", "nothing-is-here"], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    while not ready.exists() and run.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)  # the imports after it take longer
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert run.returncode in (130, 2), said  # 2: it had come to its end, which is that there is no such folder
    assert b"Traceback" not in said, said


def test_an_interrupt_that_surfaces_as_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside an import a library may turn it into an error of its own."""
    from quadapt import cli

    def fail(*_: object, **__: object) -> None:
        cli.interrupted = True
        raise ImportError("numpy: error while importing the C extensions")

    monkeypatch.setattr(cli, "interrupted", False)
    monkeypatch.setattr("quadapt.jobs.inspect.open_folder", fail)
    said = give("inspect", "m", code=130)
    assert said.error == "quadapt: interrupted. Give the same command again to go on"


def test_a_full_disk_behind_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("quadapt.jobs.inspect.inspect", lambda *_: {"a": 1})
    monkeypatch.setattr("quadapt.report.ui.UI.result", full)
    assert "no space left on the disk" in give("inspect", "m", "--json", code=2).error


# --- loaders ----------------------------------------------------------------------------------------------------------


def test_a_loader_that_stumbles_is_a_damaged_file_and_our_own_bug_is_a_bug() -> None:
    import json

    with pytest.raises(CheckpointError, match="'m' cannot be loaded: TypeError: 'int' object"):
        reading("m", json.dumps, 5, cls=0)
    with pytest.raises(CheckpointError, match="cannot be loaded: PanicException: index out of bounds"):
        reading("m", _panic)
    monkey = compile("def bug():\n    raise AttributeError('ours')", reading.__code__.co_filename, "exec")
    names: dict[str, Any] = {}
    exec(monkey, names)
    with pytest.raises(AttributeError, match="ours"):
        reading("m", names["bug"])
    with pytest.raises(KeyboardInterrupt):
        reading("m", _interrupt)


def _panic() -> None:
    raise PanicException("index out of bounds")


def _interrupt() -> None:
    raise KeyboardInterrupt
