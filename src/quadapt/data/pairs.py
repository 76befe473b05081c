"""Pairs of answers to the same prompt, one of them preferred: rows of both sides, sequences, and batches of both.

Both answers are read, rendered, tokenized and cut as any answer is (`forms.py`, `examples.py`, `encode.py`), each by
itself; a pair is used if both of its sides can be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from datasets import Dataset, Features, List, Value

from quadapt.data.collate import Collator, pad_token_id
from quadapt.data.encode import Columns, Encoded, form_of, not_blank, report_of, sequence_of
from quadapt.data.examples import Example, examples
from quadapt.data.read import Rows, read, read_held_out, split_rows
from quadapt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

REJECTED = "rejected_"
"""What the names of a sequence's columns begin with where they are those of the rejected answer."""


@dataclass(frozen=True)
class Pairs:
    """Rows of pairs: the same prompts, with the chosen answers and with the rejected ones, in the same order."""

    chosen: Rows
    """Prompts with the answers that people prefer."""

    rejected: Rows
    """Prompts in the same order, with the answers that people like less."""

    def __len__(self) -> int:
        return len(self.chosen)

    def split(self, share: float, seed: int) -> tuple[Pairs, Pairs]:
        """Pairs to train on, and a share of them that is held out: see :func:`quadapt.data.split_rows`."""
        chosen, rejected = (split_rows(side, share, seed) for side in (self.chosen, self.rejected))
        return Pairs(chosen[0], rejected[0]), Pairs(chosen[1], rejected[1])


def read_pairs(sources: Sequence[str], *, held_out: bool = False, max_bad_rows: int | None = None) -> Pairs:
    """Read rows with `chosen` and `rejected`, and `prompt` (or what both answers begin with).

    Args:
        sources: Files, folders and names of the hub, as :func:`quadapt.data.read` takes them.
        held_out: Read the split `test` of what has splits.
        max_bad_rows: Pairs of which a side cannot be used are skipped, up to so many.

    Raises:
        DataError: There are no pairs, or too many cannot be used.
    """
    how = read_held_out if held_out else read
    chosen = how(sources, max_bad_rows=max_bad_rows, side="chosen")
    rejected = how(sources, max_bad_rows=max_bad_rows, side="rejected")
    both = _both(_keyed(range(len(chosen)), chosen.data["where"]), _keyed(range(len(rejected)), rejected.data["where"]))
    bad = replace(chosen.bad, count=chosen.bad.count + len(chosen) - len(both), good=len(both))
    bad.first = list(dict.fromkeys([*chosen.bad.first, *rejected.bad.first]))[:3]
    bad.check(len(both))
    one, other = ([pair[side] for pair in both] for side in (0, 1))
    return Pairs(replace(chosen.select(one), bad=bad), replace(rejected.select(other), bad=bad))


def encode_pairs(pairs: Pairs, tokenizer: PreTrainedTokenizerBase, *, seq_len: int) -> Encoded:
    """Tokenize both answers of each pair; prompts bear no loss.

    Args:
        pairs: Rows of pairs.
        tokenizer: The tokenizer of the model.
        seq_len: The most tokens of a prompt with an answer; longer ones are cut at their right end.

    Returns:
        A pair in each row, `input_ids` and `labels` of the chosen answer and, as `rejected_input_ids` and
        `rejected_labels`, of the rejected one. The report counts the sequences of both.

    Raises:
        ConfigError: `seq_len` is less than 2.
        DataError: The tokenizer lacks a token or a chat template that is needed.
    """
    if seq_len < 2:
        raise ConfigError(f"seq_len={seq_len} leaves no token to predict. Use at least 2")
    pad_token_id(tokenizer)  # now rather than in the first batch
    tally: Counter[str] = Counter()
    bad = pairs.chosen.bad.copy()
    sides = [_by_row(not_blank(examples(rows, tokenizer, bad=bad), tally)) for rows in (pairs.chosen, pairs.rejected)]
    kept = [pair for pair in _both(*sides) if _bear_loss(pair, seq_len, tally)]
    sequences = [[_cut(example, seq_len, tally) for example in pair] for pair in kept]
    names = [f"{side}{name}" for side in ("", REJECTED) for name in ("input_ids", "labels")]
    columns = [[each[at][name] for each in sequences] for at in (0, 1) for name in ("input_ids", "labels")]
    data = Dataset.from_dict(
        dict(zip(names, columns, strict=True)), features=Features(dict.fromkeys(names, List(Value("int32"))))
    )
    every = [sequence for pair in sequences for sequence in pair]
    report = report_of(pairs.chosen, tokenizer, every, tally, seq_len, False, bad)
    notes = (f"{len(kept):,} pairs, with a sequence for each of their two answers", *report.notes)
    return Encoded(data, replace(report, notes=notes), form_of(pairs.chosen, tokenizer))


@dataclass(frozen=True)
class PairCollator:
    """Makes batches of pairs: all chosen answers, then, in the same order, all rejected ones."""

    collator: Collator
    """Pads them to the same length."""

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `labels` and `attention_mask`, each `[2 * pairs, length]`."""
        sides = [
            {name: pair[f"{side}{name}"] for name in ("input_ids", "labels")}
            for side in ("", REJECTED)
            for pair in pairs
        ]
        return self.collator(sides)


def _keyed(items: Iterable[T], places: Iterable[str]) -> dict[Hashable, T]:
    """Items by the places of their rows; of a source that is read twice, each time by itself."""
    seen: Counter[str] = Counter()
    found: dict[Hashable, T] = {}
    for item, place in zip(items, places, strict=True):
        found[place, seen[place]] = item
        seen[place] += 1
    return found


def _by_row(found: Iterable[Example]) -> dict[Hashable, Example]:
    every = list(found)
    return _keyed(every, [example.where for example in every])


def _both(one: Mapping[Hashable, T], other: Mapping[Hashable, T]) -> list[tuple[T, T]]:
    return [(item, other[key]) for key, item in one.items() if key in other]


def _bear_loss(pair: tuple[Example, Example], seq_len: int, tally: Counter[str]) -> bool:
    """Whether something of both answers is left within so many tokens."""
    found = all(example.loss[1:seq_len].any() for example in pair)
    tally["beyond"] += not found
    return found


def _cut(example: Example, seq_len: int, tally: Counter[str]) -> Columns:
    lost = max(0, len(example.ids) - seq_len)
    tally["truncated"] += lost > 0
    tally["tokens_lost"] += lost
    return sequence_of([Example(example.ids[:seq_len], example.loss[:seq_len])], packed=False)
