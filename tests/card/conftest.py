"""A clean ledger for every test."""

from __future__ import annotations

import gc

import pytest
from pretend import ledger


@pytest.fixture(autouse=True)
def _nothing_on_the_card() -> None:
    gc.collect()
    ledger.reset()
