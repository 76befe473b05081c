"""Compressed files, folders of `datasets`, and several sources at once."""

import gzip
import json

import datasets
import pytest
from typer.testing import CliRunner

from quadapt.cli.commands import app
from quadapt.config import EvalConfig, TuneConfig, checked
from quadapt.data import read, split_rows
from quadapt.data.read import read_held_out
from quadapt.errors import DataError

PAIR = {"prompt": "q", "completion": "a"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl.gz", lines(PAIR, PAIR), 2),
        ("a.JSON.GZ", json.dumps([PAIR]), 1),
        ("a.csv.gz", "prompt,completion\nq,a\n", 1),
        ("a.txt.gz", "a cat", 1),
    ],
)
def test_compressed_files(name, content, rows, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    assert len(read(str(tmp_path / name))) == rows
    assert len(read(str(tmp_path))) == rows


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b'{"text": "x"}', mtime=0)[:-9]], ids=["no gzip", "cut short"]
)
def test_damaged_compressed_files(content, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be decompressed"):
        read(str(tmp_path / "a.jsonl.gz"))


def test_other_compressions_are_named(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a.jsonl.zst: is no data.*decompress it first"):
        read(str(tmp_path / "a.jsonl.zst"))


def test_a_dataset_that_was_saved(tmp_path):
    path = str(tmp_path / "saved")
    datasets.Dataset.from_list([PAIR | {"id": 4}, PAIR]).save_to_disk(path)
    rows = read(path)
    assert rows.data.to_list() == [PAIR | {"where": f"{path} row {number}"} for number in (1, 2)]
    assert rows.notes == ("columns not used: id",)
    assert len(read_held_out(path)) == 2  # one body of data, as a file is
    with pytest.raises(DataError, match="has no split 'test'"):
        read(path, split="test")


def test_splits_that_were_saved(tmp_path):
    parts = {"train": datasets.Dataset.from_list([PAIR]), "test": datasets.Dataset.from_list([PAIR, PAIR])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    assert (len(read(str(tmp_path))), len(read_held_out(str(tmp_path)))) == (1, 2)
    (tmp_path / "test" / "state.json").write_text("{")
    with pytest.raises(DataError, match="was saved by datasets, and cannot be read"):
        read(str(tmp_path))


def test_an_arrow_file(tmp_path):
    datasets.Dataset.from_list([PAIR]).save_to_disk(str(tmp_path))
    (file,) = tmp_path.glob("*.arrow")
    assert read(str(file)).data["completion"][:] == ["a"]


# --- several sources --------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(lines(PAIR, PAIR))
    (tmp_path / "one,two.jsonl").write_text(lines(PAIR | {"prompt": "comma"}))
    (tmp_path / "sums.jsonl").write_text(lines({"instruction": "add", "input": "1 1", "output": "2"}))
    (tmp_path / "chats.jsonl").write_text(lines(CHAT, CHAT))
    (tmp_path / "story.txt").write_text("a cat\n" * 50)
    (tmp_path / "tale.txt").write_text("a dog\n" * 50)


@pytest.mark.usefixtures("files")
def test_all_sources_count():
    rows = read(["pairs.jsonl", "one,two.jsonl"])
    assert rows.data["prompt"][:] == ["q", "q", "comma"]
    assert rows.source == "pairs.jsonl, one,two.jsonl"
    assert rows.notes == ("pairs.jsonl: 2 rows", "one,two.jsonl: 1 rows")


@pytest.mark.usefixtures("files")
def test_pairs_beside_messages_become_messages():
    rows = read(["sums.jsonl", "chats.jsonl", "pairs.jsonl"])
    assert rows.kind == "messages"
    assert [rows.chat(at)[0]["content"] for at in range(5)] == ["add\n\n1 1", "hi", "hi", "q", "q"]
    assert "3 rows of prompts and completions are rendered by the chat template, like the messages" in rows.notes


@pytest.mark.usefixtures("files")
def test_prompts_in_two_forms_are_told():
    rows = read(["sums.jsonl", "pairs.jsonl"])
    assert not rows.alpaca
    assert "1 prompts are put into Alpaca's template, and 2 stay as they are" in rows.notes


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("other", ["pairs.jsonl", "chats.jsonl"])
def test_text_goes_with_text_alone(other):
    with pytest.raises(DataError, match=rf"story.txt holds text, and {other} .*Leave one out"):
        read([other, "story.txt"])


@pytest.mark.usefixtures("files")
def test_each_of_a_few_documents_is_cut():
    kept, held_out = split_rows(read(["story.txt", "tale.txt"]), 0.1, seed=0)
    assert kept.data["text"][:] == ["a cat\n" * 45, "a dog\n" * 45]
    assert held_out.data["text"][:] == ["a cat\n" * 5, "a dog\n" * 5]


@pytest.mark.usefixtures("files")
def test_each_source_must_give_something(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"^none.jsonl: is empty$"):
        read(["pairs.jsonl", "none.jsonl"])


# --- in settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"), [("a,b.jsonl", ("a,b.jsonl",)), (["a", "b"], ("a", "b")), (("a",), ("a",))]
)
def test_data_in_settings(given, expected):
    assert checked(TuneConfig, {"model": "m", "data": given}).data == expected
    assert checked(EvalConfig, {"model": "m", "data": given}).data == expected
    assert checked(TuneConfig, {"model": "m", "data": "d", "eval_data": given}).eval_data == expected


@pytest.mark.parametrize(
    ("given", "limit"),
    [({}, None), ({"max_bad_rows": 3}, 3), ({"strict": True}, 0), ({"strict": True, "max_bad_rows": 0}, 0)],
)
def test_bad_rows_in_settings(given, limit):
    config = checked(TuneConfig, {"model": "m", "data": "d", **given})
    assert config.most_bad_rows == limit
    assert {"max_bad_rows", "strict"} <= config.idle()  # which rows are skipped does not depend on how many may be


@pytest.mark.usefixtures("files")
def test_data_on_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr("quadapt.jobs.evaluate.evaluate", lambda config, _: seen.append(config.data) or {})
    done = CliRunner().invoke(app, ["eval", "m", "--data", "one,two.jsonl", "--data", "pairs.jsonl"])
    assert (done.exit_code, seen) == (0, [("one,two.jsonl", "pairs.jsonl")])
