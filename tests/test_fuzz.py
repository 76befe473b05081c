"""Damaged and odd input of every kind, 2,000 cases: refused in a sentence, or the same as before."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.fuzz.cases import FaultError, guard
from benchmarks.fuzz.damage import Edit, damaged_bytes, damaged_header, damaged_json
from benchmarks.fuzz.kinds import KINDS
from benchmarks.fuzz.models import make
from benchmarks.fuzz.run import fuzz

CASES = 2000


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    make(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_of_a_kind_ends_as_none_may(kind: str, shelf: Path) -> None:
    cases = round(CASES * KINDS[kind].share)
    counts, _ = fuzz(kind, shelf, cases, 0, stop=True)
    assert counts.total() >= cases


def test_shares_make_up_the_whole() -> None:
    assert sum(about.share for about in KINDS.values()) == pytest.approx(1)


# --- that it would find something -------------------------------------------------------------------------------------


def test_a_bug_is_a_fault_and_so_is_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_: object) -> dict[str, int]:
        raise AttributeError("nobody foresaw this")

    with pytest.raises(FaultError, match=r"exit code 1: .*nobody foresaw this"):
        guard(bug)
    assert guard(lambda _: {"a": 1}) == (0, "")
    monkeypatch.setattr("benchmarks.fuzz.cases.LONGEST", -1.0)
    with pytest.raises(FaultError, match="took"):
        guard(lambda _: {})


def test_a_wrong_acceptance_is_a_fault(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter whose numbers changed is found out by its numbers, whatever the loader thinks of it."""
    run = KINDS["models and adapters"].run
    monkeypatch.setattr("benchmarks.fuzz.loading._digest", lambda model: str(id(model)))
    with pytest.raises(FaultError, match="other numbers than before"):
        run(shelf, tmp_path, ("adapter", "adapter_model.safetensors", []))


def test_faults_are_counted_and_said(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.fuzz.kinds.read_job", lambda _: 1 / 0)
    counts, said = fuzz("settings (YAML)", shelf, 5, 0, stop=False)
    assert counts["faults"] == counts.total() > 0
    assert "ZeroDivisionError" in said[0]


def test_damage_is_what_it_is_called() -> None:
    text = b'{"a": [1, 2], "b": {"c": "d"}}'
    assert damaged_json(text, [Edit("delete", 0, None)]) == b'{"b": {"c": "d"}}'
    assert damaged_json(text, [Edit("replace", 1, "x")]) == b'{"a": ["x", 2], "b": {"c": "d"}}'
    assert damaged_json(text, [Edit("wrap", 4, None)]) == b'{"a": [1, 2], "b": {"c": ["d"]}}'
    assert damaged_json(text, [Edit("rename", 3, "z")]) == b'{"a": [1, 2], "z": {"c": "d"}}'
    shared: list[int] = []
    twice = [Edit("replace", 0, shared), Edit("replace", 0, [shared])]
    assert damaged_json(text, twice) == b'{"a": [[]], "b": {"c": "d"}}'
    assert shared == []
    assert damaged_bytes(b"abcdef", [Edit("cut", 3, None)]) == b"abc"
    assert damaged_bytes(b"abcdef", [Edit("insert", 3, 7)]) == b"abc7def"
    file = (2).to_bytes(8, "little") + b"{}" + b"rest"
    assert damaged_header(file, [Edit("replace", 0, 1)]) == (1).to_bytes(8, "little") + b"1" + b"rest"
