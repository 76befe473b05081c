"""What a model on the CPU gives when another device computes; see `tests/card/pretend.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted((Path(__file__).parent / "card").glob("cases*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_on_a_pretended_card(cases: Path) -> None:
    """In a process of its own: torch takes a new kind of device only before its first backward."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200, env={**os.environ})
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " passed" in found.stdout
    assert " skipped" not in found.stdout
