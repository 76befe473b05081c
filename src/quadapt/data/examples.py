"""From rows to token ids, and which of them bear loss. Nothing is cut here.

What is trained must be what is generated: there, the prompt is tokenized by itself, and the model goes on from its
last token. So the prompt's tokens are always those of the prompt alone. If prompt and completion together have others
(`Answer: ` + `yes` has a token ` yes`), the completion is tokenized apart, and the example says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quadapt.data.bad import BadRows
from quadapt.data.messages import Row
from quadapt.data.read import Rows
from quadapt.data.turns import GENERATION, Template
from quadapt.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("quadapt")

_BATCH = 256


@dataclass(frozen=True)
class Example:
    """One row of the data as tokens."""

    ids: NDArray[np.int32]
    """All tokens: the opening ones if the tokenizer puts any, the row's own, the end of sequence."""

    loss: NDArray[np.bool_]
    """For each token whether it bears loss, as `[tokens]` booleans."""

    where: str = ""
    """The place of the row in its source, for messages."""

    apart: bool = False
    """Whether prompt and completion had to be tokenized apart."""

    lost: tuple[str, ...] = ()
    """What the row has, and the chat template does not show: thoughts, tool calls, .."""


def examples(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only: bool = True,
    add_eos: bool = True,
    bad: BadRows | None = None,
) -> Iterator[Example]:
    """Tokenize rows, one example for each that can be used, in their order.

    Args:
        rows: Rows of any kind.
        tokenizer: The tokenizer, whose chat template is used for messages.
        completion_only: Loss on the completion, or on what the assistant says, alone. Text bears loss throughout.
        add_eos: Put the end-of-sequence token after a text or a completion. After messages the chat template decides.
        bad: Counts rows that the chat template cannot render. Default: those of `rows`, in a count of this pass, which
            is logged.

    Returns:
        Examples; one without any loss-bearing token if its text or its completion is blank.

    Raises:
        DataError: The tokenizer has no end-of-sequence token or no chat template, or the template cannot render more
            rows than may be skipped.
    """
    said, bad = bad is not None, bad or rows.bad.copy()
    encoder = _Encoder(tokenizer, rows, completion_only, add_eos, bad)
    encode = {"text": encoder.texts, "prompt-completion": encoder.pairs, "messages": encoder.chats}[rows.kind]
    try:
        for batch in rows.data.iter(batch_size=_BATCH):
            yield from encode(batch)
    finally:
        more = bad.count - rows.bad.count
        if more and not said:
            log.warning("%s: %s", rows.source, "; ".join(bad.notes()))
    if more:  # among all rows that were read, of which these may be a few
        bad.check(max(len(rows), rows.bad.good) - more if more < len(rows) else 0)


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text; those that it puts after one are left to `add_eos`."""
    full, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return next((full[:start] for start in range(len(full)) if full[start : start + len(bare)] == bare), [])


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, without special tokens around them."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


class _Encoder:
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rows: Rows, completion_only: bool, add_eos: bool, bad: BadRows
    ) -> None:
        self.tokenizer, self.completion_only, self.bad = tokenizer, completion_only, bad
        if rows.kind == "messages":
            self.template = Template(tokenizer)
            self.marked = GENERATION.search(tokenizer.get_chat_template()) is not None
            if completion_only and not tokenizer.is_fast:
                raise DataError(
                    "the tokenizer does not tell where in a text its tokens lie, so loss cannot be confined to "
                    "what the assistant says. Use a fast tokenizer, or let all tokens bear loss (--no-completion-only)"
                )
        elif add_eos and tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token. Set tokenizer.eos_token to one of its tokens, "
                "or pass add_eos=False"
            )
        self.head, self.tail = opening(tokenizer), [tokenizer.eos_token_id] if add_eos else []

    def texts(self, batch: Row) -> Iterator[Example]:
        tokens = tokenize(self.tokenizer, batch["text"])
        for where, text, ids in zip(batch["where"], batch["text"], tokens, strict=True):
            yield self._example(where, [], [*self.head, *ids, *self.tail], blank=not text.strip())

    def pairs(self, batch: Row) -> Iterator[Example]:
        prompts = tokenize(self.tokenizer, batch["prompt"])
        wholes = tokenize(
            self.tokenizer,
            [prompt + completion for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)],
        )
        for where, completion, prompt, whole in zip(batch["where"], batch["completion"], prompts, wholes, strict=True):
            apart = whole[: len(prompt)] != prompt
            rest = self._continuation(completion) if apart else whole[len(prompt) :]
            yield self._example(where, [*self.head, *prompt], [*rest, *self.tail], not completion.strip(), apart)

    def chats(self, batch: Row) -> Iterator[Example]:
        for where, messages, tools in zip(batch["where"], batch["messages"], batch["tools"], strict=True):
            try:
                ids, loss, lost = self._chat(json.loads(messages), json.loads(tools))
            except DataError as error:
                self.bad.add(DataError(f"{where}: {error}"))
            else:
                yield Example(np.array(ids, dtype=np.int32), np.array(loss, dtype=bool), where, lost=tuple(lost))

    def _chat(self, messages: list[Row], tools: list[Row]) -> tuple[list[int], list[bool], list[str]]:
        """Tokens of a chat, which of them bear loss, and what it loses in the rendering.

        The template itself may mark what the assistant says. (Which of its marks belong to answers that bear no loss
        is not known; then it is looked for.)
        """
        if self.completion_only and self.marked and not any("weight" in message for message in messages):
            return self.template.marked(messages, tools)
        chat = self.template.chat(messages, tools, find=self.completion_only)
        if not self.completion_only:
            ids = tokenize(self.tokenizer, [chat.text])[0]
            return ids, [True] * len(ids), chat.lost
        encoded = self.tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # A token that reaches beyond an answer is the template's: it is there before, or after, anything is said.
        loss = [
            any(begin <= first and last <= end for begin, end in chat.spans)
            for first, last in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), loss, chat.lost

    def _example(self, where: str, prompt: list[int], rest: list[int], blank: bool, apart: bool = False) -> Example:
        ids = np.array(prompt + rest, dtype=np.int32)
        loss = np.full(len(ids), not blank)
        if self.completion_only:
            loss[: len(prompt)] = False
        return Example(ids, loss, where, apart)

    def _continuation(self, text: str) -> list[int]:
        """Tokens of a text that goes on from another, without the space that SentencePiece puts before a first word."""
        for anchor in ("\n", "."):  # one of them does not merge with what follows
            before, whole = tokenize(self.tokenizer, [anchor, anchor + text])
            if whole[: len(before)] == before:
                return whole[len(before) :]
        return tokenize(self.tokenizer, [text])[0]
