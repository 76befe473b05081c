"""The documentation that is written from the code is up to date."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "build_docs.py"


def test_docs_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--check"])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    with pytest.raises(SystemExit) as found:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert found.value.code in (None, 0)  # otherwise it names the files that are out of date
