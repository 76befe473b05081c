"""Sequences to train on, of at most `seq_len` tokens, and an account of every token that went into them or did not.

Texts are joined end to end and cut into blocks, as in pretraining; only a last token that stands alone is lost. An
example with a prompt is cut at its right end, as in TRL, so that it begins as it will when it is generated from; one
that has no loss-bearing token left is dropped. Packing puts several whole examples into a sequence, kept apart by
`position_ids` that restart.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, Features, List, Value

from quadapt.data.bad import BadRows
from quadapt.data.collate import NO_LOSS, pad_token_id
from quadapt.data.examples import Example, examples
from quadapt.data.forms import RowsKind
from quadapt.data.prompt import PromptForm, template_digest
from quadapt.data.read import Rows
from quadapt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

Columns = dict[str, "NDArray[np.int32]"]
"""A sequence: `input_ids`, `labels`, and `position_ids` if examples are packed into it."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of the rows when they were made into sequences to train on."""

    source: str
    """The names of the files or datasets that were read."""

    kind: str
    """The kind of the rows, which says what columns they have, or the task that reads them."""

    seq_len: int
    """Most tokens that a sequence may have."""

    packing: bool
    """Whether a sequence may hold several examples; so it always is for text."""

    examples: int
    """How many rows were read."""

    sequences: int
    """How many sequences there are to train on."""

    tokens: int
    """How many tokens all sequences have together."""

    loss_tokens: int
    """How many tokens bear loss. The first of a sequence, and of a packed example, never does: nothing predicts it."""

    unknown: int
    """How many tokens stand for text that the tokenizer does not know."""

    truncated: int
    """How many examples lost their end, since they are longer than `seq_len`."""

    tokens_lost: int
    """How many tokens were lost in truncated examples, or left over alone where text is cut into blocks."""

    dropped: int
    """How many examples were left out, since none of their tokens bears loss; `notes` say why."""

    skipped: int
    """How many rows could not be used at all; `notes` name the first of them."""

    notes: tuple[str, ...]
    """What else there is to know about the data, each note in a sentence."""

    example: str
    """The first example as text, with `[loss]` and `[no loss]` in front of its runs of tokens."""

    def lines(self) -> list[str]:
        """The report for people, line by line, without the example."""
        filled = self.tokens / max(1, self.sequences * self.seq_len)
        return [
            f"{self.source}: {self.examples:,} rows ({self.kind}) in {self.sequences:,} sequences of at most "
            f"{self.seq_len:,} tokens, {filled:.0%} filled",
            f"{self.tokens:,} tokens, of which {self.loss_tokens:,} bear loss",
            f"{self.truncated:,} examples truncated ({self.tokens_lost:,} tokens lost), {self.dropped:,} dropped",
            *self.notes,
        ]


@dataclass(frozen=True)
class Encoded:
    """Sequences to train on, and a report of what they were made from."""

    data: Dataset
    """Sequences: `input_ids`, `labels`, and `position_ids` if examples are packed. `Collator` makes batches of them."""

    report: DataReport
    """What became of the rows when they were made into sequences."""

    form: PromptForm
    """The form of the prompts, so that the model can be asked in the same form after training."""

    def sample(self, count: int, seed: int) -> Encoded:
        """So many of the sequences, drawn at random; itself if there are no more."""
        if count >= len(self.data):
            return self
        drawn = np.sort(np.random.default_rng(seed).permutation(len(self.data))[:count])
        return replace(self, data=self.data.select(drawn))


