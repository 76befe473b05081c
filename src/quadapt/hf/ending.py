"""The end of an answer: which token it is, and where generation looks for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from quadapt.hf.vocabulary import embedding_rows, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAID = "Quite so"


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template puts after what the assistant says; None without a template, or such a token.

    A model that is trained on chats learns to say it at the end of an answer, and generation runs on past it unless it
    counts as an end. It is found by rendering an assistant's turn: the special token that follows the content.
    """
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": _SAID}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # whatever a template may raise; training through it says what is wrong
        return None
    before, _, after = text.rpartition(_SAID)
    if not before:
        return None
    marks = special_tokens(tokenizer)
    for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
        if token in marks:
            return int(token)
        if str(tokenizer.decode([token])).strip():
            return None
    return None


def set_ends(model: Any, tokenizer: PreTrainedTokenizerBase, more: Iterable[int | None] = ()) -> None:
    """Add to the model's `generation_config` what ends an answer: the tokenizer's end, and that of a turn."""
    about = getattr(model, "generation_config", None)
    if about is None or not hasattr(tokenizer, "eos_token_id"):  # none, or the processor of a model of pictures
        return
    own = about.eos_token_id
    named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, turn_end(tokenizer), *more]
    rows = embedding_rows(model) if isinstance(model, nn.Module) else None
    ends = [int(end) for end in dict.fromkeys(named) if end is not None and (rows is None or end < rows)]
    about.eos_token_id = None if not ends else ends[0] if len(ends) == 1 else ends
