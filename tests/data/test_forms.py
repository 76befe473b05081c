"""The forms in which the field keeps its data are read as what they mean."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadapt.data import read
from quadapt.data.forms import FORMS, layout_of
from quadapt.data.prompt import ALPACA, ALPACA_INPUT
from quadapt.errors import DataError

CALL = {"name": "add", "arguments": {"a": 1}}
FUNCTION = {"type": "function", "function": CALL}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {}}}
USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
QUIET = SAID | {"weight": 0}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def rows_of(tmp_path):
    def make(*rows, **options):
        (tmp_path / "a.jsonl").write_text(lines(*rows))
        return read(str(tmp_path / "a.jsonl"), **options)

    return make


def shared(question, *answers):
    return [{"from": "human", "value": question}, *({"from": "gpt", "value": answer} for answer in answers)]


CHATS = {
    "ShareGPT": ({"conversations": shared("hi", "yes")}, [USER, SAID]),
    "ShareGPT, other names": (
        {
            "conversations": [
                {"from": "System", "value": "be"},
                {"from": "user", "value": "hi"},
                {"from": "bot", "value": "yes"},
            ]
        },
        [{"role": "system", "content": "be"}, USER, SAID],
    ),
    "ShareGPT in messages": ({"messages": shared("hi", "yes")}, [USER, SAID]),
    "roles of ShareGPT": (
        {"messages": [{"role": "human", "content": "hi"}, {"role": "model", "content": "yes"}]},
        [USER, SAID],
    ),
    "a column of system messages": (
        {"conversations": shared("hi", "yes"), "system": "be"},
        [{"role": "system", "content": "be"}, USER, SAID],
    ),
    "a blank system message": ({"messages": [USER, SAID], "system": " "}, [USER, SAID]),
    "ShareGPT's calls": (
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "yes"},
            ]
        },
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [FUNCTION]},
            {"role": "tool", "content": "2"},
            SAID,
        ],
    ),
    "OpenAI's calls": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "c", "type": "function", "function": CALL | {"arguments": '{"a": 1}'}}],
                },
                {"role": "tool", "content": "2", "tool_call_id": "c", "name": None},
            ]
        },
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "id": "c", "function": CALL}]},
            {"role": "tool", "content": "2", "tool_call_id": "c"},
        ],
    ),
    "calls as JSON": (
        {"messages": [USER, {"role": "assistant", "tool_calls": json.dumps([FUNCTION])}]},
        [USER, {"role": "assistant", "content": None, "tool_calls": [FUNCTION]}],
    ),
    "calls without their function": (
        {"messages": [USER, SAID | {"tool_calls": [CALL]}]},
        [USER, SAID | {"tool_calls": [FUNCTION]}],
    ),
    "an older call": (
        {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL}]},
        [USER, {"role": "assistant", "content": None, "tool_calls": [FUNCTION]}],
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                SAID,
            ]
        },
        [USER, SAID],
    ),
    "other keys": (
        {"messages": [USER | {"name": "Ann"}, SAID | {"reasoning_content": "hm", "name": None}]},
        [USER | {"name": "Ann"}, SAID | {"reasoning_content": "hm"}],
    ),
    "messages as JSON": ({"messages": json.dumps([USER, SAID])}, [USER, SAID]),
    "weights": ({"messages": [USER, SAID | {"weight": 0}, USER, SAID | {"weight": 1}]}, [USER, QUIET, USER, SAID]),
    "axolotl's weights": ({"messages": [USER, SAID | {"train": False}]}, [USER, QUIET]),
    "prompt and completion": ({"prompt": [USER], "completion": [SAID]}, [USER, SAID]),
    "a prompt with an answer": ({"prompt": [USER, SAID, USER], "completion": [SAID]}, [USER, QUIET, USER, SAID]),
    "a completion of text": ({"prompt": [USER], "completion": "yes"}, [USER, SAID]),
    "a preference": ({"prompt": [USER], "chosen": [SAID], "rejected": [SAID | {"content": "no"}]}, [USER, SAID]),
    "a preference with the prompt in it": (
        {"chosen": [USER, SAID, USER, SAID], "rejected": [USER, SAID, USER, SAID | {"content": "no"}]},
        [USER, QUIET, USER, SAID],
    ),
    "a preference with the prompt twice": (
        {"prompt": "hi", "chosen": [USER, SAID], "rejected": [USER, SAID | {"content": "no"}], "messages": [USER]},
        [USER, SAID],
    ),
    "a preference in ShareGPT's form": (
        {"conversations": shared("hi"), "chosen": shared("", "yes")[1], "rejected": shared("", "no")[1]},
        [USER, SAID],
    ),
}


@pytest.mark.parametrize("case", CHATS)
def test_chats(case, rows_of):
    row, expected = CHATS[case]
    rows = rows_of(row)
    assert rows.kind == "messages"
    assert rows.chat(0) == expected
    assert json.loads(rows.data[0]["tools"]) == []


@pytest.mark.parametrize(
    "tools", [[SCHEMA], [SCHEMA["function"]], json.dumps([SCHEMA]), [json.dumps(SCHEMA)], SCHEMA], ids=str
)
def test_tools(tools, rows_of):
    rows = rows_of({"messages": [USER, SAID], "tools": tools}, {"messages": [USER, SAID], "tools": None})
    assert [json.loads(cell) for cell in rows.data["tools"]] == [[SCHEMA], []]


PAIRS = {
    "Dolly": ({"instruction": "add", "context": "1 1", "response": "2", "category": "x"}, ALPACA_INPUT, "2"),
    "Dolly without a context": ({"instruction": "add", "context": "", "response": "2"}, ALPACA, "2"),
    "question and answer": ({"question": "add", "answer": "2"}, ALPACA, "2"),
    "query and response": ({"query": "add", "response": "2"}, ALPACA, "2"),
    "prompt and response": ({"prompt": "add", "response": "2"}, "{instruction}", "2"),
    "input and output": ({"input": "add", "output": "2"}, "{instruction}", "2"),
    "a preference": ({"prompt": "add", "chosen": "2", "rejected": "3"}, "{instruction}", "2"),
    "a preference that repeats its prompt": (
        {"prompt": "add", "chosen": "add 2", "rejected": "3"},
        "{instruction}",
        " 2",
    ),
    "a preference without a prompt": ({"chosen": "add it: 2.", "rejected": "add it: 3."}, "add it:", " 2."),
    "completions that are JSON": ({"prompt": "add", "completion": '[{"role": 1}'}, "{instruction}", '[{"role": 1}'),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case, rows_of):
    row, template, completion = PAIRS[case]
    rows = rows_of(row)
    assert rows.kind == "prompt-completion"
    prompt = template.format_map({"instruction": "add", "input": row.get("context")})
    assert (rows.data[0]["prompt"], rows.data[0]["completion"]) == (prompt, completion)
    assert rows.alpaca is ("###" in prompt)


def test_what_was_taken_for_what_is_said(rows_of):
    rows = rows_of({"question": "q", "answer": "a", "level": 3})
    assert rows.notes == ("columns read: question as instruction, answer as output", "columns not used: level")
    assert rows_of({"content": "x"}).notes == ("columns read: content as text",)


REFUSED = {
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        ["message 1: part 1 of its content is of the type 'image_url'", "only text"],
    ),
    "unknown speaker": ({"conversations": [{"from": "alien", "value": "x"}]}, ["'from' is 'alien'", "human, gpt"]),
    "nothing said": ({"messages": [{"role": "user"}]}, ["message 1: 'content' is null"]),
    "ShareGPT, nothing said": ({"conversations": [{"from": "human", "value": None}]}, ["'content' is null"]),
    "call without a name": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"x": 1}]}]},
        ["message 2: the call of a tool", "must have a name"],
    ),
    "tools": ({"messages": [USER, SAID], "tools": "all"}, ["column 'tools' holds str \"all\"", "name of a function"]),
    "two system messages": (
        {"messages": [{"role": "system", "content": "a"}, USER, SAID], "system": "b"},
        ["begins with a system message", "Keep one"],
    ),
    "NaN": ({"messages": [USER, SAID | {"score": float("nan")}]}, ["holds the number nan"]),
    "half a character in a call": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "\ud83d"}]}]},
        ["half a surrogate pair"],
    ),
    "prompt of numbers": ({"prompt": [USER], "completion": 5}, ["column 'completion' is int 5"]),
    "answer as a list": ({"question": "q", "answer": ["a"]}, ["column 'answer' is list"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_a_row_is_named(case, rows_of):
    row, parts = REFUSED[case]
    with pytest.raises(DataError) as error:
        rows_of(row)
    for part in ("a.jsonl:1: ", *parts):
        assert part in str(error.value)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "gpt", "[{}]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
COLUMNS = st.sampled_from(
    [name for form in FORMS for names in (*form.required.values(), *form.optional.values()) for name in names]
)


@settings(max_examples=300)
@given(row=st.dictionaries(COLUMNS, VALUES, max_size=4))
def test_any_row_is_read_or_refused(row):
    with contextlib.suppress(DataError):
        layout = layout_of(row)
        cells = layout.cells(row)
        kinds = (layout.form.kind, "messages") if layout.form.as_chat else (layout.form.kind,)
        assert all(isinstance(cell, str) for kind in kinds for cell in layout.row(cells, kind).values())