def encode(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    packing: bool,
    completion_only: bool = True,
    add_eos: bool = True,
) -> Encoded:
    """Tokenize rows and cut or pack them into sequences.

    Args:
        rows: Rows of any kind.
        tokenizer: The tokenizer of the model.
        seq_len: The most tokens that a sequence may have.
        packing: Let a sequence hold several examples. Text always fills its sequences.
        completion_only: Loss on the completion, or on what the assistant says, alone. Text bears loss throughout.
        add_eos: Put the end-of-sequence token after a text or a completion. After messages the chat template decides.

    Raises:
        ConfigError: `seq_len` is less than 2.
        DataError: The tokenizer lacks a token or a chat template that is needed. (That no token bears loss is for
            :func:`check_loss` to refuse, after the report has been shown.)
    """
    if seq_len < 2:
        raise ConfigError(f"seq_len={seq_len} leaves no token to predict. Use at least 2")
    pad_token_id(tokenizer)  # now rather than in the first batch
    tally: Counter[str] = Counter()
    bad = rows.bad.copy()
    source = examples(rows, tokenizer, completion_only=completion_only, add_eos=add_eos, bad=bad)
    found = not_blank(source, tally)
    if rows.kind == "text":
        sequences = list(_blocks(found, seq_len, tally))
    else:
        kept = list(_cut(found, seq_len, tally))
        lengths = [len(example.ids) for example in kept]
        bins = best_fit(lengths, seq_len) if packing else [[item] for item in range(len(kept))]
        sequences = [sequence_of([kept[item] for item in items], packed=packing) for items in bins]
    names = ["input_ids", "labels"] + ["position_ids"] * (packing and rows.kind != "text")
    data = Dataset.from_dict(
        {name: [columns[name] for columns in sequences] for name in names},
        features=Features(dict.fromkeys(names, List(Value("int32")))),
    )
    return Encoded(data, report_of(rows, tokenizer, sequences, tally, seq_len, packing, bad), form_of(rows, tokenizer))


