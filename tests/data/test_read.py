import json

import datasets
import pytest

from quadapt.data import read, source, split_rows
from quadapt.errors import ConfigError, DataError

PAIR = {"prompt": "q", "completion": "a"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
SHORT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nadd\n\n### Response:\n"
)
LONG = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\nadd\n\n### Input:\n1 1\n\n### Response:\n"
)


def lines(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


GOOD = {
    "text is one document": ("a.txt", "one\r\n\ntwo\n", "text", [{"text": "one\r\n\ntwo\n", "where": "a.txt"}]),
    "byte order mark": ("a.txt", "\ufeffone", "text", [{"text": "one", "where": "a.txt"}]),
    "capital suffix": ("A.TXT", "one", "text", [{"text": "one", "where": "A.TXT"}]),
    "lines of text": (
        "a.jsonl",
        lines({"text": "x"}, {"text": ""}),
        "text",
        [{"text": "x", "where": "a.jsonl:1"}, {"text": "", "where": "a.jsonl:2"}],
    ),
    "line separator inside": (
        "a.jsonl",
        '{"text": "x\u2028y"}\n',
        "text",
        [{"text": "x\u2028y", "where": "a.jsonl:1"}],
    ),
    "blank lines at the end": ("a.jsonl", lines({"text": "x"}, "", " "), "text", [{"text": "x", "where": "a.jsonl:1"}]),
    "Windows line ends": (
        "a.jsonl",
        '{"text": "x"}\r\n{"text": "y"}\r\n',
        "text",
        [{"text": "x", "where": "a.jsonl:1"}, {"text": "y", "where": "a.jsonl:2"}],
    ),
    "lines in .json": ("a.json", lines(PAIR), "prompt-completion", [PAIR | {"where": "a.json:1"}]),
    "list in .jsonl": (
        "a.jsonl",
        json.dumps([PAIR], indent=1),
        "prompt-completion",
        [PAIR | {"where": "a.jsonl row 1"}],
    ),
    "Alpaca": (
        "a.json",
        json.dumps([{"instruction": "add", "input": "1 1", "output": "2"}]),
        "prompt-completion",
        [{"prompt": LONG, "completion": "2", "where": "a.json row 1"}],
    ),
    "Alpaca with a blank input": (
        "a.json",
        json.dumps([{"instruction": "add", "input": "", "output": "2"}]),
        "prompt-completion",
        [{"prompt": SHORT, "completion": "2", "where": "a.json row 1"}],
    ),
    "Alpaca with null for input": (
        "a.jsonl",
        lines({"instruction": "add", "input": None, "output": "2"}),
        "prompt-completion",
        [{"prompt": SHORT, "completion": "2", "where": "a.jsonl:1"}],
    ),
    "Alpaca without input": (
        "a.jsonl",
        lines({"instruction": "add", "output": "{x}"}),
        "prompt-completion",
        [{"prompt": SHORT, "completion": "{x}", "where": "a.jsonl:1"}],
    ),
    "messages": (
        "a.jsonl",
        lines(CHAT),
        "messages",
        [{"messages": json.dumps(CHAT["messages"]), "tools": "[]", "where": "a.jsonl:1"}],
    ),
    "blank lines between": (
        "a.jsonl",
        lines(PAIR, "", " ", PAIR),
        "prompt-completion",
        [PAIR | {"where": "a.jsonl:1"}, PAIR | {"where": "a.jsonl:4"}],
    ),
    "a list in an object": (
        "a.json",
        json.dumps({"version": 1, "data": [PAIR]}, indent=1),
        "prompt-completion",
        [PAIR | {"where": "a.json row 1"}],
    ),
    "CSV": (
        "a.csv",
        'prompt,completion\r\n"a, ""b""\nc",NA\r\n\r\n042,null\r\n',
        "prompt-completion",
        [
            {"prompt": 'a, "b"\nc', "completion": "NA", "where": "a.csv:2"},
            {"prompt": "042", "completion": "null", "where": "a.csv:5"},
        ],
    ),
    "CSV from a spreadsheet": ("a.csv", "\ufefftext\nx\n", "text", [{"text": "x", "where": "a.csv:2"}]),
    "CSV with a long cell": ("a.csv", "text\n" + "x" * 200_000, "text", [{"text": "x" * 200_000, "where": "a.csv:2"}]),
}


@pytest.mark.parametrize("case", GOOD)
def test_formats(case, tmp_path, monkeypatch):
    name, content, kind, expected = GOOD[case]
    (tmp_path / name).write_bytes(content.encode())
    monkeypatch.chdir(tmp_path)
    rows = read(name)
    assert rows.kind == kind
    assert rows.source == name
    assert rows.data.to_list() == expected
    assert len(rows) == len(expected)
    assert rows.notes == ()


@pytest.mark.parametrize(
    ("row", "kind", "unused"),
    [
        (PAIR | {"text": "t", "id": 3}, "prompt-completion", "text, id"),
        (CHAT | PAIR, "messages", "prompt, completion"),
        ({"instruction": "add", "output": "2", "text": "whole", "answer": [1]}, "prompt-completion", "text, answer"),
    ],
)
def test_the_richest_columns_are_taken_and_the_others_named(row, kind, unused, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(row))
    rows = read(str(tmp_path / "a.jsonl"))
    assert rows.kind == kind
    assert rows.notes == (f"columns not used: {unused}",)


BAD = {
    "JSON": ("a.jsonl", lines(PAIR, '{"prompt": "q", '), ["a.jsonl:2", "not valid JSON", "column 16", "one JSON"]),
    "JSON list": ("a.json", '[{"text": "x"},\n{"text": }]', ["a.json:2", "not valid JSON", "list of objects"]),
    "JSON list without an end": ("a.json", '[{"text": "x"},\n{"text": "y"}', ["a.json:2", "does not end", "row 2"]),
    "more after a list": ("a.json", '[{"text": "x"}]\n[]', ["a.json:2", "something follows the list"]),
    "no objects in the list": ("a.json", json.dumps({"data": [1]}, indent=1), ["a.json row 1", "is int 1"]),
    "no object": ("a.jsonl", lines(PAIR, '"x"'), ["a.jsonl:2", 'str "x"', "must be a JSON object"]),
    "missing": (
        "a.jsonl",
        lines(PAIR, {"prompt": "q"}),
        ["a.jsonl:2", "no column 'completion'", "but prompt", "same columns"],
    ),
    "mixed kinds": ("a.jsonl", lines(PAIR, {"text": "q"}), ["a.jsonl:2", "no column 'prompt'", "but text"]),
    "null": (
        "a.jsonl",
        lines(PAIR, PAIR | {"completion": None}),
        ["a.jsonl:2", "'completion' is null", "delete the row"],
    ),
    "number": ("a.jsonl", lines(PAIR | {"completion": 42}), ["a.jsonl:1", "'completion' is int 42", "quotes"]),
    "list": ("a.json", json.dumps([PAIR, PAIR | {"prompt": ["q"]}]), ["a.json row 2", "'prompt' is list", "text"]),
    "input is a number": (
        "a.jsonl",
        lines({"instruction": "i", "input": 1, "output": "o"}),
        ["a.jsonl:1", "'input' is int"],
    ),
    "surrogate": ("a.jsonl", '{"text": "\\ud83d"}', ["a.jsonl:1", "'text'", "surrogate", "Remove"]),
    "columns": (
        "a.jsonl",
        lines({"title": "q", "label": "a"}),
        ["a.jsonl:1", "title, label", "text | prompt, completion | instruction, output", "Rename"],
    ),
    "no columns": ("a.jsonl", "{}", ["a.jsonl:1", "the columns are none"]),
    "encoding": ("a.txt", b"one\ncaf\xe9", ["a.txt:2", "not UTF-8", "0xe9", "Save the file as UTF-8"]),
    "encoding of lines": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ["a.jsonl:2", "0xff"]),
    "empty text": ("a.txt", "", ["a.txt", "is empty"]),
    "blank text": ("a.txt", " \n", ["a.txt", "is empty"]),
    "empty lines": ("a.jsonl", "", ["a.jsonl", "is empty"]),
    "empty list": ("a.json", "[]", ["a.json", "has no rows"]),
    "header alone": ("a.csv", "prompt,completion\n", ["a.csv", "has no rows"]),
    "no header": ("a.csv", "What is it?,A cat,B\n", ["a.csv", "no rows"]),
    "no header, rows": ("a.csv", "What?,A\nWho?,B\n", ["a.csv:2", "What?, A", "lack a first line"]),
    "short CSV row": ("a.csv", "prompt,completion\nq,a\nq\n", ["a.csv:3", "'completion' is null or missing"]),
    "long CSV row": (
        "a.csv",
        "prompt,completion\nq,a\nq,a,b\n",
        ["a.csv:3", "3 cells, but the header 2", "double quotes"],
    ),
    "bad quotes in CSV": ("a.csv", 'prompt,completion\n"q"x,a\n', ["a.csv:2", "not valid CSV", "double the quotes"]),
    "open quote in CSV": ("a.csv", 'text\n"q', ["a.csv:2", "not valid CSV"]),
    "same column twice": ("a.csv", "text,text\na,b\n", ["a.csv:1", "same name", "text, text"]),
    "same column twice, no rows": ("a.csv", "text,text\n", ["a.csv:1", "same name"]),
    "Parquet": ("a.parquet", "PAR1 no", ["a.parquet", "cannot be read as Parquet"]),
    "suffix": ("a.xml", "<a/>", ["a.xml", "is no data", ".txt, .json, .jsonl, .csv, .parquet"]),
    "no messages": ("a.jsonl", lines({"messages": []}), ["a.jsonl:1", "'messages' is list []", "list of messages"]),
    "messages as text": ("a.jsonl", lines({"messages": "hi"}), ["a.jsonl:1", "'messages' is str"]),
    "message as text": ("a.jsonl", lines({"messages": ["hi"]}), ["a.jsonl:1", "message 1 is str", '"role"']),
    "no role": ("a.jsonl", lines(CHAT, {"messages": [{"content": "hi"}]}), ["a.jsonl:2", "message 1: 'role' is null"]),
    "content in parts": (
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        ["a.jsonl:1", "message 1: part 1 of its content", '{"type": "text"}'],
    ),
    "weights": (
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}),
        ["a.jsonl:1", "message 1: 'weight' is float 0.5", "Use 1, or 0"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused_with_its_place(case, tmp_path, monkeypatch):
    name, content, expected = BAD[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        read(name, max_bad_rows=0)
    assert str(error.value).startswith(expected[0])
    for part in expected[1:]:
        assert part in str(error.value)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([PAIR, {"prompt": "r", "completion": "042"}]).to_parquet(path)
    assert read(str(path)).data.to_list() == [
        PAIR | {"where": f"{path} row 1"},
        {"prompt": "r", "completion": "042", "where": f"{path} row 2"},
    ]
    datasets.Dataset.from_dict({"text": ["a", None]}).to_parquet(path)  # the file changes: no stale copy is read
    with pytest.raises(DataError, match=r"a.parquet row 2: column 'text' is null"):
        read(str(path), max_bad_rows=0)


# --- folders and names ------------------------------------------------------------------------------------------------


def test_a_folder_is_sorted_into_splits_by_name(tmp_path):
    for name, text in {
        "train-1.txt": "one",
        "train-2.jsonl": '{"text": "two"}',
        "train-notes.md": "#",
        "test.txt": "three",
    }.items():
        (tmp_path / name).write_text(text)
    train = read(str(tmp_path))
    assert train.data["text"][:] == ["one", "two"]
    assert train.notes == ("files not read: train-notes.md",)
    assert read(str(tmp_path), split="test").data["text"][:] == ["three"]
    with pytest.raises(DataError, match="no split 'validation'"):
        read(str(tmp_path), split="validation")


def test_files_of_one_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(PAIR))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match=r"b.txt holds text, and .*a.jsonl prompts and completions.*Leave one out"):
        read(str(tmp_path))


