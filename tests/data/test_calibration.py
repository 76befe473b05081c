import pytest
import torch

from quadapt.data import calibration_batches
from quadapt.errors import ConfigError, DataError

BOS, EOS = 1, 2


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_calibration_blocks_are_cut_from_one_stream(chars, make_rows):
    text = "".join(chr(97 + number % 26) + chr(65 + number // 26) for number in range(300))
    rows = make_rows("text", [text])
    stream = torch.tensor([BOS, *ids_of(chars, text), EOS])
    calibration = calibration_batches(rows, chars, length=10, sequences=20, batch=8, seed=3)
    assert [tuple(batch.shape) for batch in calibration.batches] == [(8, 10), (8, 10), (4, 10)]
    assert (calibration.sequences, calibration.tokens) == (20, 200)
    assert calibration.source == "data"
    blocks = {tuple(block) for block in stream[: len(stream) // 10 * 10].view(-1, 10).tolist()}
    drawn = [tuple(block) for block in torch.cat(calibration.batches).tolist()]
    assert set(drawn) <= blocks
    assert len(set(drawn)) == 20
    other = calibration_batches(rows, chars, length=10, sequences=20, seed=4)
    assert set(drawn) != {tuple(block) for block in torch.cat(other.batches).tolist()}


def test_calibration_follows_the_seed(chars, make_rows):
    rows = make_rows("prompt-completion", [(f"q{number}", f"a{number}") for number in range(100)])
    first, again, other = (
        calibration_batches(rows, chars, length=7, sequences=6, seed=seed).batches[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.long


@pytest.mark.parametrize(("length", "sequences"), [(5, 4), (10, 2), (20, 1)])
def test_calibration_says_how_many_blocks_there_are(chars, make_rows, length, sequences):
    rows = make_rows("prompt-completion", [("abc", "defg")] * 2 + [("", "a")])  # 9 + 9 + 3 tokens
    calibration = calibration_batches(rows, chars, length=length)
    assert calibration.sequences == sequences
    assert calibration.tokens == sequences * length == sum(batch.numel() for batch in calibration.batches)


def test_calibration_takes_prompts_and_completions(chars, make_rows):
    block = calibration_batches(make_rows("prompt-completion", [("ab", "cd")]), chars, length=6).batches[0]
    assert chars.decode(block[0].tolist()) == "<s>abcd</s>"


def test_calibration_tokenizes_no_more_than_it_needs(chars, make_rows, monkeypatch):
    monkeypatch.setattr("quadapt.data.examples._BATCH", 10)
    seen = []

    def tokenize(_, texts):
        seen.extend(texts)
        return [[7] * 10] * len(texts)

    monkeypatch.setattr("quadapt.data.examples.tokenize", tokenize)
    calibration_batches(make_rows("text", ["a"] * 500), chars, length=12, sequences=5)
    assert len(seen) == 10  # rows of 12 tokens, by the batch


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 22}, DataError, "data: has 21 tokens.*block of 22.*--calibration-length"),
        ({"length": 0}, ConfigError, "length=0"),
        ({"length": 4, "batch": 0}, ConfigError, "batch=0"),
        ({"length": 4, "sequences": 0}, ConfigError, "sequences=0"),
    ],
)
def test_calibration_errors(chars, make_rows, options, error, message):
    with pytest.raises(error, match=message):
        calibration_batches(make_rows("text", ["a" * 19]), chars, **options)
