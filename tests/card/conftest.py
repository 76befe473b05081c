"""A clean ledger for every test; commands are given as in `tests/cli`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pretend import ledger

sys.path.append(str(Path(__file__).parents[1] / "cli"))


@pytest.fixture(autouse=True)
def _nothing_on_the_card() -> None:
    ledger.reset()
