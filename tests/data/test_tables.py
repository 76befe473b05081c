"""Rows with named cells: columns by name, bad rows counted, splits, several sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quadapt.data.tables import Table, column_of, read_table
from quadapt.errors import ConfigError, DataError


def _find(cells: dict[str, Any]) -> dict[str, str]:
    return {"text": column_of(cells, "text", ("text", "review"), None, "--text-column")}


def _check(cells: dict[str, Any]) -> dict[str, Any]:
    if not cells["text"]:
        raise DataError("is empty")
    return cells


def _read(*paths: Path, most: int | None = None, held_out: bool = False) -> Table:
    return read_table([str(path) for path in paths], _find, _check, max_bad_rows=most, held_out=held_out)


def test_rows_know_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("review,stars\nfine,5\n,1\nbad,2\n")
    (tmp_path / "b.jsonl").write_text('{"review": "so so"}\n{"review": null}\nnonsense\n')
    found = _read(tmp_path / "a.csv", tmp_path / "b.jsonl")
    assert [row["text"] for row in found.rows] == ["fine", "bad", "so so"]
    assert [where.rpartition("/")[2] for where in found.where] == ["a.csv:2", "a.csv:4", "b.jsonl:1"]
    assert found.columns == {"text": "review"}
    assert found.notes == ("columns read: review as text",)
    assert (found.bad.count, found.bad.good) == (3, 3)
    assert found.bad.first[0].endswith("a.csv:3: is empty")


def test_bad_rows_end_the_reading_where_none_may_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\nfine\n""\n')
    with pytest.raises(DataError, match=r"a\.csv:3: is empty"):
        _read(tmp_path / "a.csv", most=0)


def test_a_column_that_no_row_has_is_no_matter_of_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("fine,5\nbad,2\n")
    words = r"a\.csv:2: no column has the text: the columns are fine, 5, none is called text, review.*first line"
    with pytest.raises(DataError, match=words):
        _read(tmp_path / "a.csv", most=100)
    (tmp_path / "b.csv").write_text("text\n")
    with pytest.raises(DataError, match="has no rows"):
        _read(tmp_path / "b.csv")
    with pytest.raises(DataError, match="there is no such file"):
        _read(tmp_path / "gone.csv")


def test_the_split_test_of_a_folder_is_held_out(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(f"text\n{split}\n")
    assert _read(tmp_path).rows == [{"text": "train"}]
    assert _read(tmp_path, held_out=True).rows == [{"text": "test"}]
    assert _read(tmp_path / "train.csv", held_out=True).rows == [{"text": "train"}]  # a file is all of it


def test_a_share_is_held_out_by_the_seed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"{number}\n" for number in range(20)))
    data = _read(tmp_path / "a.csv")
    kept, held = data.split(0.25, 3)
    assert (len(kept), len(held)) == (15, 5)
    assert sorted(row["text"] for row in (*kept.rows, *held.rows)) == sorted(row["text"] for row in data.rows)
    assert data.split(0.25, 3)[1].rows == held.rows != data.split(0.25, 4)[1].rows
    with pytest.raises(ConfigError, match=r"the share to hold out is 1\.5"):
        data.split(1.5, 0)
    with pytest.raises(DataError, match="has a single row"):
        data.select([0]).split(0.5, 0)
