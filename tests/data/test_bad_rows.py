"""Rows that cannot be used are skipped, counted and named; too many of them are an error."""

import json

import pytest

from quadapt.data import calibration_batches, encode, read
from quadapt.errors import DataError

GOOD = {"prompt": "q", "completion": "a"}


@pytest.fixture
def write(tmp_path):
    def make(name, *rows):
        texts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(texts) + b"\n")
        return str(tmp_path / name)

    return make


BAD = {
    "not JSON": (b'{"prompt": ', "not valid JSON"),
    "not UTF-8": (b'{"prompt": "caf\xe9", "completion": "a"}', "not UTF-8 (byte 0xe9)"),
    "a NUL byte": (b'{"prompt": "q\0", "completion": "a"}', "not valid JSON"),
    "a NUL character": (b'{"prompt": "q\\u0000", "completion": "a"}', "NUL character"),
    "half a pair": (b'{"prompt": "q", "completion": "\\udfff"}', "surrogate"),
    "deep": (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b', "completion": "a"}', "nested too deeply"),
    "thousands of digits": (
        b'{"prompt": "q", "completion": "a", "id": ' + b"7" * 5_000 + b"}",
        "a number of 5,000 digits",
    ),
    "a list": (b"[1, 2]", "is list [1, 2]"),
    "other columns": (b'{"text": "t"}', "no column 'prompt'"),
    "null": (b'{"prompt": null, "completion": "a"}', "'prompt' is null"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_bad_row_is_skipped_and_named(case, write):
    row, reason = BAD[case]
    path = write("a.jsonl", GOOD, row, GOOD)
    rows = read(path)
    assert [each["where"].rpartition(":")[2] for each in rows.data] == ["1", "3"]
    (note,) = rows.bad.notes()
    assert note.startswith(f"skipped 1 row that cannot be used: {path}:2: ")
    assert reason in note
    with pytest.raises(DataError, match=r"a.jsonl:2: ") as error:
        read(path, max_bad_rows=0)
    assert reason in str(error.value)


@pytest.mark.parametrize("case", ["deep", "thousands of digits", "not UTF-8", "null"])
def test_a_bad_element_of_a_list_leaves_the_others(case, tmp_path):
    row, reason = BAD[case]
    good = json.dumps(GOOD).encode()
    (tmp_path / "a.json").write_bytes(b"[" + b",\n ".join([good, row, good]) + b"]")
    rows = read(str(tmp_path / "a.json"))
    assert [each["where"].rpartition(" ")[2] for each in rows.data] == ["1", "3"]
    assert reason in rows.bad.first[0]


def test_bad_rows_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\nq,a\nq,caf\xe9\nq,"a"b\nq,a,c\nq\nlast,a\n')
    rows = read(str(path), max_bad_rows=4)
    assert rows.data["prompt"][:] == ["q", "last"]
    assert rows.bad.count == 4
    assert [first.split(": ")[0].rpartition(":")[2] for first in rows.bad.first] == ["3", "4", "5"]
    assert "and 1 more" in rows.bad.notes()[0]


@pytest.mark.parametrize(
    ("good", "bad", "most", "fits"),
    [
        (30, 10, None, True),  # at least ten
        (30, 11, None, False),
        (3, 3, None, True),  # but no more than there are good ones
        (3, 4, None, False),
        (12_000, 12, None, True),  # a thousandth
        (12_000, 13, None, False),
        (3, 4, 4, True),
        (30, 3, 2, False),
        (30, 1, 0, False),
    ],
)
def test_how_many_may_be_bad(good, bad, most, fits, write):
    path = write("a.jsonl", *[GOOD] * good, *[{"prompt": 1}] * bad)
    if fits:
        rows = read(path, max_bad_rows=most)
        assert (len(rows), rows.bad.count) == (good, bad)
        return
    with pytest.raises(DataError, match=f"a.jsonl:{good + 1}: has no column 'completion'") as error:
        read(path, max_bad_rows=most)
    if most != 0:
        advice = str(error.value).rpartition("--max-bad-rows ")[2]
        assert len(read(path, max_bad_rows=int(advice))) == good


def test_no_row_is_left(write):
    with pytest.raises(DataError, match=r"a.jsonl:1: is int 1.*None of the other 2 rows can be used"):
        read(write("a.jsonl", 1, 2, 3), max_bad_rows=100)


def test_files_of_a_folder_that_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_bytes("two".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes(b"line\n\0\0")
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"b.txt:1: is not UTF-8 \(byte 0xff\).*3 of 4 rows.*--max-bad-rows 3"):
        read(str(tmp_path))
    rows = read(str(tmp_path), max_bad_rows=3)
    assert rows.data["text"][:] == ["one"]
    assert "c.txt:2: holds a NUL byte" in rows.bad.notes()[0]
    assert "d.txt: is empty" in rows.bad.notes()[0]


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT, TWICE = [("user", "hi"), ("assistant", "yes")], [("user", "hi"), ("user", "so")]


def test_rows_that_the_template_refuses_are_bad_rows(chars, make_rows, caplog):
    chars.chat_template = ALTERNATING
    rows = make_rows("messages", [CHAT, TWICE, CHAT])
    report = encode(rows, chars, seq_len=40, packing=False).report
    assert (report.examples, report.sequences, report.skipped) == (2, 2, 1)
    assert any("data:2: the chat template cannot render the messages: roles must" in note for note in report.notes)
    assert rows.bad.count == 0  # each pass counts for itself
    with caplog.at_level("WARNING", logger="quadapt"):
        calibration_batches(rows, chars, length=8, sequences=50)
    assert "skipped 1 row that cannot be used: data:2" in caplog.text


def test_a_template_that_refuses_all_rows(chars, make_rows):
    chars.chat_template = ALTERNATING
    with pytest.raises(DataError, match=r"^data:1: .*roles must alternate\. None of the other 1 rows"):
        encode(make_rows("messages", [TWICE, TWICE]), chars, seq_len=40, packing=False)


def test_a_few_of_the_rows_are_judged_among_all(chars, write):
    chars.chat_template = ALTERNATING
    good = {"messages": [{"role": role, "content": text} for role, text in CHAT]}
    rows = read(write("a.jsonl", {"messages": [good["messages"][0]] * 2}, *[good] * 8, *[{"messages": 5}] * 6))
    assert encode(rows.select([0, 1]), chars, seq_len=40, packing=False).report.skipped == 7


def test_bad_rows_of_reading_and_rendering_count_together(chars, write):
    chars.chat_template = ALTERNATING
    good = {"messages": [{"role": role, "content": text} for role, text in CHAT]}
    path = write("a.jsonl", good, good, {"messages": 5}, {"messages": [good["messages"][0]] * 2})
    assert encode(read(path, max_bad_rows=2), chars, seq_len=40, packing=False).report.skipped == 2
    with pytest.raises(DataError, match=r"a.jsonl:3: .*2 of 4 rows .*--max-bad-rows 2"):
        encode(read(path, max_bad_rows=1), chars, seq_len=40, packing=False)
