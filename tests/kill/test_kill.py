"""A short version of the campaign: every command killed at a few of its events, and given again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_is_killed_comes_to_the_same_end_when_it_is_given_again() -> None:
    command = [sys.executable, "-m", "tests.kill", "--most", "1", "--moments", "1", "--seed", "1", "--no-store"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    found = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert found.stdout.count("'differing': 0, 'lost': 0, 'stuck': 0") == 14
