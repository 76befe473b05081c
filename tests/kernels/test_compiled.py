"""Compiled kernels on disk: whatever becomes of the files, the result is right and the next run finds them whole."""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numba
import pytest

from quadapt.kernels import compiled
from quadapt.kernels.compiled import jit


def plus_three(x: float) -> float:
    return x + 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test alone, in which two compiled forms of a kernel lie."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    first = jit(plus_three)
    assert (first(1), first(1.5)) == (4, 4.5)
    assert hits(first) == 0
    return Path(first._cache.cache_path)


def hits(kernel: object) -> int:
    return sum(kernel.stats.cache_hits.values())  # type: ignore[attr-defined]


def again() -> int:
    """How many of two forms a fresh start finds on disk. Both compute the right thing in any case."""
    kernel = jit(plus_three)
    assert (kernel(1), kernel(1.5)) == (4, 4.5)
    return hits(kernel)


def damaged(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {
        "empty": b"",
        "cut": content[:middle],
        "one byte": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "zeros": bytes(len(content)),
        "longer": content + b"more",
        "no pickle": b"\x80\x05not a pickle at all",
        "another pickle": pickle.dumps(("0.0", {"a": 1})),
    }[how]


@pytest.mark.parametrize(
    "how", ["empty", "cut", "one byte", "zeros", "longer", "no pickle", "another pickle", "a folder", "gone"]
)
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_files_are_removed_and_compiled_anew(
    kind: str, how: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert again() == 2
    for path in folder.glob(f"*.{kind}"):
        content = path.read_bytes()
        path.unlink()
        if how == "a folder":
            (path / "with something").mkdir(parents=True)
        elif how != "gone":
            path.write_bytes(damaged(content, how))
    with caplog.at_level(logging.WARNING):
        assert again() == 0
    assert ("compiled anew" in caplog.text) == (how != "gone")
    if how != "a folder":
        assert again() == 2


def test_a_file_of_another_form_is_not_taken_for_this_one(folder: Path) -> None:
    """Two processes that start at once may write under one name; what each file is for is written in it."""
    one, other = sorted(folder.glob("*.nbc"))
    one.write_bytes(other.read_bytes())
    assert again() == 1
    assert again() == 2


@pytest.mark.parametrize("reading", [True, False], ids=["unreadable", "not writable"])
def test_a_folder_without_permission_costs_time_alone(
    reading: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Permissions do not bind root, who runs some of these tests: so the calls fail here."""

    def refused(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    compiled._not_kept.cache_clear()
    if reading:
        monkeypatch.setattr(Path, "read_bytes", refused)
        monkeypatch.setattr(compiled, "_sources", lambda: "the same")
    else:
        for path in folder.iterdir():
            path.unlink()
        monkeypatch.setattr(compiled._Files, "_open_for_write", refused)
    with caplog.at_level(logging.WARNING):
        assert again() == 0
    assert "Permission denied" in caplog.text
    assert caplog.text.count("cannot be kept") == (0 if reading else 1)


def test_a_folder_that_has_vanished_is_made_again(folder: Path) -> None:
    kernel = jit(plus_three)
    shutil.rmtree(folder)
    assert kernel(2) == 5
    assert kernel(2.5) == 5.5
    assert again() == 2


def test_a_folder_that_became_a_file_costs_time_alone(folder: Path) -> None:
    kernel = jit(plus_three)
    shutil.rmtree(folder)
    folder.write_text("a file")
    assert kernel(2) == 5


@pytest.mark.usefixtures("folder")
def test_a_kernel_that_numba_cannot_rebuild_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("LLVM cannot read this")

    monkeypatch.setattr(compiled._Cache._impl_class, "rebuild", fails)
    with caplog.at_level(logging.WARNING):
        assert again() == 0
    assert "LLVM cannot read this" in caplog.text


@pytest.mark.parametrize("name", ["lanes.py", "fake_lanes.py"])
@pytest.mark.usefixtures("folder")
def test_a_changed_intrinsic_leaves_nothing_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine code is within the kernels that use it, whose own source may be the same as before."""
    monkeypatch.setattr(compiled, "_sources", compiled._sources.__wrapped__)
    reads: Callable[[Path], bytes] = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads(path) + b"#" * (path.name == name))
    assert again() == 0
