"""The commands for the tests of tasks, and a folder to give them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder(model)`: a folder `dense` with a model and the tokenizer of words; gives what `dense` lies in."""
    from task_models import word_tokenizer

    def make(model: Any) -> Path:
        model.save_pretrained(tmp_path / "dense")
        word_tokenizer().save_pretrained(tmp_path / "dense")
        return tmp_path

    return make
