"""What encoding reports: the mask of an example, what was lost, and data that bears no loss."""

import pytest

from quadapt.data import check_loss, encode
from quadapt.errors import DataError


@pytest.mark.parametrize(
    ("kind", "values", "packing", "example"),
    [
        ("prompt-completion", [("Answer:", " yes"), ("no", " no")], True, "[no loss]<s> Answer:[loss] yes</s>"),
        ("prompt-completion", [("Answer:", " yes")], False, "[no loss]<s> Answer:[loss] yes</s>"),
        ("text", ["yes and no"], False, "[no loss]<s>[loss] yes and no</s>"),
    ],
)
def test_the_example_shows_its_mask(pieces, make_rows, kind, values, packing, example):
    assert encode(make_rows(kind, values), pieces, seq_len=60, packing=packing).report.example == example


def test_a_long_example_is_shortened(chars, make_rows):
    rows = make_rows("prompt-completion", [("a" * 900, "b")])
    example = encode(rows, chars, seq_len=999, packing=False).report.example
    assert example == f"[no loss]<s>{'a' * 297} [.. 303 characters ..] {'a' * 300}[loss]b</s>"


def test_unknown_text_is_counted(chars, make_rows):
    report = encode(make_rows("text", ["aéb€"]), chars, seq_len=60, packing=False).report
    assert report.unknown == 2
    assert "2 tokens are <unk>, text that the tokenizer does not know" in report.notes
    chars.pad_token = "<unk>"  # now it may stand for other things
    assert encode(make_rows("text", ["aéb€"]), chars, seq_len=60, packing=False).report.unknown == 0


def test_report_for_people(chars, make_rows):
    rows = make_rows("prompt-completion", [("abc", "d"), ("ab", "cdefgh"), ("abcdefghijk", "b")])
    assert encode(rows, chars, seq_len=8, packing=False).report.lines() == [
        "data: 3 rows (prompt-completion) in 2 sequences of at most 8 tokens, 88% filled",
        "14 tokens, of which 7 bear loss",
        "1 examples truncated (2 tokens lost), 1 dropped",
        "1 examples dropped: what bears loss lies beyond their first 8 tokens",
        "the tokenizer has no pad token; </s> pads",
    ]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            "prompt-completion",
            [("abcdef", "g")],
            "1 examples dropped: what bears loss lies beyond their first 6 tokens",
        ),
        ("prompt-completion", [("a", "")], "1 examples dropped: their completion is blank"),
        ("text", [" "], "1 examples dropped: their text is blank"),
    ],
)
def test_data_without_loss_is_refused(chars, make_rows, kind, values, message):
    encoded = encode(make_rows(kind, values), chars, seq_len=6, packing=True)
    assert len(encoded.data) == 0
    assert encoded.report.example == ""
    with pytest.raises(DataError) as error:
        check_loss(encoded.report)
    for part in ("data: no token bears loss", message, "--seq-len"):
        assert part in str(error.value)


def test_data_with_loss_is_accepted(chars, make_rows):
    check_loss(encode(make_rows("text", ["ab"]), chars, seq_len=6, packing=True).report)
