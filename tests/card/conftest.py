"""A clean ledger for every test; commands are given as in `tests/cli`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "cli")]


@pytest.fixture(scope="session")
def _imported() -> None:
    """What libraries made when they were imported is not gone through again whenever the ledger is reset."""
    import pretend  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_on_the_card(_imported: None) -> None:
    from pretend import ledger  # not before: pytest reads this file in the process of the other tests too

    ledger.reset()
