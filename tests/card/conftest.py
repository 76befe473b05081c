"""A clean ledger for every test; commands are given as in `tests/cli`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "cli")]


@pytest.fixture(autouse=True)
def _nothing_on_the_card() -> None:
    from pretend import ledger  # not before: pytest reads this file in the process of the other tests too

    ledger.reset()
