"""What the export tests share."""

from __future__ import annotations

from typing import Any

import pytest
from export_models import byte_level


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """GPT-2's kind of tokenizer."""
    return byte_level()
