"""The package as others meet it: run as a module, typed, importable where there is no POSIX."""

from __future__ import annotations

import ast
import runpy
import signal
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import quadapt

SOURCES = sorted(Path(quadapt.__file__).parent.rglob("*.py"))


def test_python_m_quadapt_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["quadapt", "--version"])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("quadapt", run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not ended.value.code
    assert quadapt.__version__ in capsys.readouterr().out


def test_type_checkers_are_told_that_there_are_types() -> None:
    assert (files("quadapt") / "py.typed").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_needs_posix_to_be_imported(path: Path) -> None:
    """A function may: what is imported with the module must exist on Windows too."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    assert not found & {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "crypt"}
