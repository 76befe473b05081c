"""What a model on the CPU gives when another device computes; see `tests/card/pretend.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "card"
CASES = [FOLDER / "cases.py", pytest.param(FOLDER / "cases_commands.py", marks=pytest.mark.deep)]


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES, ids=["models", "commands"])
def test_on_a_pretended_card(cases: Path) -> None:
    """In a process of its own: torch takes a new kind of device only before its first backward."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200, env={**os.environ})
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " passed" in found.stdout
    assert " skipped" not in found.stdout
