"""From rows to token ids, and which of them bear loss. Nothing is cut here.

What is trained must be what is generated: there, the prompt is tokenized by itself, and the model goes on from its
last token. So the prompt's tokens are always those of the prompt alone. If prompt and completion together have others
(`Answer: ` + `yes` has a token ` yes`), the completion is tokenized apart, and the example says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from quadapt.data.read import Row, Rows
from quadapt.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BATCH = 256


@dataclass(frozen=True)
class Example:
    """One row as tokens."""

    ids: NDArray[np.int32]
    """All tokens: the opening ones if the tokenizer puts any, the row's own, the end of sequence."""

    loss: NDArray[np.bool_]
    """Which tokens bear loss."""

    where: str = ""
    """Where in its source the row stands."""

    apart: bool = False
    """Whether prompt and completion had to be tokenized apart."""


def examples(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, completion_only: bool = True, add_eos: bool = True
) -> Iterator[Example]:
    """Tokenize rows, one example for each, in their order.

    Args:
        rows: Of any kind.
        tokenizer: Its chat template is used for messages.
        completion_only: Loss on the completion, or on what the assistant says, alone. Text bears loss throughout.
        add_eos: Put the end-of-sequence token after a text or a completion. After messages the chat template decides.

    Returns:
        Examples; one without any loss-bearing token if its text or its completion is blank.

    Raises:
        DataError: The tokenizer has no end-of-sequence token or no chat template, or the template cannot render a row.
    """
    encoder = _Encoder(tokenizer, rows, completion_only, add_eos)
    encode = {"text": encoder.texts, "prompt-completion": encoder.pairs, "messages": encoder.chats}[rows.kind]
    for batch in rows.data.iter(batch_size=_BATCH):
        yield from encode(batch)


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text; those that it puts after one are left to `add_eos`."""
    full, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return next((full[:start] for start in range(len(full)) if full[start : start + len(bare)] == bare), [])


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, without special tokens around them."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


class _Encoder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, completion_only: bool, add_eos: bool) -> None:
        self.tokenizer, self.completion_only = tokenizer, completion_only
        if rows.kind == "messages":
            self.turns = _chat_encoder(tokenizer, completion_only)
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
        for where, messages in zip(batch["where"], batch["messages"], strict=True):
            try:
                ids, loss = self.turns(self.tokenizer, messages)
            except (TemplateError, DataError) as error:
                raise DataError(f"{where}: the chat template cannot render the messages: {error}") from error
            yield Example(np.array(ids, dtype=np.int32), np.array(loss, dtype=bool), where)

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


# --- messages ---------------------------------------------------------------------------------------------------------

_ChatEncoder = Callable[["PreTrainedTokenizerBase", list[Row]], tuple[list[int], list[bool]]]
"""From messages to tokens, and which of them bear loss."""


def _chat_encoder(tokenizer: PreTrainedTokenizerBase, completion_only: bool) -> _ChatEncoder:
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template, so messages cannot be rendered. Set "
            "tokenizer.chat_template, take the chat variant of the model, or give prompts and completions"
        )
    if not completion_only:
        return _everything
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer does not tell where in a text its tokens lie, so loss cannot be confined to "
            "what the assistant says. Use a fast tokenizer, or let all tokens bear loss"
        )
    return _by_marks if _GENERATION.search(tokenizer.get_chat_template()) else _by_turns


def _everything(tokenizer: PreTrainedTokenizerBase, messages: list[Row]) -> tuple[list[int], list[bool]]:
    ids = tokenize(tokenizer, [str(tokenizer.apply_chat_template(messages, tokenize=False))])[0]
    return ids, [True] * len(ids)


def _by_marks(tokenizer: PreTrainedTokenizerBase, messages: list[Row]) -> tuple[list[int], list[bool]]:
    """The template itself marks what the assistant says, by `{% generation %}`."""
    chat: Any = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
    )
    return list(chat["input_ids"]), [bool(bit) for bit in chat["assistant_masks"]]


def _by_turns(tokenizer: PreTrainedTokenizerBase, messages: list[Row]) -> tuple[list[int], list[bool]]:
    """What the assistant says is what rendering its turn adds to the turns before it and the generation prompt."""

    def render(count: int, *, prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    whole = render(len(messages))
    spans = []
    for turn in (turn for turn, message in enumerate(messages) if message["role"] == "assistant"):
        if turn == 0:
            raise DataError("the first message is the assistant's. Put the user's, or a system message, before it")
        before, after = render(turn, prompt=True), render(turn + 1)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                f"it renders message {turn + 1} differently when others follow or none is there yet, so "
                "what the assistant says cannot be found. Put {% generation %} and {% endgeneration %} "
                "around it in the template"
            )
        spans.append((len(before), len(after)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), [any(begin <= start < end for begin, end in spans) for start in starts]