def test_a_folder_without_data(tmp_path):
    with pytest.raises(DataError, match="no files in it"):
        read(str(tmp_path))
    (tmp_path / "notes.md").write_text("#")
    with pytest.raises(DataError, match="is no data"):
        read(str(tmp_path))


def test_a_file_has_one_split(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="no split 'test'"):
        read(str(tmp_path / "a.txt"), split="test")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("strain.jsonl", ["no such file", "Did you mean train.jsonl?"]),
        ("unlike.csv", ["no such file", "Nothing in", "has a name like it"]),
        ("folder/train.jsonl", ["no such file", "There is no folder"]),
        ("train jsonl", ["no such file", "Did you mean train.jsonl?"]),
        ("", ["no such file"]),
    ],
)
def test_missing_files_never_reach_the_hub(name, parts, tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "load_dataset", None)
    with pytest.raises(DataError) as error:
        read(name)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "arguments"), [("org/data.set", ("org/data.set", None)), ("data:main", ("data", "main"))]
)
def test_hub_names(name, arguments, monkeypatch):
    def load(*given, split):
        assert (given, split) == (arguments, "test[:2]")
        return datasets.Dataset.from_list([PAIR, PAIR | {"completion": None}][:limit])

    monkeypatch.setattr(source, "load_dataset", load)
    limit = 1
    assert read(name, split="test[:2]").data.to_list() == [PAIR | {"where": f"{name} row 1"}]
    limit = 2
    with pytest.raises(DataError, match=f"{name} row 2: column 'completion' is null"):
        read(name, split="test[:2]", max_bad_rows=0)


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("cannot reach the hub"),
        ValueError("Unknown split 'x'"),
        datasets.exceptions.DatasetNotFoundError("does not exist"),
    ],
)
def test_hub_failures_keep_their_reason(failure, tmp_path, monkeypatch):
    def load(*_, **__):
        raise failure

    (tmp_path / "shakespeare").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "load_dataset", load)
    with pytest.raises(DataError) as error:
        read("shakespear")
    assert str(failure) in str(error.value)
    assert "no file or folder here" in str(error.value)
    assert "Did you mean shakespeare?" in str(error.value)