def form_of(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    """In which form the prompts of rows are when they are tokenized."""
    if rows.kind == "messages":
        return PromptForm("chat", template_digest(tokenizer))
    return PromptForm("text" if rows.kind == "text" else "alpaca" if rows.alpaca else "prompt")


def check_loss(report: DataReport) -> None:
    """Refuse data that cannot train anything.

    Raises:
        DataError: No token bears loss; the message says what to do.
    """
    if not report.loss_tokens:
        raise DataError(
            f"{report.source}: no token bears loss. {'; '.join(report.notes)}. Use a longer --seq-len, or "
            "data with completions (in messages: turns whose role is assistant)"
        )


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into bins, few of them: the longest item first, each where it leaves the least room.

    Args:
        lengths: The lengths of the items, none above `capacity`.
        capacity: What the lengths in a bin may sum to.

    Returns:
        Indices of the items of each bin, ascending; bins in the order of their first items.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room left and bin, ascending
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        at = bisect_left(rooms, (lengths[item], -1))
        if at == len(rooms):
            rooms.append((capacity, len(bins)))
            bins.append([])
        room, chosen = rooms.pop(at)
        bins[chosen].append(item)
        insort(rooms, (room - lengths[item], chosen))
    return sorted(sorted(items) for items in bins)


def not_blank(source: Iterable[Example], tally: Counter[str]) -> Iterator[Example]:
    """Those examples of which something bears loss; `tally` counts all of them, and those that do not."""
    for example in source:
        tally["examples"] += 1
        tally["apart"] += example.apart
        tally.update(f"lost {what}" for what in example.lost)
        if example.loss.any():
            yield example
        else:
            tally["blank"] += 1


def _blocks(source: Iterable[Example], seq_len: int, tally: Counter[str]) -> Iterator[Columns]:
    stream = np.concatenate([np.empty(0, dtype=np.int32), *(example.ids for example in source)])
    for start in range(0, len(stream), seq_len):
        ids = stream[start : start + seq_len]
        if len(ids) > 1:
            yield sequence_of([Example(ids, np.ones(len(ids), dtype=bool))], packed=False)
        else:
            tally["tokens_lost"] += 1


def _cut(source: Iterable[Example], seq_len: int, tally: Counter[str]) -> Iterator[Example]:
    for example in source:
        if not example.loss[1:seq_len].any():
            tally["beyond"] += 1
            continue
        lost = max(0, len(example.ids) - seq_len)
        tally["truncated"] += lost > 0
        tally["tokens_lost"] += lost
        yield Example(example.ids[:seq_len], example.loss[:seq_len])


def sequence_of(parts: Sequence[Example], *, packed: bool) -> Columns:
    """A sequence of one example, or of several that are packed into it."""
    labels = [np.where(part.loss, part.ids, NO_LOSS).astype(np.int32) for part in parts]
    for each in labels:
        each[0] = NO_LOSS  # nothing predicts it; in a packed sequence, the example before it must not
    columns = {"input_ids": np.concatenate([part.ids for part in parts]), "labels": np.concatenate(labels)}
    if packed:
        columns["position_ids"] = np.concatenate([np.arange(len(part.ids), dtype=np.int32) for part in parts])
    return columns


# --- the report -------------------------------------------------------------------------------------------------------


def report_of(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    sequences: list[Columns],
    tally: Counter[str],
    seq_len: int,
    packing: bool,
    bad: BadRows,
) -> DataReport:
    """What became of rows: `tally` has what was counted on the way, `bad` the rows that could not be used."""
    unk = tokenizer.unk_token_id
    if unk in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        unk = None  # as in GPT-2, where it marks ends of texts and nothing else
    tally["unknown"] = sum(int((columns["input_ids"] == unk).sum()) for columns in sequences) if unk is not None else 0
    return DataReport(
        source=rows.source,
        kind=rows.kind,
        seq_len=seq_len,
        packing=packing or rows.kind == "text",
        examples=tally["examples"],
        sequences=len(sequences),
        tokens=sum(len(columns["input_ids"]) for columns in sequences),
        loss_tokens=sum(int((columns["labels"] != NO_LOSS).sum()) for columns in sequences),
        unknown=tally["unknown"],
        truncated=tally["truncated"],
        tokens_lost=tally["tokens_lost"],
        dropped=tally["blank"] + tally["beyond"],
        skipped=bad.count,
        notes=(*rows.notes, *bad.notes(), *_notes(rows.kind, tokenizer, tally, seq_len)),
        example=_render(sequences[0], tokenizer) if sequences else "",
    )


def _notes(kind: RowsKind, tokenizer: PreTrainedTokenizerBase, tally: Counter[str], seq_len: int) -> Iterator[str]:
    blank = {
        "text": "their text is blank",
        "prompt-completion": "their completion is blank",
        "messages": "the assistant says nothing in them",
    }[kind]
    if tally["blank"]:
        yield f"{tally['blank']:,} examples dropped: {blank}"
    if tally["beyond"]:
        yield f"{tally['beyond']:,} examples dropped: what bears loss lies beyond their first {seq_len:,} tokens"
    if tally["apart"]:
        yield (
            f"{tally['apart']:,} prompts end inside a token, so that prompt and completion were tokenized apart. "
            "If they end in a space, put it at the start of the completions"
        )
    for name, count in tally.items():
        if name.startswith("lost "):
            yield f"the chat template leaves out of {count:,} examples: {name.removeprefix('lost ')}"
    if tally["unknown"]:
        yield f"{tally['unknown']:,} tokens are {tokenizer.unk_token}, text that the tokenizer does not know"
    if tokenizer.pad_token_id is None:
        yield f"the tokenizer has no pad token; {tokenizer.eos_token} pads"


def _render(columns: Columns, tokenizer: PreTrainedTokenizerBase) -> str:
    starts = np.flatnonzero(columns["position_ids"] == 0) if "position_ids" in columns else np.zeros(1)
    end = int(starts[1]) if len(starts) > 1 else len(columns["input_ids"])
    ids, loss = columns["input_ids"][:end].tolist(), columns["labels"][:end] != NO_LOSS
    pieces = []
    for start, stop in pairwise([0, *(np.flatnonzero(np.diff(loss)) + 1).tolist(), end]):
        # Decoded by itself, a run of tokens would lose the space before it.
        before, text = (str(tokenizer.decode(ids[:to], clean_up_tokenization_spaces=False)) for to in (start, stop))
        pieces.append(f"[{'loss' if loss[start] else 'no loss'}]{_shorten(text[len(before) :])}")
    return "".join(pieces)


def _shorten(text: str, most: int = 600) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} [.. {len(text) - 2 * half:,} characters ..] {text[-half:]}"