# --- splitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(20, 0.25, 5), (20, 0.01, 1), (3, 0.99, 2), (2, 0.5, 1)])
def test_split_rows(make_rows, count, fraction, held_out):
    rows = make_rows("prompt-completion", [(f"q{number}", "a") for number in range(count)])
    train, evaluation = split_rows(rows, fraction, seed=1)
    assert len(evaluation) == held_out
    assert sorted([*train.data["prompt"], *evaluation.data["prompt"]]) == sorted(rows.data["prompt"])
    again = split_rows(rows, fraction, seed=1)
    assert again[1].data.to_list() == evaluation.data.to_list()
    assert evaluation.kind == "prompt-completion"


def test_seeds_hold_out_different_rows(make_rows):
    rows = make_rows("text", [str(number) for number in range(50)])
    held_out = {tuple(split_rows(rows, 0.2, seed)[1].data["text"]) for seed in range(5)}
    assert len(held_out) == 5


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("one\ntwo\nthree\nfour\n", ("one\ntwo\n", "three\nfour\n")),
        ("oneoneone.", ("oneon", "eone.")),
    ],
)
def test_a_single_document_is_cut(make_rows, text, parts):
    for seed in (0, 1):
        train, held_out = split_rows(make_rows("text", [text]), 0.5, seed)
        assert (train.data["text"][0], held_out.data["text"][0]) == parts
        assert held_out.data["where"][0] == "data:1"


@pytest.mark.parametrize(
    ("kind", "values", "fraction", "error", "message"),
    [
        ("text", ["a"] * 4, 0.0, ConfigError, "between 0 and 1"),
        ("text", ["a"] * 4, 1.0, ConfigError, "between 0 and 1"),
        ("prompt-completion", [("q", "a")], 0.5, DataError, "--eval-data"),
        ("text", ["a   "], 0.5, DataError, "4 characters are too few to hold out 50%"),
    ],
)
def test_what_cannot_be_split(make_rows, kind, values, fraction, error, message):
    with pytest.raises(error, match=message):
        split_rows(make_rows(kind, values), fraction, seed=0)
